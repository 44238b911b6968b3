"""The marks that lead a reply back through the NIC on which its request came in, by nf_tables and without a program.

One table in the pod's namespace, the same for every pod, so the whole transaction is constant bytes:

    table inet spiderpool {
      chain prerouting { type filter hook prerouting priority mangle;
        iifname "veth0" ct state new ct mark set 0x1 }
      chain output { type route hook output priority mangle;
        ct mark 0x1 meta mark set 0x1 }
    }

A connection that enters through veth0 is marked; what the pod sends on it gets that mark, and a chain of type `route`
makes the kernel look its route up again, now with the rule for the mark. Other packets keep the marks that applications
or meshes gave them (SO_MARK). nf_tables takes a batch as a whole or not at all: a table of this name that exists is
complete. Layout: include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from plugins.net.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    BatchError,
    Failure,
    Message,
    Netlink,
    attribute,
    attributes,
    nested,
)

MARK: Final = 1
TABLE: Final = "spiderpool"

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _DELTABLE = _SUBSYSTEM << 8 | 0, _SUBSYSTEM << 8 | 2
_NEWCHAIN, _GETCHAIN = _SUBSYSTEM << 8 | 3, _SUBSYSTEM << 8 | 4
_NEWRULE, _GETRULE = _SUBSYSTEM << 8 | 6, _SUBSYSTEM << 8 | 7
_GETGEN = _SUBSYSTEM << 8 | 16
_INET = 1  # NFPROTO_INET
_NESTED = 0x8000
_APPEND = 0x800
_HOOK_PREROUTING, _HOOK_OUTPUT = 0, 3
_PRIORITY_MANGLE = -150
_REGISTER = 1  # NFT_REG_1: 16 bytes
_META_IIFNAME, _META_MARK = 6, 3
_CT_STATE, _CT_MARK = 0, 3
_CT_NEW = 8  # NF_CT_STATE_BIT(IP_CT_NEW)
_EQUAL, _NOT_EQUAL = 0, 1
_IFNAMSIZ = 16


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _nest(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def _expression(name: str, *data: bytes) -> bytes:
    return _nest(1, _text(1, name), _nest(2, *data))


def _value(kind: int, data: bytes) -> bytes:
    return _nest(kind, attribute(1, data))


def _load_meta(key: int) -> bytes:
    return _expression("meta", _u32(2, key), _u32(1, _REGISTER))


def _store_meta(key: int) -> bytes:
    return _expression("meta", _u32(2, key), _u32(3, _REGISTER))


def _load_ct(key: int) -> bytes:
    return _expression("ct", _u32(2, key), _u32(1, _REGISTER))


def _store_ct(key: int) -> bytes:
    return _expression("ct", _u32(2, key), _u32(4, _REGISTER))


def _compare(relation: int, data: bytes) -> bytes:
    return _expression("cmp", _u32(1, _REGISTER), _u32(2, relation), _value(3, data))


def _and(mask: int) -> bytes:
    zero, bits = struct.pack("=I", 0), struct.pack("=I", mask)
    return _expression("bitwise", _u32(1, _REGISTER), _u32(2, _REGISTER), _u32(3, 4), _value(4, bits), _value(5, zero))


def _immediate(value: int) -> bytes:
    return _expression("immediate", _u32(1, _REGISTER), _value(2, struct.pack("=I", value)))


def _rules(interface: str) -> list[tuple[str, bytes]]:
    """(chain, expressions) of each rule."""
    return [
        (
            "prerouting",
            b"".join(
                (
                    _load_meta(_META_IIFNAME),
                    _compare(_EQUAL, interface.encode().ljust(_IFNAMSIZ, b"\0")),
                    _load_ct(_CT_STATE),
                    _and(_CT_NEW),
                    _compare(_NOT_EQUAL, struct.pack("=I", 0)),
                    _immediate(MARK),
                    _store_ct(_CT_MARK),
                )
            ),
        ),
        (
            "output",
            b"".join(
                (
                    _load_ct(_CT_MARK),
                    _compare(_EQUAL, struct.pack("=I", MARK)),
                    _immediate(MARK),
                    _store_meta(_META_MARK),
                )
            ),
        ),
    ]


_CHAINS = (("prerouting", "filter", _HOOK_PREROUTING), ("output", "route", _HOOK_OUTPUT))


def _header(family: int = _INET, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)


_BEGIN = Message(_BATCH_BEGIN, 0, _header(0, _SUBSYSTEM), "begin the nf_tables transaction")
_END = Message(_BATCH_END, 0, _header(0, _SUBSYSTEM), "end the nf_tables transaction")
_TABLE_BODY = _header() + _text(1, TABLE) + _u32(2, 0)
_ENSURE_TABLE = Message(_NEWTABLE, NLM_F_CREATE, _TABLE_BODY, f"add nf_tables table inet {TABLE}")
_CREATE_TABLE = Message(_NEWTABLE, NLM_F_CREATE | NLM_F_EXCL, _TABLE_BODY, f"add nf_tables table inet {TABLE}")
_DELETE_TABLE = Message(_DELTABLE, 0, _header() + _text(1, TABLE), f"delete nf_tables table inet {TABLE}")


def _contents(interface: str) -> tuple[Message, ...]:
    chains = [
        Message(
            _NEWCHAIN,
            NLM_F_CREATE,
            _header()
            + _text(1, TABLE)
            + _text(3, name)
            + _nest(4, _u32(1, hook), attribute(2, struct.pack(">i", _PRIORITY_MANGLE)))
            + _text(7, kind),
            f"add nf_tables chain {name}",
        )
        for name, kind, hook in _CHAINS
    ]
    rules = [
        Message(
            _NEWRULE,
            NLM_F_CREATE | _APPEND,
            _header() + _text(1, TABLE) + _text(2, chain) + _nest(4, expressions),
            f"add nf_tables rule to chain {chain}",
        )
        for chain, expressions in _rules(interface)
    ]
    return (*chains, *rules)


def _transact(socket: Netlink, *messages: Message) -> list[Failure]:
    batch = (_BEGIN, *messages, _END)
    return socket.exchange(batch, final=len(batch) - 2).failures


class ReplyMarks:
    """The table for one interface name; `socket` is a NETLINK_NETFILTER socket of the pod's namespace."""

    def __init__(self, interface: str) -> None:
        self._contents = _contents(interface)
        self._expected = [(chain, _canonical(expressions)) for chain, expressions in _rules(interface)]

    def install(self, socket: Netlink) -> bool:
        """Put the table in; False if one was there (left by an ADD that was killed), which is then replaced.

        Raises BatchError, OSError.
        """
        failures = _transact(socket, _CREATE_TABLE, *self._contents)
        if not failures:
            return True
        if failures[0].code != errno.EEXIST:
            raise BatchError(failures)
        failures = _transact(socket, _ENSURE_TABLE, _DELETE_TABLE, _ENSURE_TABLE, *self._contents)
        if failures:
            raise BatchError(failures)
        return False

    def remove(self, socket: Netlink) -> None:
        """Take the table out if it is there. Raises BatchError, OSError."""
        failures = [f for f in _transact(socket, _DELETE_TABLE) if f.code != errno.ENOENT]
        if failures:
            raise BatchError(failures)

    def differences(self, socket: Netlink) -> list[str]:
        """What is not as `install` left it, in words. Raises BatchError, OSError."""
        found: list[str] = []
        rules = [_parse_rule(body) for body in socket.dump(_list(_GETRULE, "rules"))]
        ours = [(chain, expressions) for table, chain, expressions in rules if table == TABLE]
        if ours != self._expected:
            found.append(f"nf_tables table inet {TABLE} has not the rules that mark replies")
        chains = {_chain_name(body) for body in socket.dump(_list(_GETCHAIN, "chains"))}
        found += [
            f"nf_tables table inet {TABLE} has no base chain {name}"
            for name, kind, hook in _CHAINS
            if (TABLE, name, kind, hook, _PRIORITY_MANGLE) not in chains
        ]
        return found


