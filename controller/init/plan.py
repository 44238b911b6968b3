"""Which objects to make, out of the environment that upstream's chart gives the Job. Pure, but for the CNI directory.

Source: upstream, cmd/spiderpool-init; charts/spiderpool/templates/job.yaml.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Final

from api.coordinator import ClusterCoordinatorSpec, Coordinator
from api.meta import ObjectMeta, Resource
from api.multusconfig import ANNOTATION_NAME, MacvlanConfig, MultusConfig, MultusConfigSpec
from api.pool import Pool, PoolSpec, Route
from api.ranges import Family, parse_address, parse_range
from api.subnet import Subnet, SubnetSpec

_INIT: Final = "SPIDERPOOL_INIT_"
_COORDINATOR: Final = "DEFAULT_COORDINATOR_"
_TRUE: Final = ("1", "t", "T", "TRUE", "true", "True")
_FALSE: Final = ("0", "f", "F", "FALSE", "false", "False")
_SUFFIXES: Final = (".conf", ".conflist", ".json")
_CALICO: Final = "k8s-pod-network"
"""The name of Calico's network; upstream calls the object `calico`."""
_MOST_BYTES: Final = 1 << 20


class InitError(Exception):
    """A variable cannot be used; the text names it and what is allowed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the Job does."""

    namespace: str
    """Of the installation."""
    controller: str
    """Service whose endpoints must be there: admission answers then."""
    objects: tuple[Resource, ...]
    """What to make, in this order."""
    ready_file: str
    """Made when all is done, if its folder is there."""


class Variables:
    """The environment as upstream reads it: trimmed, and without double quotes."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def raw(self, name: str) -> str:
        """The value, quotes and all."""
        return self._environ.get(_INIT + name, "").strip()

    def text(self, name: str, default: str = "") -> str:
        """The value. `name` is without the prefix SPIDERPOOL_INIT_."""
        return self.raw(name).replace('"', "").strip() or default

    def boolean(self, name: str) -> bool:
        """A value as Go's strconv.ParseBool takes it. Raises InitError, also if there is none."""
        text = self.text(name)
        if text not in _TRUE + _FALSE:
            raise InitError(f"{_INIT}{name}: {text!r} is neither true nor false")
        return text in _TRUE

    def positive(self, name: str, default: int) -> int:
        """An integer above 0. Raises InitError."""
        text = self.text(name, str(default))
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise InitError(f"{_INIT}{name}: {text!r} is not an integer above 0")
        return int(text)

    def listed(self, name: str) -> list[str]:
        """A list, however it is written: `[ ] " \\` do not count, commas and blanks separate."""
        return self.raw(name).translate(str.maketrans(",", " ", '[]"\\')).split()


def plan(environ: Mapping[str, str]) -> Plan:
    """What to do. Raises InitError."""
    required = {}
    for name in ("SPIDERPOOL_NAMESPACE", "SPIDERPOOL_CONTROLLER_NAME", "SPIDERPOOL_AGENT_NAME"):
        required[name] = environ.get(name, "").replace('"', "").strip()
        if not required[name]:
            raise InitError(f"{name}: must not be empty")
    variables = Variables(environ)
    namespace = required["SPIDERPOOL_NAMESPACE"]
    objects: list[Resource] = [*_coordinator(variables), *_networks(variables), *_multus(variables, namespace)]
    return Plan(
        namespace=namespace,
        controller=required["SPIDERPOOL_CONTROLLER_NAME"],
        objects=tuple(objects),
        ready_file=variables.text("READINESS_FILE", "/etc/spiderpool/ready"),
    )


def _coordinator(variables: Variables) -> list[Resource]:
    name = variables.text(f"{_COORDINATOR}NAME")
    if not name:
        return []
    spec = ClusterCoordinatorSpec(
        mode=variables.text(f"{_COORDINATOR}MODE", "auto"),  # type: ignore[arg-type] # admission judges it
        pod_cidr_type=variables.text(f"{_COORDINATOR}POD_CIDR_TYPE") or None,  # type: ignore[arg-type] # likewise
        tune_pod_routes=variables.boolean(f"{_COORDINATOR}TUNE_POD_ROUTES"),
        hijack_cidr=_prefixes(variables, f"{_COORDINATOR}HIJACK_CIDR"),
        policy_routes=_policy_routes(variables, f"{_COORDINATOR}POLICY_ROUTES") or None,
        veth_link_address=variables.text(f"{_COORDINATOR}VETH_LINK_ADDRESS") or None,
        veth_mtu=variables.positive(f"{_COORDINATOR}VETH_MTU", 1500),
    )
    return [Coordinator(metadata=ObjectMeta(name=name), spec=spec)]


def _prefixes(variables: Variables, name: str) -> list[str]:
    return [_prefix(f"{_INIT}{name}", text) for text in variables.listed(name)]


def _prefix(where: str, text: object) -> str:
    """An address or a CIDR as a CIDR. Raises InitError."""
    try:
        return str(ip_network(str(text), strict=False))
    except ValueError:
        raise InitError(f"{where}: {text!r} is neither an IP address nor a CIDR") from None


