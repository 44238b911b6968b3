"""CNI as types: the call, the result in every version of the specification, and what a plugin is.

Source: CNI specification 1.1.0, sections "Parameters", "Plugin configuration objects" and "Result types".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface
from typing import Any, Literal, Protocol

import msgspec

from plugins.errors import (
    DecodeError,
    IncompatibleVersionError,
    InvalidConfigError,
    InvalidEnvironmentError,
)

SUPPORTED_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
Command = Literal["ADD", "DEL", "CHECK", "STATUS", "GC"]
COMMANDS: tuple[Command, ...] = ("ADD", "DEL", "CHECK", "STATUS", "GC")
SINCE: Mapping[str, str] = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
"""First version that has the command."""

ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")
"""Members of a GC's configuration that list what is to stay, in order of preference."""

_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,252}")
_IFNAME_FORBIDDEN = re.compile(r"[/:\s\x00]")


@dataclass(frozen=True, slots=True)
class Call:
    """One invocation of a plugin: the environment and the configuration, checked."""

    plugin: str
    command: Command
    container_id: str
    netns: str
    """CNI_NETNS, the path as the runtime named it; empty for DEL without one."""
    netns_fd: int | None
    """The open network namespace that came with the call; owned by the server, valid until it answers."""
    ifname: str
    args: Mapping[str, str]
    """CNI_ARGS."""
    path: str
    """CNI_PATH."""
    config: Mapping[str, Any]
    """Standard input, decoded."""
    cni_version: str

    @property
    def pod_namespace(self) -> str:
        """K8S_POD_NAMESPACE of CNI_ARGS, or empty."""
        return self.args.get("K8S_POD_NAMESPACE", "")

    @property
    def pod_name(self) -> str:
        """K8S_POD_NAME of CNI_ARGS, or empty."""
        return self.args.get("K8S_POD_NAME", "")

    @property
    def pod_uid(self) -> str:
        """K8S_POD_UID of CNI_ARGS, or empty."""
        return self.args.get("K8S_POD_UID", "")


def parse_args(text: str) -> dict[str, str]:
    """CNI_ARGS: `K=V;K=V`. Raises InvalidEnvironmentError."""
    result: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidEnvironmentError("CNI_ARGS is malformed", f"{pair!r} is not KEY=VALUE; separate pairs by ';'")
        result[key] = value
    return result


def decode_config(stdin: bytes) -> dict[str, Any]:
    """Standard input as a JSON object. Raises DecodeError."""
    if not stdin.strip():
        raise DecodeError("standard input is empty", "a CNI network configuration (a JSON object) is expected")
    try:
        config = msgspec.json.decode(stdin)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError("standard input is not valid JSON", str(error)) from None
    if not isinstance(config, dict):
        raise DecodeError("standard input is not a JSON object", f"it is a {type(config).__name__}")
    return config


def check_version(config: Mapping[str, Any]) -> str:
    """The configuration's cniVersion (absent: 0.1.0, by the specification). Raises IncompatibleVersionError."""
    version = config.get("cniVersion", "0.1.0")
    if version not in SUPPORTED_VERSIONS:
        raise IncompatibleVersionError(
            "incompatible CNI version", f"cniVersion {version!r} is not one of {', '.join(SUPPORTED_VERSIONS)}"
        )
    return str(version)


def check_container_id(value: str) -> str:
    """CNI_CONTAINERID by the specification's grammar. Raises InvalidEnvironmentError."""
    if not _CONTAINER_ID.fullmatch(value):
        raise InvalidEnvironmentError(
            "CNI_CONTAINERID is invalid" if value else "CNI_CONTAINERID is missing",
            f"{value[:80]!r}: a letter or digit, then letters, digits, '_', '.', '-', at most 253 in all",
        )
    return value


