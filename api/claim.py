"""SpiderIPClaim: the lock on one address, and the only truth about who has it.

One object per allocated address, named by the address, so that "create if absent" is the allocation (as with
Kubernetes' own IPAddress objects). No owner references and no finalizers: deleting the object frees the address.
"""

from __future__ import annotations

import hashlib
import re
from ipaddress import IPv4Address, IPv6Address
from typing import ClassVar, Literal

from msgspec import field

from api.meta import GROUP, VERSION, Kind, Resource, Struct, Timestamp
from api.pool import IPVersion

LABEL_POOL = "ipam.spidernet.io/pool"
LABEL_NODE = "ipam.spidernet.io/node"
LABEL_IDENTITY = "ipam.spidernet.io/identity"
LABEL_WORKLOAD = "ipam.spidernet.io/workload"
"""Finds the claims of a workload whose addresses outlive its pods; `workload_label` gives the value."""

Address = IPv4Address | IPv6Address
State = Literal["Allocated", "Quarantined"]

_LABEL_TAIL = re.compile(r"[A-Za-z0-9._-]{0,58}[A-Za-z0-9]")


class Controller(Struct, frozen=True, kw_only=True):
    """The workload's top controller."""

    api_version: str
    """Group and version of the controller's kind."""
    kind: str
    """Kind of the controller."""
    name: str
    """Name of the controller."""
    uid: str = ""
    """UID of the controller."""


class Workload(Struct, frozen=True, kw_only=True):
    """Who holds the address, as a person would name it. Not an identity: pod names are reused."""

    namespace: str = ""
    """Namespace of the pod."""
    name: str = ""
    """Name of the pod, or of the virtual machine whose pods come and go while it keeps its addresses."""
    pod: str = ""
    """Name of the pod where that is not `name`; empty otherwise."""
    controller: Controller | None = None

    @property
    def pod_name(self) -> str:
        """Name of the pod, also where `name` is a virtual machine's."""
        return self.pod or self.name


class Quarantine(Struct, frozen=True, kw_only=True):
    """Why the address may not be used now: somebody who is not ours answers for it."""

    reason: str
    """One sentence."""
    mac: str
    """MAC address that answered."""
    until: Timestamp
    """RFC 3339; the claim may be deleted after this time."""


class Provided(Struct, frozen=True, kw_only=True):
    """What an infrastructure provider must know and has answered about the address.

    Written with the claim, before the provider is asked: whoever deletes the claim knows that it must be told.
    """

    subnet: str
    """The pool's subnet, as the provider knows it."""
    parent_mac: str
    """MAC address of the node's NIC that carries the pod's."""
    mac: str = ""
    """MAC address that the pod's NIC must have; empty until the provider has answered."""
    vlan: int | None = None
    """VLAN ID that the pod's NIC must have."""


class ClaimSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderIPClaim."""

    address: str
    """The address in canonical text, without prefix length."""
    ip_version: IPVersion
    """Address family."""
    pool: str
    """Pool that the address was chosen from."""
    state: State = field(default="Allocated")
    """Allocated to a workload, or Quarantined since somebody else answers for the address."""
    domain: str = field(default="default")
    """Address space; reserved for VLAN-isolated duplicates, "default" today."""
    workload: Workload | None = None
    """Who holds the address, for people."""
    pod_uid: str = field(default="", name="podUID")
    """UID of the pod: the holder's identity, unless there is no pod."""
    container_id: str = field(default="", name="containerID")
    """Sandbox container: the holder's identity where there is no pod."""
    nic: str = ""
    """Interface name (the NIC slot) that the address is for."""
    set_size: int = field(default=1)
    """How many claims the ADD that made this one takes in all; a smaller number of claims is a partial set."""
    network: str = ""
    """Name of the network configuration that asked for the address: CNI's GC is per network."""
    node: str = ""
    """Node that the workload runs on."""
    netns: str = ""
    """Path of the network namespace as the runtime named it, for repair after a restart."""
    netns_inode: int = 0
    """Inode of that namespace: the path may since name another one."""
    provided: Provided | None = None
    quarantine: Quarantine | None = None


class Claim(Resource, frozen=True, kw_only=True):
    """One allocated address: whoever creates the object has the address, whoever deletes it frees it."""

    TYPE: ClassVar[Kind] = Kind(GROUP, VERSION, "SpiderIPClaim", "spideripclaims", namespaced=False, short="sic")
    spec: ClaimSpec


def claim_name(address: Address) -> str:
    """The claim's object name: `10.0.0.5`, or `fd00-0000-…-0010` (DNS-1123 has no colons)."""
    return str(address) if address.version == 4 else address.exploded.replace(":", "-")


def identity_label(pod_uid: str, container_id: str) -> str:
    """Label value that finds all claims of one pod (by UID), or of one container where there is no pod.

    What is too long for a label value, or has characters that one may not have (a container id may end in a dash),
    is hashed.
    """
    kind, identity = ("pod", pod_uid) if pod_uid else ("ctr", container_id)
    return f"{kind}.{identity}" if _LABEL_TAIL.fullmatch(identity) else f"{kind}x.{_short(identity)}"


def workload_label(namespace: str, name: str) -> str:
    """Label value that finds all claims of one pod or virtual machine by its name."""
    return f"w.{_short(f'{namespace}/{name}')}"


def label_value(name: str) -> str:
    """The label value that stands for an object's name, which may be longer than a label's 63 characters."""
    return name if len(name) <= 63 else f"x.{_short(name)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:48]