def _policy_routes(variables: Variables, name: str) -> list[Route]:
    text = variables.raw(name).replace("\\", "")
    try:
        given: Any = json.loads(text or "[]")
    except ValueError as error:
        raise InitError(f"{_INIT}{name}: it is not JSON: {error}") from None
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InitError(f'{_INIT}{name}: a list of {{"dst": CIDR, "gw": ADDRESS}} is expected')
    routes = []
    for index, item in enumerate(given):
        where = f"{_INIT}{name}[{index}]"
        try:
            gateway = str(ip_address(str(item.get("gw", ""))))
        except ValueError:
            raise InitError(f"{where}.gw: {item.get('gw')!r} is not an IP address") from None
        routes.append(Route(dst=_prefix(f"{where}.dst", item.get("dst")), gw=gateway))
    return routes


def _networks(variables: Variables) -> list[Resource]:
    """Subnets first, so that the pools are cut from them."""
    families: tuple[Family, ...] = (4, 6)
    names = {what: [variables.text(f"DEFAULT_IPV{family}_{what}_NAME") for family in families] for what in _NETWORKS}
    for what, (v4, v6) in names.items():
        if v4 and v4 == v6:
            raise InitError(f"{_INIT}DEFAULT_IPV6_{what}_NAME: {v6!r} is the name for IPv4 too, they must differ")
    subnets: list[Resource] = []
    pools: list[Resource] = []
    for family, subnet, pool in zip(families, names["SUBNET"], names["IPPOOL"], strict=True):
        if not subnet and not pool:
            continue
        cidr, gateway, ranges = _addresses(variables, family)
        if subnet:
            subnet_spec = SubnetSpec(subnet=cidr, ip_version=family, ips=ranges or None, gateway=gateway)
            subnets.append(Subnet(metadata=ObjectMeta(name=subnet), spec=subnet_spec))
        if pool:
            pool_spec = PoolSpec(subnet=cidr, ip_version=family, ips=ranges or None, gateway=gateway, default=True)
            pools.append(Pool(metadata=ObjectMeta(name=pool), spec=pool_spec))
    return [*subnets, *pools]


_NETWORKS: Final = ("SUBNET", "IPPOOL")


def _addresses(variables: Variables, family: Family) -> tuple[str, str | None, list[str]]:
    """CIDR, gateway and ranges of a family's subnet and pool. Raises InitError."""
    prefix = f"DEFAULT_IPV{family}_IPPOOL_"
    cidr, gateway = variables.text(f"{prefix}SUBNET"), variables.text(f"{prefix}GATEWAY")
    try:
        if "/" not in cidr or ip_network(cidr, strict=False).version != family:
            raise ValueError
    except ValueError:
        raise InitError(f"{_INIT}{prefix}SUBNET: {cidr!r} is not an IPv{family} CIDR") from None
    if gateway:
        try:
            parse_address(gateway, family)
        except ValueError:
            raise InitError(f"{_INIT}{prefix}GATEWAY: {gateway!r} is not an IPv{family} address") from None
    ranges = variables.listed(f"{prefix}IPRANGES")
    for text in ranges:
        try:
            parse_range(text, family)
        except ValueError as error:
            raise InitError(f"{_INIT}{prefix}IPRANGES: {error}") from None
    return cidr, gateway or None, ranges


def _multus(variables: Variables, namespace: str) -> list[Resource]:
    """The default network's SpiderMultusConfig, without our coordinator: it is the cluster's own network."""
    directory = variables.text("DEFAULT_CNI_DIR")
    if directory and not (os.path.isdir(directory) and os.access(directory, os.R_OK | os.X_OK)):
        raise InitError(f"{_INIT}DEFAULT_CNI_DIR: {directory!r} is not a folder that can be read")
    if not variables.boolean("ENABLE_MULTUS_CONFIG"):
        return []
    name = variables.text("DEFAULT_CNI_NAME")
    found: dict[str, Any] = {} if name or not directory else first_plugin(directory)
    name = name or found.get("name") or "default"
    kind = found.get("type")
    master = found.get("master")
    spec = MultusConfigSpec(cni_type="custom", enable_coordinator=False)
    if kind in ("macvlan", "ipvlan") and isinstance(master, str) and master:
        block = MacvlanConfig(master=[master])
        spec = MultusConfigSpec(cni_type=kind, enable_coordinator=False, **{kind: block})  # type: ignore[arg-type]
    where = variables.text("DEFAULT_CNI_NAMESPACE", namespace)
    annotations = {ANNOTATION_NAME: name} if name == _CALICO else {}
    meta = ObjectMeta(name="calico" if name == _CALICO else name, namespace=where, annotations=annotations)
    return [MultusConfig(metadata=meta, spec=spec)]


def first_plugin(directory: str) -> dict[str, Any]:
    """Name of the first CNI configuration by file name, and its first plugin's members; empty if there is none.

    Multus' own is passed over. Raises InitError.
    """
    try:
        files = sorted(each for each in os.listdir(directory) if each.endswith(_SUFFIXES) and "00-multus" not in each)
        if not files:
            return {}
        with open(os.path.join(directory, files[0]), "rb") as file:
            document = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InitError(f"{_INIT}DEFAULT_CNI_DIR: {directory}: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("name"), str):
        raise InitError(f"{_INIT}DEFAULT_CNI_DIR: {directory}/{files[0]} is not a CNI configuration with a name")
    plugins = document.get("plugins")
    first = plugins[0] if isinstance(plugins, list) and plugins and isinstance(plugins[0], dict) else document
    return {**first, "name": document["name"]}