def check_ifname(value: str) -> str:
    """CNI_IFNAME as the kernel allows it. Raises InvalidEnvironmentError."""
    if not value or len(value.encode()) > 15 or value in (".", "..") or _IFNAME_FORBIDDEN.search(value):
        raise InvalidEnvironmentError(
            "CNI_IFNAME is invalid" if value else "CNI_IFNAME is missing",
            f"{value[:80]!r}: 1 to 15 bytes, no '/', ':' or white space, not '.' or '..'",
        )
    return value


def parse_call(plugin: str, env: Mapping[str, str], stdin: bytes, netns_fd: int | None) -> Call:
    """Check everything that came in, in the order in which a person would look for the mistake.

    `env` holds CNI_* and, when the shim could not open CNI_NETNS, SPIDERPOOL_NETNS_ERROR with the reason.
    Raises CniError.
    """
    command = env.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise InvalidEnvironmentError(
            "CNI_COMMAND is invalid" if command else "CNI_COMMAND is missing",
            f"{command[:40]!r} is not one of {', '.join(COMMANDS)}, VERSION",
        )
    config = decode_config(stdin)
    version = check_version(config)
    since = SINCE.get(command, "0.3.0")
    if SUPPORTED_VERSIONS.index(version) < SUPPORTED_VERSIONS.index(since):
        raise IncompatibleVersionError(
            "incompatible CNI version", f"{command} needs cniVersion {since} or later, the configuration says {version}"
        )
    container_id = ifname = netns = ""
    args: dict[str, str] = {}
    if command in ("ADD", "DEL", "CHECK"):
        container_id = check_container_id(env.get("CNI_CONTAINERID", ""))
        ifname = check_ifname(env.get("CNI_IFNAME", ""))
        netns = env.get("CNI_NETNS", "")
        args = parse_args(env.get("CNI_ARGS", ""))
    if command in ("ADD", "CHECK"):
        if not netns:
            raise InvalidEnvironmentError("CNI_NETNS is missing", f"{command} needs the path of a network namespace")
        if netns_fd is None:
            reason = env.get("SPIDERPOOL_NETNS_ERROR", "no file descriptor arrived")
            raise InvalidEnvironmentError("CNI_NETNS cannot be opened", f"{netns!r}: {reason}")
    return Call(
        plugin=plugin,
        command=command,
        container_id=container_id,
        netns=netns,
        netns_fd=netns_fd,
        ifname=ifname,
        args=args,
        path=env.get("CNI_PATH", ""),
        config=config,
        cni_version=version,
    )


@dataclass(frozen=True, slots=True)
class ResultIP:
    """One address of a result, in CIDR form."""

    address: str
    gateway: str = ""
    interface: int | None = None


@dataclass(frozen=True, slots=True)
class ResultRoute:
    """One route of a result."""

    dst: str
    gw: str = ""


@dataclass(frozen=True, slots=True)
class ResultInterface:
    """One interface of a result."""

    name: str
    mac: str = ""
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A success result, independent of the version it is written in."""

    ips: tuple[ResultIP, ...] = ()
    routes: tuple[ResultRoute, ...] = ()
    interfaces: tuple[ResultInterface, ...] = ()
    dns: Mapping[str, Any] = field(default_factory=dict)


def encode_result(result: Result, version: str) -> dict[str, Any]:
    """`result` as the JSON object of `version`: before 1.0.0 each address tells its family."""
    ips: list[dict[str, Any]] = []
    for ip in result.ips:
        item: dict[str, Any] = {"address": ip.address}
        if version < "1.0.0":
            item["version"] = "6" if ":" in ip.address else "4"
        if ip.gateway:
            item["gateway"] = ip.gateway
        if ip.interface is not None:
            item["interface"] = ip.interface
        ips.append(item)
    body: dict[str, Any] = {"cniVersion": version}
    if result.interfaces:
        body["interfaces"] = [
            {k: v for k, v in (("name", i.name), ("mac", i.mac), ("sandbox", i.sandbox)) if v}
            for i in result.interfaces
        ]
    body["ips"] = ips
    body["routes"] = [{"dst": r.dst, "gw": r.gw} if r.gw else {"dst": r.dst} for r in result.routes]
    body["dns"] = dict(result.dns)
    return body


class _PreviousIP(msgspec.Struct):
    address: str
    gateway: str | None = None
    interface: int | None = None


class _PreviousRoute(msgspec.Struct):
    dst: str
    gw: str | None = None


class _PreviousInterface(msgspec.Struct):
    name: str
    mac: str | None = None
    sandbox: str | None = None


class _Previous(msgspec.Struct):
    """The members of a result that we read; null is absent, as Go's decoder has it."""

    ips: list[_PreviousIP] | None = None
    routes: list[_PreviousRoute] | None = None
    interfaces: list[_PreviousInterface] | None = None
    dns: dict[str, Any] | None = None


