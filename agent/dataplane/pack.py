"""Keys and values of the maps as bytes: the layouts of bpf/maps.h, and which entries a service needs."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.dataplane.desired import MAPPED, Backend, Frontend, unmapped
from agent.dataplane.settings import DataplaneSettings

SCHEMA = 1
"""Version of the layouts, and part of the pins' path."""

ADDRESS = struct.Struct("=16s2sH")
"""struct address: IPv6 or IPv4-mapped address, port in network order, tag."""
SERVICE = struct.Struct("=II")
"""struct service: id, number of backends."""
SLOT = struct.Struct("=II")
"""struct slot: the service's id, index."""
MEMBER = struct.Struct("=I20s")
"""struct member: the service's id, the backend's struct address."""
FLOW = struct.Struct("=Q20s4x")
"""struct flow: socket cookie, one end's struct address."""
PEER = struct.Struct("=20s20sHH")
"""struct peer: frontend, backend, what they are of, whether there are flows."""

ERRORS = ("no_backend", "slot_missing", "peer_unrecorded", "flow_unrecorded")
"""enum error of bpf/consts.h, in its order."""

MEMBER_VALUE = b"\1"


class MapLayout(NamedTuple):
    """What the kernel must say of a pinned map for us to use it."""

    type: int
    key_size: int
    value_size: int
    max_entries: int


def layouts(settings: DataplaneSettings) -> dict[str, MapLayout]:
    """All maps by their pin's name. Types are `enum bpf_map_type`'s."""
    hash_, percpu_hash, percpu_array, lru_hash, sk_storage = 1, 5, 6, 9, 24
    return {
        "services": MapLayout(hash_, ADDRESS.size, SERVICE.size, settings.max_services),
        "slots": MapLayout(hash_, SLOT.size, ADDRESS.size, settings.max_backends),
        "members": MapLayout(hash_, MEMBER.size, len(MEMBER_VALUE), settings.max_backends),
        "flows": MapLayout(lru_hash, FLOW.size, ADDRESS.size, 2 * settings.max_udp_flows),
        "peers": MapLayout(sk_storage, 4, PEER.size, 0),
        "chosen": MapLayout(percpu_hash, 4, 8, settings.max_services),
        "errors": MapLayout(percpu_array, 4, 8, len(ERRORS)),
    }


def layout_digest(settings: DataplaneSettings) -> bytes:
    """Identity of the layouts (32 bytes): maps of another digest cannot be used by this version's programs."""
    formats = [s.format for s in (ADDRESS, SERVICE, SLOT, MEMBER, FLOW, PEER)]
    return hashlib.sha256(repr((SCHEMA, layouts(settings), formats, ERRORS)).encode()).digest()


def _mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else MAPPED + address


def pack_frontend(frontend: Frontend) -> bytes:
    """Key of `services`."""
    return ADDRESS.pack(_mapped(frontend.address), frontend.port.to_bytes(2, "big"), frontend.protocol)


def unpack_frontend(key: bytes) -> Frontend:
    """The frontend of a key of `services`."""
    address, port, protocol = ADDRESS.unpack(key)
    return Frontend(unmapped(address), int.from_bytes(port, "big"), protocol)


def pack_backend(backend: Backend) -> bytes:
    """Value of `slots`."""
    return ADDRESS.pack(_mapped(backend.address), backend.port.to_bytes(2, "big"), 0)


def unpack_backend(value: bytes) -> Backend:
    """The backend of a value of `slots`."""
    address, port, _ = ADDRESS.unpack(value)
    return Backend(unmapped(address), int.from_bytes(port, "big"))


class Programmed(NamedTuple):
    """A service as it is in the maps: the backend in each slot, by index."""

    id: int
    slots: tuple[Backend, ...]


@dataclass(slots=True)
class Contents:
    """Entries of the three maps that the agent writes."""

    services: dict[bytes, bytes] = field(default_factory=dict)
    slots: dict[bytes, bytes] = field(default_factory=dict)
    members: dict[bytes, bytes] = field(default_factory=dict)

    def add(self, frontend: Frontend, service: Programmed) -> None:
        """Add what `service` needs at `frontend`."""
        number = service.id
        self.services[pack_frontend(frontend)] = SERVICE.pack(number, len(service.slots))
        for index, backend in enumerate(service.slots):
            packed = pack_backend(backend)
            self.slots[SLOT.pack(number, index)] = packed
            self.members[MEMBER.pack(number, packed)] = MEMBER_VALUE
