"""Third parties' controllers: known by the pods that name them and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from api.autopools import Application
from api.core import Pod
from api.meta import OwnerReference
from api.ranges import Family
from controller.subnets.demand import Demand, owner_of, third_party_demand


class ThirdParties:
    """Applications by their pods, as the cache of pods has them."""

    def __init__(self) -> None:
        self._pods: dict[Application, dict[str, tuple[Pod, OwnerReference]]] = defaultdict(dict)

    def changed(self, old: Pod | None, new: Pod | None) -> Iterator[Application]:
        """Take in a change of the cache; the applications that it concerns."""
        before, after = _member(old), _member(new)
        if before is not None and old is not None and before != after:
            self._drop(before[0], old)
            yield before[0]
        if after is not None and new is not None:
            application, owner = after
            known = self._pods[application].get(new.metadata.uid)
            self._pods[application][new.metadata.uid] = (new, owner)
            if known is None or known[0].metadata.annotations != new.metadata.annotations:
                yield application

    def demand(self, application: Application, families: Collection[Family]) -> Demand | None:
        """What the youngest of its pods asks for; None if it has none."""
        pods = self._pods.get(application)
        if not pods:
            return None
        pod, owner = max(pods.values(), key=lambda each: (each[0].metadata.creation_timestamp, each[0].metadata.uid))
        return third_party_demand(pod, owner, families)

    def _drop(self, application: Application, pod: Pod) -> None:
        pods = self._pods.get(application, {})
        pods.pop(pod.metadata.uid, None)
        if not pods:
            self._pods.pop(application, None)


def _member(pod: Pod | None) -> tuple[Application, OwnerReference] | None:
    owner = owner_of(pod) if pod is not None else None
    if pod is None or owner is None:
        return None
    return Application(owner.api_version, owner.kind, pod.metadata.namespace, owner.name), owner
