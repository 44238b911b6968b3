"""What can be set about the dataplane."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.limits import at_least

_MOST = 1 << 26
"""Entries of a map: more than any cluster has, and the kernel's memory for it still fits its arithmetic."""


@dataclass(frozen=True, slots=True)
class DataplaneSettings:
    """Socket hooks for services, their maps, and how they are loaded."""

    enabled: bool = True
    """Whether this agent serves ClusterIP services. Off where kube-proxy or another load balancer does it."""

    cgroup: str = ""
    """Path of the cgroup v2 directory whose processes are served, descendants included.

    Empty: where cgroup2 is mounted, so every process of the node. A lab names one cgroup per node.
    """

    bpffs: str = "/sys/fs/bpf"
    """Directory of a BPF file system that holds the pins, below `spiderpool/`. Mounted if nothing is mounted there."""

    max_services: int = 65536
    """Most frontends (address, port and protocol); 16 bytes of kernel memory each, used or not, and 100 when used."""

    max_backends: int = 262144
    """Most backends, counted once per frontend that they serve; 32 bytes each, used or not, and 200 when used."""

    max_udp_flows: int = 65536
    """UDP conversations remembered of sockets that have several; about 260 bytes each, allocated at once.

    The conversation that a socket used last is kept with the socket. Beyond this number the least recently used are
    forgotten: their next datagram may go to another backend, an answer may come from the backend's own address.
    """

    headers_cache: str = "/var/cache/spiderpool/headers"
    """Directory for the header tree that BCC compiles with. Writable by root alone, since it is compiled in."""

    loader_deadline: float = 60.0
    """Seconds until a loader that has not ended is killed. It takes about half a second on an idle machine."""

    drift_period: float = 60.0
    """Seconds between comparisons of maps and hooks with what they should be, and the longest pause between retries."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("max_services", "max_backends", "max_udp_flows")}
        at_least(1, **sizes)
        for name, size in sizes.items():
            if size > _MOST:
                raise ValueError(f"{name} is {size}; it must be at most {_MOST}")
        at_least(0.01, loader_deadline=self.loader_deadline)
        at_least(0.1, drift_period=self.drift_period)
