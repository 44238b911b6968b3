"""Pods that are gone and whose containers may go on for a while: a pod can be removed by force."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from api.claim import Claim
from api.core import Pod
from api.reclaim import Switches, outlived_until


class Absences:
    """Until when that may be, by the pod's UID. In memory: a leader that comes later waits for the delay anew."""

    def __init__(self, switches: Switches) -> None:
        self._switches = switches
        self._until: dict[str, datetime] = {}

    def left(self, pod: Pod, moment: datetime) -> None:
        """The pod has just gone; `pod` is the last that was seen of it."""
        self._until[pod.metadata.uid] = outlived_until(pod, self._switches, moment)

    def forget(self, uid: str) -> None:
        """The pod is there, or it has no claims any more."""
        self._until.pop(uid, None)

    def forget_old(self, moment: datetime, has_claims: Callable[[str], bool]) -> None:
        """Forget pods that nobody asks for any more. A claim may be heard of later than the end of its pod."""
        over = [uid for uid, until in self._until.items() if until < moment and not has_claims(uid)]
        for uid in over:
            del self._until[uid]

    def until(self, claim: Claim, moment: datetime) -> datetime | None:
        """Until when containers of the claim's pod may go on, which is not there; None if it never had one."""
        if not claim.spec.pod_uid:
            return None
        return self._until.setdefault(claim.spec.pod_uid, moment + self._switches.delay)
