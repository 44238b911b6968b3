"""What applications ask of subnets: from the annotations of their pod templates to pools as they are to be. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import msgspec

from api.annotations import SUBNET, SUBNETS, AnnotationError, ip_number, ippool_reclaim, subnets
from api.apps import (
    CronJob,
    DaemonSet,
    Deployment,
    Job,
    PodTemplate,
    ReplicaSet,
    StatefulSet,
    controller_of,
)
from api.autopools import Application, Wish, desired_number, number_text
from api.core import Pod
from api.meta import Kind, ObjectMeta, OwnerReference, Resource
from api.ranges import Family
from api.workloads import NATIVE_VERSIONS, Scalable, replicas

NATIVE: tuple[type[Scalable], ...] = (Deployment, ReplicaSet, StatefulSet, DaemonSet, Job, CronJob)
"""Controllers whose number of pods is known."""
BY_KIND: Mapping[tuple[str, str], type[Scalable]] = {(kind.TYPE.api_version, kind.TYPE.kind): kind for kind in NATIVE}

_ABOVE: Mapping[type[Resource], type[Resource]] = {ReplicaSet: Deployment, Job: CronJob}
"""What makes one of these not the top controller of its pods."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one application asks for."""

    application: Application
    uid: str
    about: Resource
    """The application as an object that events can be about."""
    wishes: tuple[Wish, ...] = ()
    """Its pools as they are to be."""
    problem: str = ""
    """Why there are none."""


def asks(annotations: Mapping[str, str]) -> bool:
    """Whether a pod with these annotations wants addresses of a subnet."""
    return SUBNETS in annotations or SUBNET in annotations


def template_of(resource: Scalable) -> PodTemplate:
    """The template of the application's pods."""
    if isinstance(resource, CronJob):
        return resource.spec.job_template.spec.template
    return resource.spec.template


def application_of(resource: Scalable) -> Application:
    """Its name."""
    meta = resource.metadata
    return Application(resource.TYPE.api_version, resource.TYPE.kind, meta.namespace, meta.name)


def is_top(resource: Scalable) -> bool:
    """Whether it is the top controller of its pods: no ReplicaSet of a Deployment, no Job of a CronJob."""
    owner = controller_of(resource.metadata)
    above = _ABOVE.get(type(resource))
    return (
        owner is None or above is None or (owner.api_version, owner.kind) != (above.TYPE.api_version, above.TYPE.kind)
    )


def facts(resource: Scalable) -> object:
    """All that a demand depends on: equal facts of two versions mean that nothing is to be done."""
    template, meta = template_of(resource), resource.metadata
    return (
        meta.uid,
        meta.deletion_timestamp,
        is_top(resource),
        template.spec.host_network,
        template.metadata.annotations,
        replicas(resource),
    )


def native_demand(resource: Scalable, families: Collection[Family], spare: int) -> Demand | None:
    """What Kubernetes' own controller asks for; None if it asks for nothing. `spare` as for `desired_number`."""
    template = template_of(resource)
    if template.spec.host_network or not is_top(resource) or not asks(template.metadata.annotations):
        return None
    nothing = Demand(application_of(resource), resource.metadata.uid, resource)
    return _demand(nothing, template.metadata.annotations, families, pods=replicas(resource), spare=spare)


def owner_of(pod: Pod) -> OwnerReference | None:
    """The third party's controller whose pod it is and whose pools are to be seen to; None if there is none."""
    owner = controller_of(pod.metadata)
    if owner is None or owner.api_version in NATIVE_VERSIONS or pod.spec.host_network:
        return None
    return owner if asks(pod.metadata.annotations) else None


def third_party_demand(pod: Pod, owner: OwnerReference, families: Collection[Family]) -> Demand:
    """What the controller of `pod` asks for. Nobody knows how many pods it is to have, so the number must be given."""
    namespace = pod.metadata.namespace
    application = Application(owner.api_version, owner.kind, namespace, owner.name)
    about = third_party_kind(owner.api_version, owner.kind)(
        metadata=ObjectMeta(name=owner.name, namespace=namespace, uid=owner.uid)
    )
    return _demand(Demand(application, owner.uid, about), pod.metadata.annotations, families, pods=None, spare=0)


def _demand(
    nothing: Demand, annotations: Mapping[str, str], families: Collection[Family], *, pods: int | None, spare: int
) -> Demand:
    """`nothing` with the wishes that the annotations express; `pods` is None if nobody knows how many there will be."""
    try:
        asked, number, reclaim = subnets(annotations), ip_number(annotations), ippool_reclaim(annotations)
    except AnnotationError as error:
        return replace(nothing, problem=str(error))
    application = nothing.application
    if pods is None and (number is None or number.flexible):
        text = f"{application.kind} of {application.api_version} only supports fixed auto-created IPPool IP Number"
        return replace(nothing, problem=f"{text}: how many pods it is to have is not known")
    size = desired_number(number, pods or 0, spare=spare)
    text = number_text(number, spare=spare)
    wishes = []
    for item in asked.items if asked else ():
        named: tuple[tuple[Family, str], ...] = ((4, item.ipv4), (6, item.ipv6))
        wishes += [
            Wish(application, nothing.uid, family, item.interface, subnet, size, text, reclaim)
            for family, subnet in named
            if subnet and family in families
        ]
    return replace(nothing, wishes=tuple(wishes))


@lru_cache(maxsize=128)
def third_party_kind(api_version: str, kind: str) -> type[Resource]:
    """A kind that is known by name alone: objects can be asked for and be what events are about.

    The plural is the regular one; if that is wrong the API server says that it does not serve the kind.
    """
    group, _, version = api_version.rpartition("/")
    small = kind.lower()
    if small.endswith(("s", "x", "z", "ch", "sh")):
        plural = f"{small}es"
    elif small.endswith("y") and small[-2:-1] not in set("aeiou"):
        plural = f"{small[:-1]}ies"
    else:
        plural = f"{small}s"
    called = Kind(group, version, kind, plural, namespaced=True, partial=True)
    made = msgspec.defstruct(kind, [], bases=(Resource,), namespace={"TYPE": called}, frozen=True, kw_only=True)
    return cast(type[Resource], made)
