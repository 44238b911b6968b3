"""Pods that a kubelet runs on its own account, from files ("static pods"), and only mirrors in the API. Pure.

Such a pod is known by two UIDs. Its kubelet gives it one, a hash of the file where the file names none, and tells the
runtime that one (K8S_POD_UID of CNI_ARGS). The object in the API gets another and carries the first as an annotation.
Who deletes the object ends nothing: the kubelet makes another, with a new UID, as soon as the API server lets it, while
the containers go on. So claims name the first; and whether they go on without an object, only their node can tell.

Source: Kubernetes 1.35, pkg/kubelet/config/common.go (applyDefaults), pkg/kubelet/pod/mirror_client.go.
"""

from __future__ import annotations

from api.claim import Claim, Controller
from api.core import Node, Pod

MIRROR = "kubernetes.io/config.mirror"
"""Annotation: the UID that the kubelet knows the pod by. The API server lets nobody add, change or remove it later."""


def is_mirror(pod: Pod) -> bool:
    """Whether the object only mirrors a pod that its kubelet runs from a file."""
    return MIRROR in pod.metadata.annotations


def uid_on_node(pod: Pod) -> str:
    """The UID by which kubelet, runtime and claims know the pod."""
    return pod.metadata.annotations.get(MIRROR) or pod.metadata.uid


def is_mirrored(claim: Claim) -> bool:
    """Whether the claim is of a pod that the API only mirrors: those belong to their node, as no others do."""
    controller = claim.spec.workload.controller if claim.spec.workload is not None else None
    return controller is not None and is_node(controller)


def is_node(controller: Controller) -> bool:
    """Whether it is a Node, to whose kubelet the pod belongs."""
    return (controller.api_version, controller.kind) == (Node.TYPE.api_version, Node.TYPE.kind)


def is_pod_of(pod: Pod, claim: Claim) -> bool:
    """Whether the claim names this pod.

    A mirror counts under its name alone: the annotation is what its maker says, who may be anybody with the right to
    make pods in that namespace, and a file may give pods of several nodes the same UID.
    """
    if uid_on_node(pod) != claim.spec.pod_uid:
        return False
    workload = claim.spec.workload
    named = (workload.namespace, workload.pod_name) if workload is not None else ("", "")
    return not is_mirror(pod) or named == (pod.metadata.namespace, pod.metadata.name)
