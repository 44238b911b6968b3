"""Certificates of a lab's cluster: one authority, and what it issues."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab.layout import LabError

_LIFETIME = datetime.timedelta(days=365)
_LEEWAY = datetime.timedelta(hours=1)
"""How long before now a certificate begins to hold, for clocks that are set back."""

_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
"""What a key may be used for (RFC 5280 section 4.2.1.3)."""


def write_secret(path: str, content: bytes) -> None:
    """A new file that only its owner can read, never half written."""
    with open(os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
    os.rename(f"{path}.tmp", path)


def new_key(path: str) -> ec.EllipticCurvePrivateKey:
    """A new key (P-256), as `<path>.key` (PKCS #8) and its public half `<path>.pub`, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(f"{path}.key", pem)
    with open(f"{path}.pub", "wb") as file:
        file.write(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    return key


class Authority:
    """A certificate authority in a folder: `ca.crt`, `ca.key` and, for each name issued, `<name>.crt` and `.key`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @property
    def certificate(self) -> str:
        """Path of the authority's certificate."""
        return f"{self.folder}/ca.crt"

    def create(self) -> None:
        """Make the authority itself."""
        key = new_key(f"{self.folder}/ca")
        name = _name("spiderpool-lab", ())
        usage = _usage(key_cert_sign=True, crl_sign=True)
        builder = _builder(name, name, key.public_key(), key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(usage, critical=True)
        self._write("ca", builder.sign(key, hashes.SHA256()))

    def issue(self, name: str, common_name: str, *, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        """A certificate for a client, who is a user in groups (its CN and O), or with `hosts` for a server."""
        with open(f"{self.folder}/ca.key", "rb") as file:
            signer = serialization.load_pem_private_key(file.read(), None)
        with open(self.certificate, "rb") as file:
            authority = x509.load_pem_x509_certificate(file.read())
        if not isinstance(signer, ec.EllipticCurvePrivateKey):
            raise LabError(f"{self.folder}/ca.key is no key of ours")
        key = new_key(f"{self.folder}/{name}")
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _builder(_name(common_name, groups), authority.subject, key.public_key(), signer.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(digital_signature=True), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        self._write(name, builder.sign(signer, hashes.SHA256()))

    def kubeconfig(self, name: str, server: str) -> dict[str, Any]:
        """A configuration that needs no other file, for the client certificate issued as `name`."""
        user = {
            "client-certificate-data": _base64(f"{self.folder}/{name}.crt"),
            "client-key-data": _base64(f"{self.folder}/{name}.key"),
        }
        return self._kubeconfig(name, user, server)

    def token_kubeconfig(self, name: str, token: str, server: str) -> dict[str, Any]:
        """The same for somebody with a token."""
        return self._kubeconfig(name, {"token": token}, server)

    def _kubeconfig(self, name: str, user: dict[str, str], server: str) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "lab", "cluster": {"server": server, "certificate-authority-data": _base64(self.certificate)}}
            ],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name}}],
            "current-context": "lab",
        }

    def _write(self, name: str, certificate: x509.Certificate) -> None:
        with open(f"{self.folder}/{name}.crt", "wb") as file:
            file.write(certificate.public_bytes(serialization.Encoding.PEM))


def _name(common_name: str, groups: Sequence[str]) -> x509.Name:
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*organizations, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(**wanted: bool) -> x509.KeyUsage:
    return x509.KeyUsage(**(dict.fromkeys(_USAGES, False) | wanted))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _LEEWAY)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _base64(path: str) -> str:
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode()
