"""What pods, their templates and their namespaces say about addresses, in annotations. Pure parsers.

Every parser takes the object's annotations and returns None (or the default) where there is none. Members that are
unknown are tolerated, and names of members are compared without regard to case, as Go's decoder has it, which read
these annotations first. Whatever is wrong is an `AnnotationError` that names the key, the member and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from api.pool import Route
from api.ranges import parse_address, parse_network

IPPOOL = "ipam.spidernet.io/ippool"
IPPOOLS = "ipam.spidernet.io/ippools"
ROUTES = "ipam.spidernet.io/routes"
SUBNET = "ipam.spidernet.io/subnet"
SUBNETS = "ipam.spidernet.io/subnets"
IP_NUMBER = "ipam.spidernet.io/ippool-ip-number"
RECLAIM = "ipam.spidernet.io/ippool-reclaim"
NAMESPACE_IPV4 = "ipam.spidernet.io/default-ipv4-ippool"
NAMESPACE_IPV6 = "ipam.spidernet.io/default-ipv6-ippool"
DEFAULT_NETWORK = "v1.multus-cni.io/default-network"
NETWORKS = "k8s.v1.cni.cncf.io/networks"
MIGRATION = "kubevirt.io/migrationJobName"
"""Name of the VirtualMachineInstanceMigration that a KubeVirt pod is the target of."""

FIRST_NIC = "eth0"
"""What kubelet calls a pod's first NIC."""

T = TypeVar("T")

_POOLS = '{"ipv4": [pool, …], "ipv6": [pool, …]}'
_NIC_SUBNET = '{"interface": NIC, "ipv4": [subnet], "ipv6": [subnet]}'
_ALLOWED: Mapping[str, str] = {
    IPPOOL: _POOLS,
    IPPOOLS: '[{"interface": NIC, "ipv4": [pool, …], "ipv6": [pool, …], "cleangateway": true or false}, …]',
    ROUTES: '[{"dst": CIDR, "gw": address}, …]',
    SUBNET: _NIC_SUBNET,
    SUBNETS: f"[{_NIC_SUBNET}, …]",
    IP_NUMBER: '"N" addresses, or "+N" more than replicas; N is an integer of at least 0',
    RECLAIM: '"true" or "false"',
    NAMESPACE_IPV4: "[pool, …]",
    NAMESPACE_IPV6: "[pool, …]",
    DEFAULT_NETWORK: 'one "namespace/name", or a JSON list of one {"name": …, "namespace": …}',
    NETWORKS: '"namespace/name@interface, …", or a JSON list of {"name": …, "namespace": …, "interface": …}',
}
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
"""What Go's strconv.ParseBool takes."""
_NUMBER = re.compile(r"(\+?)([0-9]{1,9})")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
"""A NetworkAttachmentDefinition's or a namespace's name; the first may have dots."""
_INTERFACE = re.compile(r"[^\s/@:]{1,15}")


class AnnotationError(ValueError):
    """An annotation cannot be used. `str()` names the key, the member and what is allowed."""

    def __init__(self, key: str, path: str, problem: str) -> None:
        where = f"{key}: {path}: " if path else f"{key}: "
        super().__init__(f"{where}{problem}; allowed: {_ALLOWED[key]}")
        self.key = key
        """The annotation."""
        self.path = path
        """The member inside of it, such as `[1].ipv4[0]`; empty: the whole."""


@dataclass(frozen=True, slots=True)
class PoolNames:
    """Pools of each family in order; names or shell patterns."""

    ipv4: tuple[str, ...] = ()
    ipv6: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NicPools:
    """One item of `ippools`."""

    interface: str
    """Empty in all items or in none: then items stand for the pod's NICs in order."""
    pools: PoolNames
    clean_gateway: bool


@dataclass(frozen=True, slots=True)
class NicSubnets:
    """Which subnets one NIC's automatic pools are cut from; empty: none of that family."""

    interface: str
    ipv4: str = ""
    ipv6: str = ""


@dataclass(frozen=True, slots=True)
class SubnetDemand:
    """What `subnets`, or else `subnet`, asks for."""

    key: str
    """The annotation that says so."""
    items: tuple[NicSubnets, ...]

    def of(self, nic: str) -> NicSubnets | None:
        """What is asked for this NIC."""
        return next((item for item in self.items if item.interface == nic), None)


@dataclass(frozen=True, slots=True)
class IPNumber:
    """`ippool-ip-number`: so many addresses, or so many more than the application has replicas."""

    count: int
    flexible: bool

    def wanted(self, replicas: int) -> int:
        """How many addresses an application with so many replicas gets."""
        return self.count + replicas if self.flexible else self.count


