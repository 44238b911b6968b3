"""Settings that every daemon has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LogSettings:
    """Logs go to standard error, one JSON object a line."""

    level: str = "info"
    """Least important messages to write: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if self.level.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError(f"level is {self.level!r}; it must be debug, info, warning or error")


@dataclass(frozen=True)
class HealthSettings:
    """The HTTP servers for health checks and metrics. Addresses are the local machine's unless set otherwise: nothing
    listens to the network that was not asked to."""

    host: str = "127.0.0.1"
    """Address for /v1/runtime/startup, /v1/runtime/readiness and /v1/runtime/liveness; empty: all addresses."""
    port: int = 5710
    """Its TCP port; 0: no health server."""
    metrics_host: str = "127.0.0.1"
    """Address for /metrics; empty: all addresses, for a Prometheus elsewhere."""
    metrics_port: int = 5711
    """Its TCP port; 0: no metrics server."""

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if not 0 <= port <= 65535:
                raise ValueError(f"{name} is {port}; it must be between 0 and 65535")
