"""Settings of probing."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.limits import at_least


@dataclass(frozen=True)
class ProbeSettings:
    """How long probing waits, and how often it asks. Raises ValueError for a value that makes no sense."""

    wait: float = 0.1
    """Seconds of silence after which an address is free. An answer ends it early. Upstream waits as long; a host on the
    segment answers within a millisecond, so this is time for a busy one."""
    frames: int = 3
    """Frames that ask for one address, spread over the first half of the wait. One alone would take a single lost frame
    for silence."""
    gateway_wait: float = 0.3
    """Seconds until a silent gateway counts as unreachable. It is longer than `wait` because only a dead gateway costs
    it, and a false alarm fails the pod; routers answer ARP on a slow path, often rate limited."""
    gateway_frames: int = 3
    """Frames that ask for a gateway, spread over the first half of its wait."""
    up_wait: float = 2.0
    """Seconds until a NIC that was set up must be operational: drivers of real NICs take up to a second for a virtual
    function's carrier; macvlan and veth take a millisecond."""
    nics: int = 128
    """NICs probed at once, those whose sockets are still being closed included; more wait, within `up_wait`. It bounds
    file descriptors at two for each."""

    def __post_init__(self) -> None:
        at_least(0.001, wait=self.wait, gateway_wait=self.gateway_wait, up_wait=self.up_wait)
        at_least(1, frames=self.frames, gateway_frames=self.gateway_frames, nics=self.nics)
