"""Kubernetes' Secret. Source: Kubernetes API reference, core/v1."""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.meta import Kind, Resource


class Secret(Resource, frozen=True, kw_only=True):
    """A few values that few may read."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Secret", "secrets", namespaced=True)
    data: dict[str, bytes] = field(default_factory=dict)
    """Travels as base64."""
    type: str = ""
    """Immutable; empty becomes Opaque."""
    immutable: bool | None = None

    def __repr__(self) -> str:
        return f"Secret({self.metadata.namespace}/{self.metadata.name})"
