"""Kubernetes' Lease: who leads, and until when.

Source: Kubernetes API reference, coordination.k8s.io/v1; client-go `tools/leaderelection/resourcelock`.
"""

from __future__ import annotations

from typing import ClassVar

from api.meta import Kind, Resource, Struct, Timestamp


class LeaseSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a Lease. Times must have microseconds (metav1.MicroTime)."""

    holder_identity: str | None = None
    """Who holds it; empty: nobody."""
    lease_duration_seconds: int | None = None
    """For how long others must see no renewal before they may take it."""
    acquire_time: Timestamp | None = None
    renew_time: Timestamp | None = None
    lease_transitions: int | None = None
    """How often it changed hands."""
    strategy: str | None = None
    preferred_holder: str | None = None


class Lease(Resource, frozen=True, kw_only=True):
    """A lock that its holder must renew."""

    TYPE: ClassVar[Kind] = Kind("coordination.k8s.io", "v1", "Lease", "leases", namespaced=True)
    spec: LeaseSpec = LeaseSpec()
