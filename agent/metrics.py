"""What the agent itself counts; each plugin has a metrics module of its own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from plugins.coordinator.mending import KINDS

CALLS = Counter(
    "spiderpool_agent_cni_calls",
    "CNI calls by plugin, command and the CNI error code they ended with (0: success).",
    ["plugin", "command", "code"],
)
DURATION = Histogram(
    "spiderpool_agent_cni_call_duration_seconds",
    "Time from a call's arrival to its answer, waiting included.",
    ["plugin", "command"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
RUNNING = Gauge("spiderpool_agent_cni_calls_running", "CNI calls being executed.")
IN_FLIGHT = Gauge("spiderpool_agent_cni_calls_in_flight", "CNI calls that arrived and are not answered yet.")
REFUSED = Counter(
    "spiderpool_agent_cni_connections_refused",
    "Connections that were not served: busy (the waiting room is full), peer (not root), malformed, slow, gone.",
    ["reason"],
)
RECHECKS = Counter(
    "spiderpool_agent_rechecks",
    "Looks at addresses in use by outcome: alone (nobody else has it), conflict, unknown (the network could not be"
    " asked), elsewhere (a virtual machine that is still moving here).",
    ["outcome"],
)
STOLEN = Gauge(
    "spiderpool_agent_addresses_in_conflict",
    "Addresses of this node's pods that somebody else on the network uses now, by IP version.",
    ["ip_version"],
)
for _version in ("4", "6"):
    STOLEN.labels(_version)
REPAIRS = Counter(
    "spiderpool_agent_repairs",
    "What was missing for pods and is restored: link (down), rp_filter, rule, route, neighbour, stale (a route or"
    " neighbour that led elsewhere), node_address (in pods, after an address of the node came or went).",
    ["kind"],
)
for _kind in KINDS:
    REPAIRS.labels(_kind)
REPAIR_FAILURES = Counter(
    "spiderpool_agent_repair_failures", "Looks at pods, or at the node, that failed or could not restore all."
)
CUT_OFF = Gauge(
    "spiderpool_agent_pods_cut_off", "Pods whose link to this node is gone, which only a new sandbox brings back."
)
QUEUE_LENGTH = Gauge("spiderpool_agent_queue_length", "Queued deletions that are still to be replayed.")
QUEUE_REPLAYED = Counter(
    "spiderpool_agent_queue_replayed",
    "Queue files by outcome: done, retried, failed (moved aside after the last attempt), malformed (moved aside).",
    ["outcome"],
)
