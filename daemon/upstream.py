"""Upstream's names for our settings: keys of its `conf.yml`, and its environment variables.

A setting tells them where it is defined, in its field's metadata, and `daemon.sources` does the rest (precedence,
errors, the reference page):

    enable_ipv4: bool = field(default=True, metadata=upstream(key="enableIPv4"))
    workers: int = field(default=3, metadata=upstream(variable="SPIDERPOOL_GC_IP_WORKER_NUM", required=True))

Several settings may name the same key or variable. Where our own variable happens to be upstream's (`log.level` is
SPIDERPOOL_LOG_LEVEL), nothing needs to be said.
Source: upstream docs/reference/configmap.md, spiderpool-agent.md, spiderpool-controller.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

CONF_PATH: Final = "/tmp/spiderpool/config-map/conf.yml"  # noqa: S108 (upstream's; see `trusted`)
"""Where upstream's pods have their configuration."""
COMMAND: Final = "daemon"
"""Upstream's sub-command; who gives it has upstream's command line, and so `CONF_PATH`."""

CONF_KEYS: Final = frozenset(
    {
        "ipamUnixSocketPath",
        "enableIPv4",
        "enableIPv6",
        "enableStatefulSet",
        "enableKubevirtStaticIP",
        "enableSpiderSubnet",
        "enableAutoPoolForApplication",
        "enableIPConflictDetection",
        "enableGatewayDetection",
        "enableCleanOutdatedEndpoint",
        "enableValidatingResourcesDeletedWebhook",
        "tuneSysctlConfig",
        "clusterSubnetAutoPoolDefaultRedundantIPNumber",
        "clusterSubnetDefaultFlexibleIPNumber",
        "podResourceInject.enabled",
        "podResourceInject.namespacesExclude",
        "podResourceInject.namespacesInclude",
        "iaasNetworkProvider.serverUrl",
        "iaasNetworkProvider.httpRequestTimeout",
        "agent.networkResourcePlugin",
    }
)
"""All keys of the file, which agent and controller share: what one of them has no setting for is the other's."""

_QUEUES: Final = "events lead to keys, which wait once each and are tried again without end"
WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "SPIDERPOOL_AUTO_IPPOOL_HANDLER_MAX_WORKQUEUE_LENGTH": _QUEUES,
    "SPIDERPOOL_ENABLED_DEBUG_METRIC": "all metrics are served where metrics are",
    "SPIDERPOOL_ENABLED_RDMA_METRIC": "there are no metrics of RDMA devices yet",
    "SPIDERPOOL_GC_CHANNEL_BUFFER": _QUEUES,
    "SPIDERPOOL_GC_HTTP_REQUEST_TIME_GAP": "`spiderpoolctl gc` asks by an annotation, not by HTTP",
    "SPIDERPOOL_GC_MAX_PODENTRY_DB_CAP": "no trace of pods is kept beside the cache of all pods",
    "SPIDERPOOL_GC_PODENTRY_MAX_RETRIES": _QUEUES,
    "SPIDERPOOL_GC_SIGNAL_TIMEOUT_DURATION": "a scan that is asked for is never dropped",
    "SPIDERPOOL_GC_TRACE_POD_GAP_DURATION": "each pod is looked at when its time is over",
    "SPIDERPOOL_GOPS_LISTEN_PORT": "there is no gops of a program that is not Go's",
    "SPIDERPOOL_IPPOOL_INFORMER_RESYNC_PERIOD": "changes are watched, and lists made again when a watch is lost",
    "SPIDERPOOL_IPPOOL_INFORMER_WORKERS": "pools' status goes by `status.rate`",
    "SPIDERPOOL_IPPOOL_MAX_ALLOCATED_IPS": "pools have no limit; above 5000 `status.allocatedIPs` is left out",
    "SPIDERPOOL_LEADER_RETRY_GAP": "nobody polls who leads",
    "SPIDERPOOL_METRIC_RENEW_PERIOD": "gauges follow every change",
    "SPIDERPOOL_PYROSCOPE_PUSH_SERVER_ADDRESS": "there is no such profiler",
    "SPIDERPOOL_SUBNET_INFORMER_MAX_WORKQUEUE_LENGTH": _QUEUES,
    "SPIDERPOOL_SUBNET_INFORMER_RESYNC_PERIOD": "as for pools",
    "SPIDERPOOL_SUBNET_INFORMER_WORKERS": "`subnets.workers` serves subnets and applications",
    "SPIDERPOOL_UPDATE_CR_MAX_RETRIES": "it has none in upstream either",
    "SPIDERPOOL_WORKLOADENDPOINT_MAX_HISTORY_RECORDS": "it has none in upstream either",
    "SPIDERPOOL_WORKQUEUE_MAX_RETRIES": _QUEUES,
    "SPIDERPOOL_WORKQUEUE_RETRY_DELAY_DURATION": "pauses grow, from a fraction of a second",
}
"""Upstream's variables that are accepted and do nothing, and why."""