def decode_prev_result(config: Mapping[str, Any]) -> Result | None:
    """The chain's prevResult, or None. Raises InvalidConfigError naming the member that is wrong."""
    raw = config.get("prevResult")
    if raw is None:
        return None
    try:
        previous = msgspec.convert(raw, _Previous)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise InvalidConfigError("prevResult is malformed", f"prevResult{where.rstrip('`')}: {what}") from None
    for index, ip in enumerate(previous.ips or ()):
        try:
            ip_interface(ip.address)
        except ValueError:
            raise InvalidConfigError(
                "prevResult is malformed",
                f"prevResult.ips[{index}].address: {ip.address[:80]!r}, allowed: ADDRESS/LENGTH",
            ) from None
    return Result(
        ips=tuple(ResultIP(ip.address, ip.gateway or "", ip.interface) for ip in previous.ips or ()),
        routes=tuple(ResultRoute(route.dst, route.gw or "") for route in previous.routes or ()),
        interfaces=tuple(
            ResultInterface(nic.name, nic.mac or "", nic.sandbox or "") for nic in previous.interfaces or ()
        ),
        dns=previous.dns or {},
    )


def valid_attachments(config: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(container id, ifname) of GC's list. Its absence is an error and never an empty list.

    Raises InvalidConfigError. Source: CNI specification 1.1.0, "GC"; some libraries write the shorter key.
    """
    key = next((key for key in ATTACHMENTS if key in config), ATTACHMENTS[0])
    listed = config.get(key)
    if not isinstance(listed, list):
        raise InvalidConfigError(
            "GC without a list of attachments", f'{key}: a list of {{"containerID": …, "ifname": …}} is expected'
        )
    found: set[tuple[str, str]] = set()
    for index, item in enumerate(listed):
        container_id, ifname = (item.get("containerID"), item.get("ifname")) if isinstance(item, dict) else ("", "")
        if not (isinstance(container_id, str) and container_id and isinstance(ifname, str) and ifname):
            raise InvalidConfigError(
                "GC with a malformed list", f'{key}[{index}]: {{"containerID": string, "ifname": string}} is expected'
            )
        found.add((container_id, ifname))
    return found


class Plugin(Protocol):
    """A CNI plugin inside the agent. Every method may raise CniError; nothing else leaves it on purpose.

    A cancelled call (deadline, stop) rolls back what it did, as a failed one does.
    """

    async def add(self, call: Call) -> Mapping[str, Any]:
        """Attach; returns the result object as JSON-able mapping, in `call.cni_version`."""

    async def delete(self, call: Call) -> None:
        """Detach; idempotent, works without netns and prevResult."""

    async def check(self, call: Call) -> None:
        """Raise CheckFailedError if the attachment is not as ADD left it."""

    async def status(self, call: Call) -> None:
        """Raise NotAvailableError if an ADD would fail now."""

    async def gc(self, call: Call) -> None:
        """Remove what does not belong to `config["cni.dev/valid-attachments"]`."""
