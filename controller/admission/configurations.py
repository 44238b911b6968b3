"""The two objects that make the API server ask us: written whole, and again whenever somebody changes them.

They are made here and not by an installer, whose upgrade would put back an old bundle and so block every write.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from msgspec.structs import replace

from api.meta import ObjectMeta
from api.webhook import (
    ClientConfig,
    MutatingWebhookConfiguration,
    Rule,
    ServiceReference,
    ValidatingWebhookConfiguration,
    Webhook,
)
from controller.admission.rules import Entry, Injection, Operation, Rules, mutate_path, validate_path
from controller.certificates import x509
from store.errors import NotFoundError
from store.port import Store

TIMEOUT = 10
"""Seconds that the API server waits for an answer, its own default."""

_log = logging.getLogger(__name__)
_Configuration = MutatingWebhookConfiguration | ValidatingWebhookConfiguration


@dataclass(frozen=True, slots=True)
class Address:
    """Where the API server reaches us: by a Service, or by a URL where the API server is outside of the cluster."""

    url: str = ""
    """`https://127.0.0.1:5722`; empty: by the Service."""
    service: str = ""
    namespace: str = ""
    port: int = 443

    def client_config(self, path: str, bundle: bytes) -> ClientConfig:
        """How one path of ours is asked."""
        if self.url:
            return ClientConfig(url=f"{self.url.rstrip('/')}{path}", ca_bundle=bundle)
        service = ServiceReference(name=self.service, namespace=self.namespace, path=path, port=self.port)
        return ClientConfig(service=service, ca_bundle=bundle)

    def names(self) -> frozenset[str]:
        """Names that the serving certificate must have."""
        host = urlsplit(self.url).hostname
        if host:
            return frozenset({host})
        plain = f"{self.service}.{self.namespace}"
        return frozenset({self.service, plain, f"{plain}.svc", f"{plain}.svc.cluster.local"})


def mutating(table: Iterable[Entry], address: Address, bundle: bytes) -> list[Webhook]:
    """What the API server shall ask before it completes objects."""
    hooks = []
    for entry in table:
        operations: tuple[Operation, ...] = ("CREATE",) if isinstance(entry, Injection) else ("CREATE", "UPDATE")
        hook = _hook(entry, operations, address.client_config(mutate_path(entry.kind), bundle))
        hooks.append(replace(hook, reinvocation_policy="Never"))
    return hooks


def validating(table: Iterable[Entry], address: Address, bundle: bytes) -> list[Webhook]:
    """What the API server shall ask before it writes objects."""
    hooks = []
    for entry in table:
        if isinstance(entry, Rules):
            deleted: tuple[Operation, ...] = ("DELETE",) if entry.validate_deletion is not None else ()
            client = address.client_config(validate_path(entry.kind), bundle)
            hooks.append(_hook(entry, ("CREATE", "UPDATE", *deleted), client))
    return hooks


def _hook(entry: Entry, operations: Iterable[str], client: ClientConfig) -> Webhook:
    kind = entry.kind.TYPE
    first = f"{kind.kind.lower()}.{kind.group}" if kind.group else f"{kind.plural}.spiderpool.spidernet.io"
    rule = Rule(
        api_groups=[kind.group], api_versions=[kind.version], operations=list(operations), resources=[kind.plural]
    )
    return Webhook(
        name=first,
        client_config=client,
        rules=[rule],
        side_effects="None",
        admission_review_versions=["v1"],
        failure_policy="Fail",
        timeout_seconds=TIMEOUT,
        match_policy="Equivalent",
        namespace_selector=dict(entry.namespace_selector) if isinstance(entry, Injection) else {},
        object_selector=dict(entry.object_selector) if isinstance(entry, Injection) else {},
    )


class Configurations:
    """Keeps both objects, named `name`, in order."""

    def __init__(self, store: Store, name: str, table: Iterable[Entry], address: Address) -> None:
        self._store = store
        self._name = name
        self._table = tuple(table)
        self._address = address

    async def announce(self, bundle: bytes) -> bool:
        """Make both objects what they must be, trusting `bundle` (PEM); whether they were already.

        Raises StoreError; ConflictError if somebody else wrote at the same time.
        """
        mutating_was = await self._ensure(MutatingWebhookConfiguration, mutating(self._table, self._address, bundle))
        validating_was = await self._ensure(
            ValidatingWebhookConfiguration, validating(self._table, self._address, bundle)
        )
        return mutating_was and validating_was

    async def announced(self) -> tuple[bytes, ...]:
        """The authorities (PEM) that one or the other object tells the API server to trust."""
        found: dict[bytes, None] = {}
        for kind in (MutatingWebhookConfiguration, ValidatingWebhookConfiguration):
            stored = await self._read(kind)
            found |= dict.fromkeys(pem for hook in (stored.webhooks if stored else ()) for pem in _bundle(hook))
        return tuple(found)

    async def _ensure(self, kind: type[_Configuration], webhooks: list[Webhook]) -> bool:
        stored = await self._read(kind)
        if stored is None:
            await self._store.create(kind(metadata=ObjectMeta(name=self._name), webhooks=webhooks))
            _log.info("created %s %s", kind.TYPE.kind, self._name)
            return False
        if stored.webhooks == webhooks:
            return True
        await self._store.update(replace(stored, webhooks=webhooks))
        _log.warning("%s %s was not as it must be: written anew", kind.TYPE.kind, self._name)
        return False

    async def _read(self, kind: type[_Configuration]) -> _Configuration | None:
        try:
            return await self._store.get(kind, self._name)
        except NotFoundError:
            return None


def _bundle(hook: Webhook) -> tuple[bytes, ...]:
    return x509.split(hook.client_config.ca_bundle or b"")
