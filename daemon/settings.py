"""Settings that every daemon has."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.logs import LEVELS
from daemon.upstream import upstream


def _listen_to(enabled: str) -> str:
    """Upstream's metrics, once asked for, are there for a Prometheus anywhere."""
    return "" if enabled.lower() in ("true", "t", "1") else "127.0.0.1"


@dataclass(frozen=True)
class LogSettings:
    """Logs go to standard error, one JSON object a line."""

    level: str = "info"
    """Least important messages to write: debug, info, warning (or warn), error, fatal (or panic)."""

    def __post_init__(self) -> None:
        if self.level.lower() not in LEVELS:
            raise ValueError(f"level is {self.level!r}; it must be one of {', '.join(LEVELS)}")


@dataclass(frozen=True)
class HealthSettings:
    """The HTTP servers for health checks and metrics. Addresses are the local machine's unless set otherwise: nothing
    listens to the network that was not asked to."""

    host: str = "127.0.0.1"
    """Address for /v1/runtime/startup, /v1/runtime/readiness and /v1/runtime/liveness; empty: all addresses."""
    port: int = 5710
    """Its TCP port; 0: no health server."""
    metrics_enabled: bool = field(default=True, metadata=upstream(variable="SPIDERPOOL_ENABLED_METRIC"))
    """Serve metrics at all."""
    metrics_host: str = field(
        default="127.0.0.1", metadata=upstream(variable="SPIDERPOOL_ENABLED_METRIC", translate=_listen_to)
    )
    """Address for /metrics; empty: all addresses, for a Prometheus elsewhere. Upstream's variable, if true, means
    all."""
    metrics_port: int = field(default=5711, metadata=upstream(variable="SPIDERPOOL_METRIC_HTTP_PORT", required=True))
    """Its TCP port; 0: no metrics server."""

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if not 0 <= port <= 65535:
                raise ValueError(f"{name} is {port}; it must be between 0 and 65535")
