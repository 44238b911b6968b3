"""Admission of SpiderMultusConfigs, and of pods that get their networks; the rules are in `api`."""

from __future__ import annotations

from typing import Any

from api.core import Namespace, Pod
from api.injection import Demand, Json, concerned, inject
from api.multusconfig import MultusConfig, network_name
from api.nad import NetworkAttachmentDefinition
from api.validate.multusconfig import created_multus_config_errors, updated_multus_config_errors
from api.validate.multusdefaults import default_multus_config
from api.validate.verdict import Denial, Verdict
from controller.admission.rules import Context, Injection, Rules
from controller.caches import Caches
from controller.multus.settings import InjectionSettings
from store.errors import NotFoundError, NotServedError

_NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""Label that the API server puts on every namespace."""


async def _default(new: MultusConfig, old: MultusConfig | None, context: Context) -> MultusConfig:  # noqa: ARG001 (the same for every kind)
    return default_multus_config(new)


async def _validate(new: MultusConfig, old: MultusConfig | None, context: Context) -> Verdict:
    if new.metadata.deletion_timestamp is not None:
        return []
    metadata = new.metadata
    existing: NetworkAttachmentDefinition | None
    try:
        existing = await context.store.get(NetworkAttachmentDefinition, network_name(metadata), metadata.namespace)
    except (NotFoundError, NotServedError):  # the latter: Multus is not installed
        existing = None
    if old is None:
        return created_multus_config_errors(new, existing)
    return updated_multus_config_errors(old, new, existing)


ADMISSION = Rules(MultusConfig, _default, _validate)


def namespace_selector(settings: InjectionSettings, installation: str) -> dict[str, Any]:
    """The namespaces whose pods are looked at, a metav1.LabelSelector.

    Never that of the installation: if all controllers are gone, no new one could be created for want of an answer.
    """
    excluded = [*settings.namespaces_exclude, installation]
    expressions = [
        {"key": _NAMESPACE_NAME, "operator": operator, "values": list(dict.fromkeys(names))}
        for operator, names in (("NotIn", excluded), ("In", settings.namespaces_include))
        if names
    ]
    return {"matchExpressions": expressions}


def pod_injection(settings: InjectionSettings, caches: Caches, installation: str) -> Injection:
    """What changes created pods. Asks for caches, so call it before they run; whether to call it at all is a setting.

    Caches answer for the many pods that nothing is injected into. Only before a pod is denied for want of
    configurations, or if its namespace is not known yet, the API server is asked: both may be a second old.
    """
    demand = Demand(master_nics=settings.master_nics, sub_eni=settings.sub_eni)
    namespaces, configs = caches.of(Namespace), caches.of(MultusConfig)

    async def injected(pod: Json, namespace: str, context: Context) -> Json | Denial:
        home = namespaces.get(namespace) or await context.store.get(Namespace, namespace)
        annotations = home.metadata.annotations
        if not concerned(pod, annotations, demand):
            return pod
        result = inject(pod, namespace, annotations, configs.values(), demand, installation=context.namespace)
        if isinstance(result, Denial):
            fresh = (await context.store.list(MultusConfig)).items
            result = inject(pod, namespace, annotations, fresh, demand, installation=context.namespace)
        return result

    return Injection(Pod, injected, namespace_selector=namespace_selector(settings, installation))
