"""What every resource has: its kind, its metadata, and the way it is written as JSON.

Resources are frozen structs: an informer's cache hands out the same object to everybody, and a change is a copy
(`msgspec.structs.replace`). Members that are absent in JSON are None; fields this package does not know are
dropped on decoding, as a structural CRD schema prunes them.
Source: Kubernetes API conventions, "Objects" and "Metadata".
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Annotated, ClassVar, NamedTuple, TypeVar, cast

import msgspec

GROUP = "spiderpool.spidernet.io"
VERSION = "v2beta1"
FINALIZER = "spiderpool.spidernet.io"

Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]


def now() -> datetime:
    """The present, in UTC and whole seconds, as Kubernetes writes times."""
    return datetime.now(UTC).replace(microsecond=0)


class Kind(NamedTuple):
    """How a resource type is called and where it lives."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool
    short: str = ""
    status_subresource: bool = False
    partial: bool = False
    """The type has only some of the kind's members: writing it would lose the others, so the store refuses."""

    @property
    def api_version(self) -> str:
        """`group/version`, or `version` alone for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version


class Struct(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of everything that travels as JSON: camelCase, absent when None."""


class OwnerReference(Struct, frozen=True, kw_only=True):
    """`metadata.ownerReferences[]`."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(Struct, frozen=True, kw_only=True):
    """`metadata`. `uid`, `resource_version`, `generation` and the timestamps are the store's to set."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int | None = None
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    deletion_grace_period_seconds: int | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: list[str] = []
    owner_references: list[OwnerReference] = []


class Resource(Struct, frozen=True, kw_only=True):
    """Base of all kinds. `TYPE` names the kind; apiVersion and kind are added by `encode`."""

    TYPE: ClassVar[Kind]
    metadata: ObjectMeta


R = TypeVar("R", bound=Resource)

_encoder = msgspec.json.Encoder()
_decoders: dict[type[Resource], msgspec.json.Decoder[Resource]] = {}
_building = threading.Lock()
"""Kinds share types such as ObjectMeta, and a thread that meets one of which another thread is just finding out the
members crashes (msgspec 0.22, a null pointer)."""


def encode(resource: Resource) -> bytes:
    """`resource` as a JSON object with apiVersion and kind in front."""
    head = f'{{"apiVersion":"{resource.TYPE.api_version}","kind":"{resource.TYPE.kind}",'
    return head.encode() + _encoder.encode(resource)[1:]


def decode(kind: type[R], data: bytes) -> R:
    """The resource written in `data`.

    Raises msgspec.ValidationError (its text ends with the member's path) or msgspec.DecodeError.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        with _building:
            decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    return cast(R, decoder.decode(data))
