"""When certificates are renewed, and in which order, as a pure function.

An authority is replaced in three steps, so that at no time a server shows a certificate that some API server does not
trust yet: the next authority is made and announced in the bundle; once the bundle has been out for a while, it signs
the serving certificate; once that has been out for a while, the old authority leaves the bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from controller.certificates import x509
from controller.certificates.x509 import Pair

RENEWED_AT = 1 / 3
"""A certificate is replaced when this part of its life is left: months, with the defaults."""

_SOON = 1.0
"""Seconds until the next look where nothing lies ahead."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How long things hold."""

    authority: timedelta
    server: timedelta
    overlap: timedelta
    """How long a new authority is announced before it signs, and an old one after it stopped."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the Secret holds."""

    signer: Pair
    """The authority that signed `server`."""
    server: Pair
    trusted: tuple[bytes, ...]
    """Certificates (PEM) of all authorities to be trusted, `signer` and `following` among them."""
    following: Pair | None = None
    """The authority that is going to sign."""

    @property
    def bundle(self) -> bytes:
        """What the API server gets to verify us with."""
        return b"".join(self.trusted)


def to_data(material: Material) -> dict[str, bytes]:
    """The Secret's members; `tls.crt`, `tls.key` and `ca.crt` are called as everywhere."""
    data = {
        "tls.crt": material.server.certificate,
        "tls.key": material.server.key,
        "ca.crt": material.bundle,
        "signer.crt": material.signer.certificate,
        "signer.key": material.signer.key,
    }
    if material.following is not None:
        data |= {"following.crt": material.following.certificate, "following.key": material.following.key}
    return data


def from_data(data: Mapping[str, bytes]) -> Material | None:
    """What the Secret's members say; None if they do not make sense, as when another tool wrote them."""
    try:
        material = Material(
            signer=Pair(data["signer.crt"], data["signer.key"]),
            server=Pair(data["tls.crt"], data["tls.key"]),
            trusted=x509.split(data["ca.crt"]),
            following=Pair(data["following.crt"], data["following.key"]) if "following.crt" in data else None,
        )
    except KeyError:
        return None
    pairs = [material.signer, material.server, *([material.following] if material.following else [])]
    # Written again by us, the bundle is the same, to the byte; what a person pasted may differ in white space.
    authorities = [pair.certificate for pair in pairs if pair is not material.server]
    sound = all(map(x509.fits, pairs)) and set(authorities) <= set(material.trusted)
    return material if sound else None


def first(now: datetime, policy: Policy, names: Iterable[str], known: Iterable[bytes] = ()) -> Material:
    """New material. `known` are authorities (PEM) trusted so far, under which servers may still be answering."""
    signer = x509.new_authority(now, policy.authority)
    kept = [pem for pem in known if x509.parse(pem).not_valid_after_utc > now and pem != signer.certificate]
    server = x509.new_server(signer, names, now, policy.server)
    return Material(signer, server, (*kept, signer.certificate))


def usable(material: Material, now: datetime) -> bool:
    """Whether API servers whose clocks are right accept what `material` serves, if they have its bundle."""
    pairs = (material.signer, material.server)
    return all(
        pair.ends > now and x509.parse(pair.certificate).not_valid_before_utc <= now for pair in pairs
    ) and x509.signed_by(material.server.certificate, material.signer.certificate)


def renewed(material: Material, now: datetime, policy: Policy, names: Iterable[str], *, announced: bool) -> Material:
    """What should be in place of `material`, which is `usable`; itself if nothing is due.

    `announced`: every configuration by which API servers verify us has had the bundle of `material`.
    """
    signer, server, following, trusted = material.signer, material.server, material.following, material.trusted
    if following is not None and announced and now - following.issued >= policy.overlap:
        signer, following = following, None
    elif following is None and _is_due(signer, now):
        following = x509.new_authority(now, policy.authority)
        trusted = (*trusted, following.certificate)
    wanted = x509.as_certified(names)
    good = x509.names_of(server.certificate) == wanted and x509.signed_by(server.certificate, signer.certificate)
    # With an authority about to end, a new certificate would end as soon: wait for the next one to sign.
    if not good or (_is_due(server, now) and server.ends < signer.ends):
        server = x509.new_server(signer, wanted, now, policy.server)
    if now - server.issued >= policy.overlap:
        needed = {signer.certificate, following.certificate if following else b""}
        trusted = tuple(pem for pem in trusted if pem in needed)
    return Material(signer, server, trusted, following)


def next_look(material: Material, now: datetime, policy: Policy) -> float:
    """Seconds until something may be due. What is due already waits for API servers to be told: not for long."""
    moments = [_due(material.signer), _due(material.server)]
    if material.following is not None:
        moments.append(material.following.issued + policy.overlap)
    if len(material.trusted) > 1 + (material.following is not None):
        moments.append(material.server.issued + policy.overlap)
    ahead = [(moment - now).total_seconds() for moment in moments if moment > now]
    return min(ahead, default=_SOON)


def _due(pair: Pair) -> datetime:
    return pair.ends - (pair.ends - pair.issued) * RENEWED_AT


def _is_due(pair: Pair, now: datetime) -> bool:
    return now >= _due(pair)