_METADATA: Final = "upstream"
_GO_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Upstream:
    """How upstream calls one setting."""

    keys: tuple[str, ...] = ()
    """Paths in conf.yml, as `iaasNetworkProvider.serverUrl`; the first that is there counts."""
    variables: tuple[str, ...] = ()
    """Environment variables; the first that is there counts."""
    required: bool = False
    """A variable that is there must not be empty; otherwise an empty one is the same as none."""
    translate: Callable[[str], str] | None = None
    """Turns upstream's spelling of a value into ours. Raises ValueError."""
    factors: tuple[tuple[str, int], ...] = ()
    """Variables whose product is the setting, each with upstream's default, as of tries and the time between two."""


NOTHING: Final = Upstream()


def upstream(
    *,
    key: str | tuple[str, ...] = (),
    variable: str | tuple[str, ...] = (),
    required: bool = False,
    translate: Callable[[str], str] | None = None,
    factors: tuple[tuple[str, int], ...] = (),
) -> Mapping[str, Any]:
    """Metadata for a dataclass field; the members are `Upstream`'s."""
    keys = (key,) if isinstance(key, str) else key
    variables = (variable,) if isinstance(variable, str) else variable
    return {_METADATA: Upstream(keys, variables, required, translate, factors)}


def names_of(metadata: Mapping[str, Any]) -> Upstream:
    """What a field's metadata says; `NOTHING` if it says nothing."""
    found = metadata.get(_METADATA, NOTHING)
    assert isinstance(found, Upstream)  # noqa: S101 (only `upstream` makes it)
    return found


def product(factors: tuple[tuple[str, int], ...], environ: Mapping[str, str]) -> str | None:
    """The product of the variables, if one of them is there. Raises ValueError naming the one that is no number."""
    given = {name: environ.get(name, "").strip() for name, _ in factors}
    if not any(given.values()):
        return None
    result = 1
    for name, default in factors:
        text = given[name] or str(default)
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name}: {text!r} is not a number of at least 0")
        result *= int(text)
    return str(result)


def seconds(text: str) -> str:
    """A duration as Go writes it (`50s`, `1m30s`) in seconds, for a setting that is a number. Raises ValueError.

    Source: Go's time.ParseDuration; negative ones are refused.
    """
    parts = _GO_DURATION.findall(text)
    if text == "0":
        return "0"
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 50s or 1m30s")
    return str(sum(float(number) * _UNITS[unit] for number, unit in parts))


def flatten(document: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of conf.yml by path; null is absent, as Go's decoder has it."""
    for name, value in document.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and path not in CONF_KEYS:
            yield from flatten(value, f"{path}.")
        elif value is not None:
            yield path, value


def trusted(path: str) -> bool:
    """Whether nobody but root and ourselves can have put the file there, which matters below /tmp.

    Kubelet mounts it with root's ownership, so that no drop-in suffers.
    """
    try:
        owners = {
            os.stat(place).st_uid for place in (path, os.path.dirname(path), os.path.dirname(os.path.dirname(path)))
        }
    except OSError:
        return False
    return owners <= {0, os.geteuid()}