def available(socket: Netlink) -> bool:
    """Whether the kernel has nf_tables. Raises OSError if the socket fails."""
    return not socket.exchange((Message(_GETGEN, 0, _header(0), "ask for nf_tables"),)).failures


def _list(kind: int, what: str) -> Message:
    return Message(kind, NLM_F_DUMP, _header(), f"list nf_tables {what}")


def _canonical(expressions: bytes) -> tuple[object, ...]:
    """Expressions in a form that does not depend on the order of attributes or on which the kernel adds."""
    return tuple(_tree(body) for _, body in nested(expressions))


_DEFAULTED = {"bitwise": {6}, "ct": {3}}
"""Attributes that the kernel reports though they were left to their default: BITWISE_OP, CT_DIRECTION."""


def _tree(body: bytes) -> tuple[str, frozenset[tuple[int, bytes]]]:
    found = attributes(body)
    name = found.get(1, b"").rstrip(b"\0").decode(errors="replace")
    ignored = _DEFAULTED.get(name, set())
    members = ((kind, _flatten(data)) for kind, data in nested(found.get(2, b"")) if kind not in ignored)
    return name, frozenset(members)


def _flatten(data: bytes) -> bytes:
    """A value, or the value inside an NFTA_DATA nest; flags on the inner type do not matter."""
    inner = list(nested(data)) if len(data) > 4 else []
    return inner[0][1] if len(inner) == 1 else data


def _parse_rule(body: bytes) -> tuple[str, str, tuple[object, ...]]:
    found = attributes(body, 4)
    return _cstring(found.get(1)), _cstring(found.get(2)), _canonical(found.get(4, b""))


def _chain_name(body: bytes) -> tuple[str, str, str, int, int]:
    found = attributes(body, 4)
    hook = attributes(found.get(4, b""))
    number = int.from_bytes(hook.get(1, b"\xff"), "big")
    priority = int.from_bytes(hook.get(2, b""), "big", signed=True)
    return _cstring(found.get(1)), _cstring(found.get(3)), _cstring(found.get(7)), number, priority


def _cstring(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode(errors="replace")
