"""What becomes of a claim whose container goes: whether its pod, or the pod's successor, still needs the address."""

from __future__ import annotations

from api.claim import Claim
from api.core import Pod
from api.meta import R
from api.mirror import is_pod_of
from api.reclaim import Switches, is_static, workload_key
from api.workloads import is_alive, judges_of, will_have_again
from plugins.ipam.settings import IpamSettings
from store.errors import NotFoundError
from store.port import Store


class Fates:
    """Judges claims for one DEL or GC: every object is read once, from the store and no cache.

    A DEL does not say why it comes. kubelet takes a sandbox down when the pod goes, but also to make another for the
    same pod, and after an ADD that failed. So the pod decides: as long as it is alive its addresses stay, and its next
    ADD finds them by its UID. If no next ADD comes, the DEL that follows the pod's deletion releases them, or garbage
    collection when there was no sandbox any more.
    """

    def __init__(self, store: Store, settings: IpamSettings) -> None:
        self._store = store
        self._switches = Switches(
            stateful_sets=settings.enable_statefulset, virtual_machines=settings.enable_kubevirt_static_ip
        )
        self._read: dict[tuple[str, str, str], object] = {}

    async def reason_to_keep(self, claim: Claim) -> str:
        """Why the claim stays, for people; empty if nobody needs the address. Raises StoreError."""
        spec = claim.spec
        workload = spec.workload
        if workload is None or not spec.pod_uid:
            return ""
        namespace, name = workload.namespace, workload.pod_name
        pod = await self._get(Pod, name, namespace)
        if pod is not None and is_pod_of(pod, claim) and is_alive(pod):
            return f"pod {namespace}/{name} is alive"
        key = workload_key(claim)
        if key is None or not is_static(claim, self._switches):
            return ""
        _, kind, above = key
        judges = [await self._get(each, above, namespace) for each in judges_of(kind)]
        if will_have_again(name, judges, spec.node):
            return f"{kind} {namespace}/{above} will have pod {name} again"
        return ""

    async def _get(self, kind: type[R], name: str, namespace: str) -> R | None:
        key = (kind.TYPE.kind, namespace, name)
        if key not in self._read:
            try:
                self._read[key] = await self._store.get(kind, name, namespace)
            except NotFoundError:
                self._read[key] = None
        found = self._read[key]
        return found if isinstance(found, kind) else None
