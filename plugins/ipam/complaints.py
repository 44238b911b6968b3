"""Events on pods that get no address: `kubectl describe pod` tells why, pool by pool."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from api.core import Pod
from plugins.errors import (
    AddressConflictError,
    CniError,
    ExhaustedError,
    GatewayUnreachableError,
    InvalidConfigError,
    NoPoolError,
    ProviderError,
    TryAgainLaterError,
)
from store.recorder import Recorder

REASONS: tuple[tuple[type[CniError], str], ...] = (
    (NoPoolError, "NoPoolAvailable"),
    (ExhaustedError, "AddressesExhausted"),
    (AddressConflictError, "AddressConflict"),
    (GatewayUnreachableError, "GatewayUnreachable"),
    (InvalidConfigError, "InvalidAddressRequest"),
    (ProviderError, "ProviderFailed"),
    (TryAgainLaterError, "AddressDelayed"),
)
"""What a user or administrator can do something about. Faults of ours are in the log."""

_SAME_POD_SECONDS = 30.0
"""Between two events of one reason on one pod and NIC: kubelet tries again for as long as the pod exists, and the texts
differ by who holds what at the moment, so that equal ones are not enough to go by."""
_BURST = 64
"""Events that a node may write at once: half of its pods."""
_PER_SECOND = 1.0
"""And so many more in a second for as long as it goes on: many nodes share one API server."""
_REMEMBERED = 1024


class Complaints:
    """Tells of failed ADDs. `run` must be running for any event to be written."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._told: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        """(uid, NIC, reason) to the time after which it may be told again."""
        self._allowed = float(_BURST)
        self._counted = 0.0

    async def run(self) -> None:
        """Write until cancelled."""
        await self._recorder.run()

    def about(self, pod: Pod, nic: str, error: CniError) -> None:
        """`pod` did not get what `nic` needs, unless that has just been told."""
        reason = next((reason for kind, reason in REASONS if isinstance(error, kind)), "")
        now = asyncio.get_running_loop().time()
        key = (pod.metadata.uid, nic, reason)
        if not reason or now < self._told.get(key, 0.0) or not self._may(now):
            return
        self._told[key] = now + _SAME_POD_SECONDS
        self._told.move_to_end(key)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        self._recorder.warning(pod, reason, f"NIC {nic}: {error}")

    def _may(self, now: float) -> bool:
        """Whether the node may write one more event now."""
        self._allowed = min(_BURST, self._allowed + (now - self._counted) * _PER_SECOND)
        self._counted = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True
