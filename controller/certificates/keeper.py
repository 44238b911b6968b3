"""The Secret that all replicas share: who comes first makes the certificates, the others take them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from msgspec.structs import replace

from api.meta import ObjectMeta
from api.secret import Secret
from controller.certificates import plan, x509
from controller.certificates.plan import Material, Policy
from store.errors import AlreadyExistsError, ConflictError, NotFoundError
from store.port import Store

Clock = Callable[[], datetime]
"""The present, with a time zone; a test moves it."""

_ATTEMPTS = 8
"""Replicas that start together meet at the Secret; each attempt lets one of them pass."""

_log = logging.getLogger(__name__)


def present() -> datetime:
    """The time now."""
    return datetime.now(UTC)


class Announcer(Protocol):
    """Tells API servers which authorities to trust."""

    async def announce(self, bundle: bytes) -> bool:
        """Have them trust `bundle` (PEM) and nothing else; whether all did already. Raises StoreError."""

    async def announced(self) -> tuple[bytes, ...]:
        """The authorities (PEM) that one or the other trusts. Raises StoreError."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the Secret holds, and the Secret as it was read."""

    material: Material | None
    secret: Secret | None


class Keeper:
    """Reads and renews the Secret; every write names the version that it was decided upon."""

    def __init__(
        self, store: Store, namespace: str, name: str, *, policy: Policy, names: Iterable[str], clock: Clock
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._name = name
        self._policy = policy
        self._names = frozenset(names)
        self._clock = clock

    async def ensure(self) -> Material:
        """What to serve with, made if there is nothing usable: for every replica, at its start. Raises StoreError."""
        for _ in range(_ATTEMPTS):
            kept = await self._read()
            if kept.material is not None and plan.usable(kept.material, self._clock()):
                return kept.material
            try:
                material = plan.first(self._clock(), self._policy, self._names, self._known(kept))
                await self._write(kept, material)
            except (ConflictError, AlreadyExistsError, NotFoundError):
                continue  # another replica was quicker: take its
            _log.info("issued a new authority and serving certificate")
            return material
        raise ConflictError(f"Secret {self._namespace}/{self._name} is changed by others all the time")

    async def renew(self, announcer: Announcer) -> float:
        """Do what is due; seconds until something may be due again. For the leader.

        Raises StoreError; ConflictError if the Secret was changed meanwhile: try again.
        """
        now = self._clock()
        kept = await self._read()
        if kept.material is None or not plan.usable(kept.material, now):
            known = {*self._known(kept), *_unexpired(await announcer.announced(), now)}
            fresh = plan.first(now, self._policy, self._names, known)
            _log.warning("the Secret's certificates are missing, expired or broken: issuing new ones")
            # Whoever still answers with the old ones goes on being trusted, and the new ones are before they are shown.
            await announcer.announce(fresh.bundle)
            await self._write(kept, fresh)
            return 0.0
        current = kept.material
        announced = await announcer.announce(current.bundle)
        wanted = plan.renewed(current, now, self._policy, self._names, announced=announced)
        if wanted == current:
            return plan.next_look(current, now, self._policy)
        await self._write(kept, wanted)
        _tell(current, wanted)
        await announcer.announce(wanted.bundle)
        return 0.0

    async def _read(self) -> Kept:
        try:
            secret = await self._store.get(Secret, self._name, self._namespace)
        except NotFoundError:
            return Kept(None, None)
        return Kept(plan.from_data(secret.data), secret)

    async def _write(self, kept: Kept, material: Material) -> None:
        data = plan.to_data(material)
        if kept.secret is None:
            metadata = ObjectMeta(name=self._name, namespace=self._namespace)
            await self._store.create(Secret(metadata=metadata, data=data, type="kubernetes.io/tls"))
            return
        # Members that are not ours stay; those of a step that is over go.
        others = {key: value for key, value in kept.secret.data.items() if not key.startswith("following.")}
        await self._store.update(replace(kept.secret, data=others | data))

    def _known(self, kept: Kept) -> tuple[bytes, ...]:
        """Authorities that the Secret tells of, though it may be broken otherwise."""
        if kept.secret is None:
            return ()
        return tuple(_unexpired(x509.split(kept.secret.data.get("ca.crt", b"")), self._clock()))


def _unexpired(authorities: Iterable[bytes], now: datetime) -> list[bytes]:
    return [pem for pem in authorities if x509.parse(pem).not_valid_after_utc > now]


def _tell(old: Material, new: Material) -> None:
    if new.following is not None and old.following is None:
        _log.info("announcing a new authority", extra={"until": new.following.ends.isoformat()})
    if new.signer != old.signer:
        _log.info("the new authority signs from now on", extra={"until": new.signer.ends.isoformat()})
    if new.server != old.server:
        _log.info("issued a new serving certificate", extra={"until": new.server.ends.isoformat()})
    if len(new.trusted) < len(old.trusted):
        _log.info("an old authority is no longer trusted")
