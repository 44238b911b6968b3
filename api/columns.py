"""What a table of each kind shows: the printer columns of the CRDs, which `spiderpoolctl get` prints as well."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

WIDE = 10
"""Priority of columns that only a wide table shows (above 0, as in additionalPrinterColumns)."""


class Column(NamedTuple):
    """One entry of additionalPrinterColumns."""

    name: str
    json_path: str
    """The subset of JSONPath that CRDs allow: members, `['quoted\\.member']`, `[index]`, `[*]` and
    `[?(@.member=="text")]`."""
    type: str = "string"
    description: str = ""
    priority: int = 0


AGE = Column("AGE", ".metadata.creationTimestamp", "date", "Time since the creation.")

COLUMNS: dict[str, tuple[Column, ...]] = {
    "SpiderIPPool": (
        Column("VERSION", ".spec.ipVersion", description="Address family."),
        Column("SUBNET", ".spec.subnet", description="Network of the addresses."),
        Column("ALLOCATED-IP-COUNT", ".status.allocatedIPCount", "integer", "Addresses claimed."),
        Column("TOTAL-IP-COUNT", ".status.totalIPCount", "integer", "Addresses in all."),
        Column("DEFAULT", ".spec.default", "boolean", "Used by pods that name no pool."),
        Column("DISABLE", ".spec.disable", "boolean", "No new allocations.", WIDE),
        Column("NodeName", ".spec.nodeName", description="Nodes that may use the pool.", priority=WIDE),
        Column("MultusName", ".spec.multusName", description="Networks that may use the pool.", priority=WIDE),
        Column(
            "APP-NAMESPACE",
            r".spec.podAffinity.matchLabels['ipam\.spidernet\.io/app\-namespace']",
            description="Namespace of the application that the pool was made for.",
            priority=WIDE,
        ),
        Column(
            "READY",
            '.status.conditions[?(@.type=="Ready")].reason',
            description="Whether pods can get addresses of it: Usable, or why not.",
            priority=WIDE,
        ),
    ),
    "SpiderSubnet": (
        Column("VERSION", ".spec.ipVersion", description="Address family."),
        Column("SUBNET", ".spec.subnet", description="Network of the addresses."),
        Column("ALLOCATED-IP-COUNT", ".status.allocatedIPCount", "integer", "Addresses given to pools."),
        Column("TOTAL-IP-COUNT", ".status.totalIPCount", "integer", "Addresses in all."),
        Column(
            "READY",
            '.status.conditions[?(@.type=="Ready")].reason',
            description="Whether pools are cut from it: Usable, or why not.",
            priority=WIDE,
        ),
    ),
    "SpiderReservedIP": (Column("VERSION", ".spec.ipVersion", description="Address family."),),
    "SpiderEndpoint": (
        Column("INTERFACE", ".status.current.ips[0].interface", description="First NIC."),
        Column("IPV4POOL", ".status.current.ips[0].ipv4Pool", description="Pool of its IPv4 address."),
        Column("IPV4", ".status.current.ips[0].ipv4", description="Its IPv4 address."),
        Column("IPV6POOL", ".status.current.ips[0].ipv6Pool", description="Pool of its IPv6 address."),
        Column("IPV6", ".status.current.ips[0].ipv6", description="Its IPv6 address."),
        Column("NODE", ".status.current.node", description="Node of the pod."),
    ),
    "SpiderIPClaim": (
        Column("ADDRESS", ".spec.address", description="The address."),
        Column("POOL", ".spec.pool", description="Pool that it was chosen from."),
        Column("STATE", ".spec.state", description="Allocated or Quarantined."),
        Column("NAMESPACE", ".spec.workload.namespace", description="Namespace of the pod."),
        Column("POD", ".spec.workload.name", description="The pod."),
        Column("NIC", ".spec.nic", description="Interface in the pod."),
        Column("NODE", ".spec.node", description="Node of the pod."),
        AGE,
        Column("CONTAINER", ".spec.containerID", description="Sandbox container.", priority=WIDE),
        Column("REASON", ".spec.quarantine.reason", description="Why it is quarantined.", priority=WIDE),
    ),
    "SpiderCoordinator": (
        Column("MODE", ".spec.mode", description="How pods reach their node."),
        Column("PODCIDRTYPE", ".spec.podCIDRType", description="Where overlay networks are found out from."),
        Column("PHASE", ".status.phase", description="Synced, or NotReady: then no pod is attached."),
        AGE,
        Column("REASON", ".status.reason", description="Why it is not ready.", priority=WIDE),
    ),
    "SpiderMultusConfig": (
        Column("TYPE", ".spec.cniType", description="Main plugin."),
        AGE,
    ),
    "Service": (
        Column("TYPE", ".spec.type"),
        Column("CLUSTER-IP", ".spec.clusterIP"),
        Column("PORT", ".spec.ports[*].port"),
        Column("PROTOCOL", ".spec.ports[*].protocol"),
        AGE,
    ),
    "EndpointSlice": (
        Column("ADDRESSTYPE", ".addressType"),
        Column("PORTS", ".ports[*].port"),
        Column("ENDPOINTS", ".endpoints[*].addresses[*]"),
        AGE,
    ),
}
"""By kind. A column of type date prints as an age."""

_STEP = re.compile(
    r"""\.(?P<member>[A-Za-z0-9_-]+)|\['(?P<quoted>(?:[^'\\]|\\.)+)'\]|\[(?P<index>\d+|\*)\]"""
    r"""|\[\?\(@\.(?P<key>[A-Za-z0-9_-]+)=="(?P<text>[^"\\]*)"\)\]"""
)


def select(document: Any, json_path: str) -> list[Any]:
    """All values that `json_path` reaches in a decoded JSON document; none if a member is missing.

    Raises ValueError for a path outside the subset described at `Column`.
    """
    values = [document]
    position = 0
    while position < len(json_path):
        step = _STEP.match(json_path, position)
        if step is None:
            raise ValueError(f"{json_path!r} is not a JSONPath that a printer column may have")
        position = step.end()
        if step["key"] is not None:
            items = [item for value in values if isinstance(value, list) for item in value]
            values = [item for item in items if isinstance(item, dict) and item.get(step["key"]) == step["text"]]
        elif step["index"] == "*":
            values = [item for value in values if isinstance(value, list) for item in value]
        elif step["index"] is not None:
            index = int(step["index"])
            values = [value[index] for value in values if isinstance(value, list) and index < len(value)]
        else:
            member = step["member"] or re.sub(r"\\(.)", r"\1", step["quoted"])
            values = [value[member] for value in values if isinstance(value, dict) and member in value]
    return values
