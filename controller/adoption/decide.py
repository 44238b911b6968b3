"""What becomes of upstream's records: which turn into claims, and of whom. Pure.

A record says `address: {pod: namespace/name, podUid}`. The name is the pod's, or a virtual machine's; NIC and node are
in the SpiderEndpoint of that name. A record counts if its pod exists by UID, whatever state it is in (garbage
collection judges that later, by our rules), or if the endpoint is kept for a StatefulSet or virtual machine that will
have the pod again. Anything else was leaked, and is left out: it frees the address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address, ip_interface

import msgspec

from api.apps import StatefulSet, VirtualMachineInstance
from api.claim import (
    LABEL_IDENTITY,
    LABEL_NODE,
    LABEL_POOL,
    LABEL_WORKLOAD,
    Claim,
    ClaimSpec,
    Controller,
    Provided,
    Workload,
    claim_name,
    identity_label,
    label_value,
    workload_label,
)
from api.core import Pod
from api.endpoint import Endpoint, EndpointIP
from api.meta import ObjectMeta
from api.mirror import uid_on_node
from api.pool import Pool
from api.ranges import Address
from api.workloads import static_name


class RecordsError(Exception):
    """A pool's records cannot be read, so nobody may guess what is in them."""


@dataclass(frozen=True, slots=True)
class Record:
    """One of upstream's."""

    address: Address
    namespace: str
    name: str
    """Of the pod, or of its virtual machine."""
    pod_uid: str


class _Entry(msgspec.Struct, frozen=True, rename="camel"):
    pod: str
    pod_uid: str = ""


def records_of(pool: Pool) -> list[Record]:
    """Upstream's records in the pool's status. Raises RecordsError."""
    text = pool.status.allocated_ips if pool.status else None
    found: list[Record] = []
    try:
        for address, entry in msgspec.json.decode(text or "{}", type=dict[str, _Entry]).items():
            namespace, slash, name = entry.pod.partition("/")
            if not slash or not namespace or not name:
                raise RecordsError(f"status.allocatedIPs: {address}: pod {entry.pod!r} is not NAMESPACE/NAME")
            if not entry.pod_uid:  # a pod of that name may have the address, or not
                raise RecordsError(f"status.allocatedIPs: {address}: the podUid of pod {entry.pod} is missing")
            found.append(Record(ip_address(address), namespace, name, entry.pod_uid))
    except (msgspec.DecodeError, ValueError) as error:
        raise RecordsError(f"status.allocatedIPs: {error}") from None
    return found


@dataclass(frozen=True, slots=True)
class Switches:
    """Whose addresses outlive their pods."""

    stateful_sets: bool = True
    virtual_machines: bool = True


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a record's holder, all of it read after the record."""

    pod: Pod | None
    """The pod that the record is of."""
    endpoint: Endpoint | None
    """The SpiderEndpoint with the record's name."""
    controller: Controller | None
    """Of the pod, at the top; without a pod that of the endpoint, if it exists."""
    valid: bool = False
    """Without a pod: whether that controller will have the pod again."""


