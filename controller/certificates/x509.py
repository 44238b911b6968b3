"""Authorities and serving certificates: ECDSA on P-256, as X.509 for TLS.

Source: RFC 5280; CA/Browser Forum baseline requirements for key usage.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from secrets import token_hex

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATED = timedelta(hours=1)
"""How long before its making a certificate begins to hold: nodes' clocks differ."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def issued(self) -> datetime:
        """When it was made."""
        return issued(self.certificate)

    @property
    def ends(self) -> datetime:
        """When it expires."""
        return parse(self.certificate).not_valid_after_utc


def new_authority(now: datetime, lifetime: timedelta) -> Pair:
    """A self-signed authority that may sign servers' certificates and no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Verifiers look an issuer up by its name: authorities that follow one another need different ones.
    name = _name(f"spiderpool-controller-ca-{token_hex(4)}")
    certificate = (
        _builder(name, name, key.public_key(), now, now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def new_server(authority: Pair, names: Iterable[str], now: datetime, lifetime: timedelta) -> Pair:
    """A serving certificate for `names` (DNS names and addresses), ending no later than its authority."""
    signer = parse(authority.certificate)
    signer_key = serialization.load_pem_private_key(authority.key, None)
    if not isinstance(signer_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is no ECDSA key")
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = [_alternative(name) for name in sorted(set(names))]
    until = min(now + lifetime, signer.not_valid_after_utc)
    certificate = (
        _builder(_name("spiderpool-controller"), signer.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
            critical=False,
        )
        .sign(signer_key, hashes.SHA256())
    )
    return _pair(certificate, key)


@lru_cache(maxsize=16)
def parse(pem: bytes) -> x509.Certificate:
    """The certificate in `pem`. Raises ValueError."""
    return x509.load_pem_x509_certificate(pem)


def split(bundle: bytes) -> tuple[bytes, ...]:
    """The certificates of a bundle, each as PEM; none if it cannot be read."""
    try:
        found = x509.load_pem_x509_certificates(bundle)
    except ValueError:
        return ()
    return tuple(certificate.public_bytes(serialization.Encoding.PEM) for certificate in found)


def issued(pem: bytes) -> datetime:
    """When one of our certificates was made."""
    return parse(pem).not_valid_before_utc + BACKDATED


def signed_by(pem: bytes, authority: bytes) -> bool:
    """Whether the authority signed the certificate."""
    try:
        parse(pem).verify_directly_issued_by(parse(authority))
    except Exception:  # noqa: BLE001 (cryptography raises ValueError, TypeError and InvalidSignature, which is none)
        return False
    return True


def self_signed(chain: bytes) -> bytes:
    """Those certificates of a chain that signed themselves, PEM: who has them needs nobody else to verify it."""
    return b"".join(each for each in split(chain) if signed_by(each, each))


def as_certified(names: Iterable[str]) -> frozenset[str]:
    """`names` as `names_of` tells them of a certificate: an IPv6 address has many spellings and one form there.

    Raises ValueError for what cannot stand in a certificate.
    """
    return frozenset(str(_alternative(name).value) for name in names)


def names_of(pem: bytes) -> frozenset[str]:
    """The names that a serving certificate is good for."""
    try:
        found = parse(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(str(name.value) for name in found)


def fits(pair: Pair) -> bool:
    """Whether the key is the certificate's. False for what cannot be read."""
    try:
        key = serialization.load_pem_private_key(pair.key, None)
        return key.public_key() == parse(pair.certificate).public_key()
    except (ValueError, TypeError):
        return False


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - BACKDATED)
        .not_valid_after(until.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
