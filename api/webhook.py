"""What makes the API server ask us: webhook configurations, all of their members.

Source: Kubernetes API reference, admissionregistration.k8s.io/v1.
"""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import field

from api.meta import Kind, Resource, Struct

_GROUP = "admissionregistration.k8s.io"


class ServiceReference(Struct, frozen=True, kw_only=True):
    """`clientConfig.service`."""

    name: str
    namespace: str
    path: str | None = None
    port: int | None = None


class ClientConfig(Struct, frozen=True, kw_only=True):
    """`webhooks[].clientConfig`: either `url` or `service`."""

    url: str | None = None
    service: ServiceReference | None = None
    ca_bundle: bytes | None = None
    """PEM; travels as base64."""


class Rule(Struct, frozen=True, kw_only=True):
    """`webhooks[].rules[]`."""

    api_groups: list[str]
    api_versions: list[str]
    operations: list[str]
    resources: list[str]
    scope: str = "*"


class MatchCondition(Struct, frozen=True, kw_only=True):
    """`webhooks[].matchConditions[]`."""

    name: str
    expression: str


class Webhook(Struct, frozen=True, kw_only=True):
    """`webhooks[]` of both kinds. The defaults are what the API server fills in for what is absent."""

    name: str
    client_config: ClientConfig
    rules: list[Rule]
    side_effects: str
    admission_review_versions: list[str]
    failure_policy: str
    timeout_seconds: int
    match_policy: str
    namespace_selector: dict[str, Any] | None = None
    object_selector: dict[str, Any] | None = None
    match_conditions: list[MatchCondition] | None = None
    reinvocation_policy: str | None = None
    """Of a mutating one only."""


class MutatingWebhookConfiguration(Resource, frozen=True, kw_only=True):
    """Who is asked to fill in what is missing."""

    TYPE: ClassVar[Kind] = Kind(
        _GROUP, "v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", namespaced=False
    )
    webhooks: list[Webhook] = field(default_factory=list)


class ValidatingWebhookConfiguration(Resource, frozen=True, kw_only=True):
    """Who is asked for permission."""

    TYPE: ClassVar[Kind] = Kind(
        _GROUP, "v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations", namespaced=False
    )
    webhooks: list[Webhook] = field(default_factory=list)
