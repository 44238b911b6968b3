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


NOTHING: Final = Upstream()


def upstream(
    *,
    key: str | tuple[str, ...] = (),
    variable: str | tuple[str, ...] = (),
    required: bool = False,
    translate: Callable[[str], str] | None = None,
) -> Mapping[str, Any]:
    """Metadata for a dataclass field; the members are `Upstream`'s."""
    keys = (key,) if isinstance(key, str) else key
    variables = (variable,) if isinstance(variable, str) else variable
    return {_METADATA: Upstream(keys, variables, required, translate)}


def names_of(metadata: Mapping[str, Any]) -> Upstream:
    """What a field's metadata says; `NOTHING` if it says nothing."""
    found = metadata.get(_METADATA, NOTHING)
    assert isinstance(found, Upstream)  # noqa: S101 (only `upstream` makes it)
    return found


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
