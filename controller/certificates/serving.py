"""Where the serving certificate comes from: our own Secret, or files that others see to."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from api.secret import Secret
from api.webhook import MutatingWebhookConfiguration, ValidatingWebhookConfiguration
from controller.caches import Cache, Caches
from controller.certificates import plan, x509
from controller.certificates.keeper import Announcer, Clock, Keeper
from controller.certificates.x509 import Pair
from controller.work import WorkQueue
from store.errors import UnavailableError
from store.port import Query

_log = logging.getLogger(__name__)
Show = Callable[[Pair], None]
"""Serves with a certificate from now on. Raises ssl.SSLError."""


class Source(Protocol):
    """One of both."""

    async def prepare(self) -> None:
        """Have something shown. Raises StoreError, OSError, ssl.SSLError if that cannot be done yet."""

    async def run(self) -> None:
        """On every replica: show what comes instead, until cancelled."""

    async def lead(self) -> None:
        """On the leader: keep everything valid and the API server's configuration right, until cancelled."""


class Issued:
    """Our own authority's, kept in a Secret that all replicas watch."""

    def __init__(
        self,
        keeper: Keeper,
        announcer: Announcer,
        show: Show,
        *,
        caches: Caches,
        secret: Query,
        configuration: str,
        check: float,
        clock: Clock,
    ) -> None:
        self._keeper = keeper
        self._announcer = announcer
        self._show = show
        self._check = check
        self._clock = clock
        self._secrets = caches.of(Secret, secret)
        self._mutating = caches.of(MutatingWebhookConfiguration, Query(name=configuration))
        self._validating = caches.of(ValidatingWebhookConfiguration, Query(name=configuration))

    async def prepare(self) -> None:
        """As `Source` says; makes the certificates if there are none."""
        self._show((await self._keeper.ensure()).server)

    async def run(self) -> None:
        """As `Source` says."""
        end = self._secrets.listen(lambda _, new: self._take(new) if new is not None else None)
        try:
            await asyncio.Event().wait()
        finally:
            end()

    def _take(self, secret: Secret) -> None:
        material = plan.from_data(secret.data)
        if material is None or not plan.usable(material, self._clock()):
            _log.warning("the Secret's certificates are broken or expired: keeping the ones in use")
            return
        try:
            self._show(material.server)
        except ssl.SSLError as error:
            _log.warning("the Secret's certificate cannot be used: %s", error)

    async def lead(self) -> None:
        """As `Source` says."""

        async def tend(_: str) -> float:
            return min(await self._keeper.renew(self._announcer), self._check)

        await _tended(tend, self._secrets, self._mutating, self._validating)


def authorities_of(certificate: str, authorities: str) -> bytes:
    """What the API server is to trust, PEM, for the certificate from elsewhere in the first of two files.

    The second may be missing or empty where the chain in the first ends in a certificate that signed itself.
    Raises OSError, ValueError.
    """
    try:
        bundle = _content(authorities)
    except FileNotFoundError:
        bundle = b""
    if bundle.strip():
        if not x509.split(bundle):
            raise ValueError(f"{authorities} has no certificates (PEM)")
        return bundle
    if found := x509.self_signed(_content(certificate)):
        return found
    raise ValueError(
        f"{authorities} is missing or empty, and {certificate} has no certificate that signed itself: the API server "
        "needs the authorities that it is to trust"
    )


class Provided:
    """Files that an administrator or another controller replaces, as upstream's --tls-server-cert and -key."""

    def __init__(
        self,
        files: tuple[str, str, str],
        announcer: Announcer,
        show: Show,
        *,
        caches: Caches,
        configuration: str,
        check: float,
    ) -> None:
        self._certificate, self._key, self._authorities = files
        self._announcer = announcer
        self._show = show
        self._check = check
        self._mutating = caches.of(MutatingWebhookConfiguration, Query(name=configuration))
        self._validating = caches.of(ValidatingWebhookConfiguration, Query(name=configuration))

    async def prepare(self) -> None:
        """As `Source` says."""
        self._show(await asyncio.to_thread(self._read))

    async def run(self) -> None:
        """As `Source` says; a file that is half written is read again a moment later."""
        seen = None
        while True:
            now = await asyncio.to_thread(self._marks)
            if now != seen:
                try:
                    await self.prepare()
                    seen = now
                except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                    _log.warning("the certificate's files cannot be used, keeping the ones in use: %s", error)
            await asyncio.sleep(min(self._check, 10.0))

    async def lead(self) -> None:
        """As `Source` says."""

        async def tend(_: str) -> float:
            try:
                bundle = await asyncio.to_thread(authorities_of, self._certificate, self._authorities)
            except (OSError, ValueError) as error:
                raise UnavailableError(f"the authorities of the serving certificate: {error}") from error
            await self._announcer.announce(bundle)
            return self._check

        await _tended(tend, self._mutating, self._validating)

    def _read(self) -> Pair:
        return Pair(_content(self._certificate), _content(self._key))

    def _marks(self) -> tuple[tuple[int, int, int], ...]:
        found = []
        for path in (self._certificate, self._key):
            try:
                state = os.stat(path)
            except OSError:
                return ()
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        return tuple(found)


async def _tended(tend: Callable[[str], Awaitable[float]], *caches: Cache[Any]) -> None:
    """Have `tend` called at once, whenever something in `caches` changes, and when it says so; until cancelled."""
    queue = WorkQueue("webhooks", tend, workers=1, backoff_most=10.0)
    ends = [cache.listen(lambda _old, _new: queue.add("webhooks")) for cache in caches]
    queue.add("webhooks")
    try:
        await queue.run()
    finally:
        for end in ends:
            end()


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
