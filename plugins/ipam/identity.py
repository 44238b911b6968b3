"""Who asks: the pod behind a call, and its NICs. Pure."""

from __future__ import annotations

from dataclasses import replace

from api.annotations import FIRST_NIC, AnnotationError, networks
from api.claim import Workload
from api.mirror import uid_on_node
from plugins.ipam.config import Request
from plugins.ipam.pods import PodFacts


def of_pod(request: Request, facts: PodFacts | None) -> Request:
    """The request with what is known of the pod, whose UID is the one that CNI names it by."""
    if facts is None:
        return request
    meta = facts.pod.metadata
    workload = Workload(
        namespace=meta.namespace,
        name=facts.static or meta.name,
        pod=meta.name if facts.static not in ("", meta.name) else "",
        controller=facts.controller,
    )
    return replace(request, pod_uid=request.pod_uid or uid_on_node(facts.pod), workload=workload, facts=facts)


def last_nic(facts: PodFacts | None) -> str:
    """Name of the pod's NIC that is made last; empty if that cannot be told."""
    if facts is None:
        return ""
    meta = facts.pod.metadata
    try:
        further = networks(meta.annotations, meta.namespace)
    except AnnotationError:
        return ""
    return (further[-1].interface or f"net{len(further)}") if further else FIRST_NIC
