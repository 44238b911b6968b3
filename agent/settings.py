"""All settings of the agent: one frozen dataclass for each room. `daemon.sources` tells where values come from.

`docs/settings.md` is generated from the docstrings here and in the rooms:

    python -m agent.settings --markdown     print the page
    python -m agent.settings --check        compare it with docs/settings.md
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field

from agent.collector import CollectorSettings
from agent.dataplane.settings import DataplaneSettings
from agent.recheck import RecheckSettings
from agent.upstream.settings import UpstreamSettings
from daemon.limits import at_least
from daemon.settings import HealthSettings, LogSettings
from daemon.sources import Sources
from plugins.coordinator.probe.settings import ProbeSettings
from plugins.coordinator.settings import CoordinatorSettings
from plugins.ifacer.settings import IfacerSettings
from plugins.ipam.settings import IpamSettings
from store.open import StoreSettings
from store.provider import ProviderSettings

EXECUTABLE_DEADLINE = 115.0
"""Seconds that the CNI executables wait for us (OVERALL_MS in plugins/shim)."""


@dataclass(frozen=True)
class NodeSettings:
    """Which node this is."""

    name: str = ""
    """Name of the node, written into claims and endpoints; in a cluster the Kubernetes node name. Empty: the host
    name."""

    def resolve(self) -> str:
        """The name to use."""
        return self.name or socket.gethostname()


@dataclass(frozen=True)
class ServerSettings:
    """The Unix socket that the CNI executables call. Times are in seconds."""

    socket: str = "/var/run/spidernet/cni.sock"
    """Path of the socket; the executables have it from `.spiderpool.paths` beside them, or this default built in."""
    concurrency: int = 64
    """How many calls execute at the same time. More only compete for the kernel's RTNL lock."""
    waiting: int = 512
    """How many calls may wait for a free place; further ones are told at once to try again later. About two nodes
    full of pods: a reboot's storm fits, memory stays bounded."""
    read_deadline: float = 5.0
    """How long a caller may take to send its request, which a local process does in a millisecond."""
    add_deadline: float = 60.0
    """How long one ADD may take, waiting included; then it is rolled back, for which IPAM has `ipam.rollback_deadline`
    more. Together at most the 115 s of the executable, below the two minutes of common runtimes: the caller reads our
    error and not its own, and what it does next finds the ADD undone."""
    deadline: float = 30.0
    """The same for DEL, CHECK, STATUS and GC."""
    stop_patience: float = 15.0
    """How long calls that execute may go on when the agent is asked to stop. Half of the 30 s after which Kubernetes
    kills."""

    def __post_init__(self) -> None:
        at_least(1, concurrency=self.concurrency)
        at_least(0, waiting=self.waiting, stop_patience=self.stop_patience)
        at_least(0.01, read_deadline=self.read_deadline, add_deadline=self.add_deadline, deadline=self.deadline)
        if len(os.fsencode(self.socket)) > 100:
            raise ValueError(f"socket is {self.socket!r}; the kernel takes paths of at most 100 bytes")


@dataclass(frozen=True)
class QueueSettings:
    """The directory where the CNI executables leave deletions while there is no agent. Times are in seconds."""

    directory: str = "/var/lib/spidernet/queue"
    """Path of the queue; the executables know it as they know the socket."""
    concurrency: int = 8
    """How many containers' deletions are replayed at the same time."""
    wait: float = 20.0
    """How long an ADD or CHECK waits for the deletions queued before it; then the runtime is asked to try again."""
    attempts: int = 8
    """How often one deletion is tried before it is moved to the folder `failed`. With the pauses between, a minute."""
    backoff: float = 30.0
    """Longest pause between two attempts; the first pause is half a second, each further one twice as long."""
    keep_failed: int = 100
    """How many files the folder `failed` keeps; the oldest go."""

    def __post_init__(self) -> None:
        at_least(1, concurrency=self.concurrency, attempts=self.attempts, keep_failed=self.keep_failed)
        at_least(0, wait=self.wait, backoff=self.backoff)


@dataclass(frozen=True)
class Settings:
    """Everything, by room."""

    node: NodeSettings = field(default_factory=NodeSettings)
    log: LogSettings = field(default_factory=LogSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    ipam: IpamSettings = field(default_factory=IpamSettings)
    provider: ProviderSettings = field(default_factory=ProviderSettings)
    coordinator: CoordinatorSettings = field(default_factory=CoordinatorSettings)
    ifacer: IfacerSettings = field(default_factory=IfacerSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    recheck: RecheckSettings = field(default_factory=RecheckSettings)
    collector: CollectorSettings = field(default_factory=CollectorSettings)
    dataplane: DataplaneSettings = field(default_factory=DataplaneSettings)

    def __post_init__(self) -> None:
        server, ipam = self.server, self.ipam
        if ipam.add_deadline >= server.add_deadline:
            raise ValueError(
                f"ipam.add_deadline is {ipam.add_deadline:g}; it must be less than server.add_deadline, "
                f"{server.add_deadline:g}, or nobody is told what an ADD waited for"
            )
        longest = server.add_deadline + ipam.rollback_deadline
        if longest > EXECUTABLE_DEADLINE:
            raise ValueError(
                f"server.add_deadline and ipam.rollback_deadline are {longest:g} together; they must be at most "
                f"{EXECUTABLE_DEADLINE:g}, when the executable gives up, or the runtime goes on before an ADD is undone"
            )


SOURCES = Sources(Settings, "spiderpool-agent", "Spiderpool's node daemon.", "agent.settings", "settings.md")
"""Where they come from."""

if __name__ == "__main__":
    sys.exit(SOURCES.main(sys.argv[1:]))
