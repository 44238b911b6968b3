"""Kubernetes Events: what `kubectl describe` shows below an object.

Source: Kubernetes API reference, core/v1 Event.
"""

from __future__ import annotations

from typing import ClassVar

from api.meta import Kind, Resource, Struct, Timestamp


class ObjectReference(Struct, frozen=True, kw_only=True):
    """`involvedObject`."""

    api_version: str
    kind: str
    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""


class EventSource(Struct, frozen=True, kw_only=True):
    """`source`."""

    component: str = ""
    host: str = ""


class Event(Resource, frozen=True, kw_only=True):
    """One thing that happened to an object, and how often."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Event", "events", namespaced=True)
    involved_object: ObjectReference
    reason: str
    message: str
    type: str
    """Normal or Warning."""
    source: EventSource = EventSource()
    count: int = 1
    first_timestamp: Timestamp | None = None
    last_timestamp: Timestamp | None = None
    reporting_component: str = ""
    reporting_instance: str = ""