@dataclass(frozen=True, slots=True)
class NetworkSelection:
    """One network that a pod asks Multus for."""

    namespace: str
    name: str
    interface: str = ""
    """Name of the NIC; empty: `net` and its number, which starts at 1."""

    @property
    def full_name(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


def ippool(annotations: Mapping[str, str]) -> PoolNames | None:
    """The pools for every NIC. Raises AnnotationError."""
    item = _decode(annotations, IPPOOL, _Pools)
    if item is None:
        return None
    names = _names(IPPOOL, "", item)
    if names == PoolNames():
        raise AnnotationError(IPPOOL, "", "names no pool")
    return names


def ippools(annotations: Mapping[str, str]) -> tuple[NicPools, ...] | None:
    """The pools for each NIC. Raises AnnotationError."""
    items = _decode(annotations, IPPOOLS, list[_NicPools])
    if items is None:
        return None
    if not items:
        raise AnnotationError(IPPOOLS, "", "is empty")
    interfaces = [item.interface or "" for item in items]
    if any(interfaces) and not all(interfaces):
        missing = interfaces.index("")
        raise AnnotationError(IPPOOLS, f"[{missing}].interface", "is missing; all items name an interface, or none")
    if any(interfaces):
        _refuse_doubles(IPPOOLS, "interface", interfaces)
    found = []
    for i, item in enumerate(items):
        names = _names(IPPOOLS, f"[{i}]", item)
        if names == PoolNames():
            raise AnnotationError(IPPOOLS, f"[{i}]", "names no pool")
        found.append(NicPools(interfaces[i], names, bool(item.cleangateway)))
    return tuple(found)


def routes(annotations: Mapping[str, str]) -> tuple[Route, ...]:
    """Routes that the pod gets beside its pools'; destinations in canonical form. Raises AnnotationError."""
    found = []
    for i, item in enumerate(_decode(annotations, ROUTES, list[_Route]) or ()):
        try:
            network = parse_network(item.dst)
        except ValueError as error:
            raise AnnotationError(ROUTES, f"[{i}].dst", str(error)) from None
        try:
            gateway = parse_address(item.gw, network.version)
        except ValueError as error:
            raise AnnotationError(ROUTES, f"[{i}].gw", str(error)) from None
        found.append(Route(dst=str(network), gw=str(gateway)))
    return tuple(found)


def subnets(annotations: Mapping[str, str]) -> SubnetDemand | None:
    """The subnets for automatic pools, of `subnets` or else of `subnet`. Raises AnnotationError."""
    if SUBNETS not in annotations:
        single = _decode(annotations, SUBNET, _NicSubnet)
        return None if single is None else SubnetDemand(SUBNET, (_nic_subnets(SUBNET, "", single),))
    items = _decode(annotations, SUBNETS, list[_NicSubnet])
    if not items:
        raise AnnotationError(SUBNETS, "", "is empty")
    if len(items) > 1 and not all(item.interface for item in items):
        missing = next(i for i, item in enumerate(items) if not item.interface)
        raise AnnotationError(SUBNETS, f"[{missing}].interface", "is missing")
    found = tuple(_nic_subnets(SUBNETS, f"[{i}]", item) for i, item in enumerate(items))
    _refuse_doubles(SUBNETS, "interface", [item.interface for item in found])
    _refuse_doubles(SUBNETS, "ipv4", [item.ipv4 for item in found])
    _refuse_doubles(SUBNETS, "ipv6", [item.ipv6 for item in found])
    return SubnetDemand(SUBNETS, found)


def ip_number(annotations: Mapping[str, str]) -> IPNumber | None:
    """How many addresses the application's automatic pools have. Raises AnnotationError."""
    text = annotations.get(IP_NUMBER)
    if text is None:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise AnnotationError(IP_NUMBER, "", f"is {text[:40]!r}")
    return IPNumber(int(match[2]), flexible=bool(match[1]))


def ippool_reclaim(annotations: Mapping[str, str]) -> bool:
    """Whether automatic pools go with their application; true by default. Raises AnnotationError."""
    text = annotations.get(RECLAIM, "true")
    if text not in _TRUE | _FALSE:
        raise AnnotationError(RECLAIM, "", f"is {text[:40]!r}")
    return text in _TRUE


def namespace_pools(annotations: Mapping[str, str]) -> PoolNames:
    """The namespace's default pools; empty if it has none. Raises AnnotationError."""
    found = {key: tuple(_decode(annotations, key, list[str]) or ()) for key in (NAMESPACE_IPV4, NAMESPACE_IPV6)}
    for key, names in found.items():
        _refuse_blanks(key, "", names)
    return PoolNames(found[NAMESPACE_IPV4], found[NAMESPACE_IPV6])


def default_network(annotations: Mapping[str, str], namespace: str) -> NetworkSelection | None:
    """The network of the pod's first NIC; `namespace`, that of the installation, is where a bare name is looked for.

    Raises AnnotationError.
    """
    found = _selections(annotations, DEFAULT_NETWORK, namespace)
    if len(found) > 1:
        raise AnnotationError(DEFAULT_NETWORK, "", f"names {len(found)} networks")
    return found[0] if found else None


def networks(annotations: Mapping[str, str], namespace: str) -> tuple[NetworkSelection, ...]:
    """The networks of the pod's further NICs in order; `namespace` is the pod's. Raises AnnotationError."""
    return _selections(annotations, NETWORKS, namespace)


def nic_number(nic: str, further: tuple[NetworkSelection, ...]) -> int | None:
    """Which of the pod's NICs it is: 0 is the first, the others follow in the order of `networks`; None: unknown.

    A network without an interface name gets `net1`, `net2` and so on by its place, as Multus counts.
    """
    if nic == FIRST_NIC:
        return 0
    for number, network in enumerate(further, start=1):
        if nic == (network.interface or f"net{number}"):
            return number
    return None


class _Pools(msgspec.Struct):
    ipv4: list[str] | None = None
    ipv6: list[str] | None = None


class _NicPools(_Pools):
    interface: str | None = None
    cleangateway: bool | None = None


class _NicSubnet(_Pools):
    interface: str | None = None


class _Route(msgspec.Struct):
    dst: str = ""
    gw: str = ""


class _Selection(msgspec.Struct):
    name: str = ""
    namespace: str | None = None
    interface: str | None = None


def _decode(annotations: Mapping[str, str], key: str, kind: type[T]) -> T | None:
    """The annotation's JSON as `kind`; an explicit null is an empty one."""
    text = annotations.get(key)
    if text is None:
        return None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AnnotationError(key, "", f"is not valid JSON ({error})") from None
    if value is None:
        value = [] if getattr(kind, "__origin__", None) is list else {}
    try:
        return msgspec.convert(_lowered(value), kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise AnnotationError(key, where.rstrip("`"), what[:1].lower() + what[1:]) from None


def _lowered(value: Any) -> Any:
    """`value` with the members of objects, in a list or not, in lower case; deeper ones nobody here reads."""
    if isinstance(value, dict):
        return {name.lower(): member for name, member in value.items()}
    return [_lowered(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value


def _names(key: str, path: str, item: _Pools) -> PoolNames:
    names = PoolNames(tuple(item.ipv4 or ()), tuple(item.ipv6 or ()))
    _refuse_blanks(key, f"{path}.ipv4", names.ipv4)
    _refuse_blanks(key, f"{path}.ipv6", names.ipv6)
    return names


def _nic_subnets(key: str, path: str, item: _NicSubnet) -> NicSubnets:
    names = _names(key, path, item)
    if names == PoolNames():
        raise AnnotationError(key, path, "names no subnet")
    return NicSubnets(
        item.interface or FIRST_NIC,
        ipv4=names.ipv4[0] if names.ipv4 else "",
        ipv6=names.ipv6[0] if names.ipv6 else "",
    )


def _refuse_blanks(key: str, path: str, names: tuple[str, ...]) -> None:
    if "" in names:
        raise AnnotationError(key, f"{path}[{names.index('')}]", "is empty")


def _refuse_doubles(key: str, member: str, values: list[str]) -> None:
    for i, value in enumerate(values):
        if value and value in values[:i]:
            raise AnnotationError(key, f"[{i}].{member}", f"{value!r} comes up twice")


def _selections(annotations: Mapping[str, str], key: str, namespace: str) -> tuple[NetworkSelection, ...]:
    """Both notations of Multus. Source: Network Custom Resource Definition De-facto Standard, sections 4.1.2.1-2."""
    text = annotations.get(key, "").strip()
    if not text:
        return ()
    if set(text) & set('[{"'):
        items = _decode(annotations, key, list[_Selection]) or []
        found = [NetworkSelection(i.namespace or namespace, i.name, i.interface or "") for i in items]
    else:
        found = [_selection(part.strip(), namespace) for part in text.split(",")]
    for i, item in enumerate(found):
        for member, value, pattern in (
            ("name", item.name, _NAME),
            ("namespace", item.namespace, _NAME),
            ("interface", item.interface or FIRST_NIC, _INTERFACE),
        ):
            if not pattern.fullmatch(value):
                raise AnnotationError(key, f"[{i}].{member}", f"is {value[:80]!r}")
    return tuple(found)


def _selection(text: str, namespace: str) -> NetworkSelection:
    """`[namespace/]name[@interface]`; what else is in it ends up in a part that the check of the parts refuses."""
    path, at, interface = text.partition("@")
    head, slash, name = path.partition("/")
    return NetworkSelection(head if slash else namespace, name if slash else head, interface or ("/" if at else ""))
