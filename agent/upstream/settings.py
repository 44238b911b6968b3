"""What an operator may set about upstream's API."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

from daemon.limits import at_least
from daemon.upstream import upstream

SOCKET: Final = "/var/run/spidernet/spiderpool.sock"
"""Where upstream's executables look for their agent."""


@dataclass(frozen=True)
class UpstreamSettings:
    """Upstream's HTTP API, for its CNI executables that are still on the node. Times are in seconds."""

    socket: str = field(default="auto", metadata=upstream(key="ipamUnixSocketPath"))
    """Path of the socket; empty: the API is not served. `auto`: `/var/run/spidernet/spiderpool.sock` where the store is
    Kubernetes and nothing otherwise, since there are no such executables without Kubernetes."""
    release_conflict_ips: bool = field(
        default=True, metadata=upstream(variable="SPIDERPOOL_ENABLED_RELEASE_CONFLICT_IPS")
    )
    """Whether an executable may ask for the release of a stateless pod's addresses since somebody else uses them; else
    it is refused with status 521. It is as a DEL: a pod that is alive keeps them, and our own probe has it move with
    its next sandbox."""
    connections: int = 576
    """How many executables may be connected at the same time; further ones are hung up on. As many as may call by
    the other socket."""
    read_deadline: float = 5.0
    """How long a caller may take to send its request."""

    def __post_init__(self) -> None:
        at_least(1, connections=self.connections)
        at_least(0.01, read_deadline=self.read_deadline)
        if len(os.fsencode(self.socket)) > 100:
            raise ValueError(f"socket is {self.socket!r}; the kernel takes paths of at most 100 bytes")

    def path(self, store_kind: str) -> str:
        """The socket to serve with that kind of store; empty for none."""
        if self.socket != "auto":
            return self.socket
        return SOCKET if store_kind == "kubernetes" else ""