def claim_of(record: Record, pool: Pool, evidence: Evidence, switches: Switches) -> Claim | None:
    """The claim that the record turns into; None if nobody has the address any more.

    The container is not known, so a DEL for it releases nothing: the pod's next ADD completes the claim, or garbage
    collection takes it when the pod has gone.
    """
    pod, controller = evidence.pod, evidence.controller
    if pod is None and not (evidence.valid and controller is not None):
        return None
    static = ""
    if controller is not None:
        static = static_name(
            pod.metadata.name if pod else record.name,
            controller,
            stateful_sets=switches.stateful_sets,
            virtual_machines=switches.virtual_machines,
        )
    if pod is None and not static:
        return None
    pod_uid = uid_on_node(pod) if pod else record.pod_uid
    entry = _entry_of(record, evidence.endpoint)
    node = pod.spec.node_name if pod else ""
    if not node and evidence.endpoint is not None and evidence.endpoint.status is not None:
        node = evidence.endpoint.status.current.node
    labels = {
        LABEL_POOL: label_value(pool.metadata.name),
        LABEL_IDENTITY: identity_label(pod_uid, ""),
        LABEL_NODE: label_value(node),
    }
    if static:
        labels[LABEL_WORKLOAD] = workload_label(record.namespace, static)
    pod_name = pod.metadata.name if pod else record.name
    return Claim(
        metadata=ObjectMeta(name=claim_name(record.address), labels={k: v for k, v in labels.items() if v}),
        spec=ClaimSpec(
            address=str(record.address),
            ip_version=record.address.version,
            pool=pool.metadata.name,
            workload=Workload(
                namespace=record.namespace,
                name=static or pod_name,
                pod="" if (static or pod_name) == pod_name else pod_name,
                controller=controller,
            ),
            pod_uid=pod_uid,
            nic=_nic(record, entry, pod),
            set_size=_set_size(entry),
            node=node,
            provided=_provided(pool, entry),
        ),
    )


def owner_of(endpoint: Endpoint) -> tuple[str, str] | None:
    """Kind and name of the controller for which upstream keeps the endpoint; None if it keeps it for nobody."""
    if endpoint.status is None:
        return None
    kind = endpoint.status.owner_controller_type
    if kind in (StatefulSet.TYPE.kind, VirtualMachineInstance.TYPE.kind):
        return kind, endpoint.status.owner_controller_name
    return None


def names(endpoint: Endpoint | None, address: Address) -> bool:
    """Whether the endpoint tells of the address."""
    return any(_is(entry, address) for entry in _entries(endpoint))


class Standing(Enum):
    """How a claim that is there already stands to the one that a record asks for."""

    SAME = "same"
    """An earlier attempt made it, or its pod has since taken it over."""
    STALE = "stale"
    """It was left over, by a way back that was interrupted: nobody has it."""
    TAKEN = "taken"
    """A live pod has the address: it was given twice before we came, and stays with both."""


def compare(found: Claim, wanted: Claim, is_alive: Callable[[Claim], bool]) -> Standing:
    """What to think of a claim on an address that is to be adopted; `is_alive` knows who has its pod."""
    if found.spec.pod_uid and found.spec.pod_uid == wanted.spec.pod_uid:
        return Standing.SAME
    label = wanted.metadata.labels.get(LABEL_WORKLOAD)
    if label and found.metadata.labels.get(LABEL_WORKLOAD) == label:
        return Standing.SAME
    if found.spec.state == "Allocated" and (is_alive(found) or not found.spec.pod_uid):
        return Standing.TAKEN
    return Standing.STALE


def _entries(endpoint: Endpoint | None) -> list[EndpointIP]:
    return endpoint.status.current.ips if endpoint is not None and endpoint.status is not None else []


def _entry_of(record: Record, endpoint: Endpoint | None) -> EndpointIP | None:
    return next((entry for entry in _entries(endpoint) if _is(entry, record.address)), None)


def _is(entry: EndpointIP, address: Address) -> bool:
    text = entry.ipv4 if address.version == 4 else entry.ipv6
    try:
        return bool(text) and ip_interface(text or "").ip == address
    except ValueError:
        return False


def _nic(record: Record, entry: EndpointIP | None, pod: Pod | None) -> str:
    """The NIC, as far as it is known: Kubernetes tells a pod's first one by the pod's addresses."""
    if entry is not None and entry.interface:
        return entry.interface
    first = pod is not None and any(ip.ip == str(record.address) for ip in pod.status.pod_ips)
    return "eth0" if first else ""


def _set_size(entry: EndpointIP | None) -> int:
    return max(1, bool(entry and entry.ipv4) + bool(entry and entry.ipv6))


def _provided(pool: Pool, entry: EndpointIP | None) -> Provided | None:
    """What an infrastructure provider said, which alone gives MAC addresses."""
    if entry is None or not entry.mac:
        return None
    return Provided(subnet=pool.spec.subnet, parent_mac="", mac=entry.mac, vlan=entry.vlan)
