"""What one call asks for: the `ipam` block of the network configuration, the identity, and fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface
from typing import Any

from api.annotations import PoolNames
from api.claim import Workload, identity_label
from api.ranges import Address, Family
from plugins.cni import Call
from plugins.errors import InvalidConfigError
from plugins.ipam.pods import PodFacts


@dataclass(frozen=True, slots=True)
class IpamConfig:
    """The members of the `ipam` block that decide something. Logging and socket members are tolerated."""

    ipv4_pools: tuple[str, ...] = ()
    """Candidate pools in order; names or shell patterns."""
    ipv6_pools: tuple[str, ...] = ()
    clean_gateway: bool = False
    """Give no default route."""
    match_master_subnet: bool = False
    """Take only pools in whose subnet the NIC's physical function (SR-IOV) has an address."""

    @property
    def pools(self) -> PoolNames:
        """The candidate pools of both families."""
        return PoolNames(self.ipv4_pools, self.ipv6_pools)


@dataclass(frozen=True, slots=True)
class Request:
    """One ADD, DEL or CHECK as IPAM sees it."""

    pod_uid: str
    container_id: str
    nic: str
    workload: Workload
    network: str
    netns: str
    config: IpamConfig = IpamConfig()
    fixed: Mapping[Family, Address] = field(default_factory=dict)
    """Addresses that the runtime asks for by name; another one will not do."""
    facts: PodFacts | None = None
    """The pod, where there are pods."""

    @property
    def identity(self) -> str:
        """Label value of the identity: the pod, or the container where there is no pod."""
        return identity_label(self.pod_uid, self.container_id)


def parse_request(call: Call) -> Request:
    """The request in an ADD. Raises InvalidConfigError naming the member."""
    for text in (call.netns, call.pod_namespace, call.pod_name, call.pod_uid):
        if not text.isascii():
            _check_text(text)
    return Request(
        pod_uid=call.pod_uid,
        container_id=call.container_id,
        nic=call.ifname,
        workload=Workload(namespace=call.pod_namespace, name=call.pod_name),
        network=network_name(call.config),
        netns=call.netns,
        config=parse_config(call.config),
        fixed=fixed_addresses(call),
    )


def _check_text(text: str) -> None:
    """What a claim records must be text; a byte that is none came through the environment."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidConfigError("CNI_NETNS or CNI_ARGS is invalid", f"{text!r} is not UTF-8") from None


def network_name(config: Mapping[str, Any]) -> str:
    """The configuration's `name`; empty if it has none."""
    name = config.get("name", "")
    if not isinstance(name, str):
        raise InvalidConfigError("the network configuration is invalid", f"name: {name!r} is not a string")
    return name


def parse_config(config: Mapping[str, Any]) -> IpamConfig:
    """The `ipam` block. Raises InvalidConfigError naming the member."""
    block = config.get("ipam")
    if not isinstance(block, Mapping):
        reason = "is missing" if block is None else f"is a {type(block).__name__}"
        raise InvalidConfigError("the network configuration is invalid", f"ipam: {reason}, an object is expected")
    return IpamConfig(
        ipv4_pools=_names(block, "default_ipv4_ippool"),
        ipv6_pools=_names(block, "default_ipv6_ippool"),
        clean_gateway=_boolean(block, "clean_gateway"),
        match_master_subnet=_boolean(block, "match_master_subnet"),
    )


def fixed_addresses(call: Call) -> dict[Family, Address]:
    """Addresses asked for by CNI_ARGS `IP`, or by the capability `ips` (CNI conventions), at most one per family.

    Raises InvalidConfigError.
    """
    texts: list[tuple[str, str]] = [("CNI_ARGS IP", t) for t in call.args.get("IP", "").split(",") if t]
    runtime = call.config.get("runtimeConfig")
    wanted = runtime.get("ips") if isinstance(runtime, Mapping) else None
    if wanted is not None:
        if not isinstance(wanted, list) or not all(isinstance(item, str) for item in wanted):
            raise InvalidConfigError("the address asked for is invalid", "runtimeConfig.ips: not a list of strings")
        texts += [(f"runtimeConfig.ips[{i}]", text) for i, text in enumerate(wanted)]
    result: dict[Family, Address] = {}
    for where, text in texts:
        try:
            address = ip_interface(text).ip
        except ValueError:
            raise InvalidConfigError(
                "the address asked for is invalid", f"{where}: {text!r} is not an IP address"
            ) from None
        if result.setdefault(address.version, address) != address:
            raise InvalidConfigError(
                "the address asked for is invalid", f"{where}: a second IPv{address.version} address, one is allowed"
            )
    return result


def _names(block: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = block.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise InvalidConfigError(
            "the network configuration is invalid", f"ipam.{key}: {value!r} is not a list of pool names"
        )
    return tuple(value)


def _boolean(block: Mapping[str, Any], key: str) -> bool:
    value = block.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidConfigError("the network configuration is invalid", f"ipam.{key}: {value!r} is not true or false")
    return value
