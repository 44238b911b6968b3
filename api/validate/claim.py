"""Defaulting and validation of a SpiderIPClaim.

The claim's name is the lock, so most rules say that name, labels and spec speak of the same address: a claim whose
name is not its address would leave that address free for somebody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from msgspec.structs import replace

from api.claim import (
    LABEL_IDENTITY,
    LABEL_NODE,
    LABEL_POOL,
    Address,
    Claim,
    ClaimSpec,
    claim_name,
    identity_label,
    label_value,
)
from api.validate import ranges
from api.validate.fields import FieldError, forbidden, invalid, not_supported, required

_IMMUTABLE = ("address", "ip_version", "pool", "domain")


def default_claim(claim: Claim) -> Claim:
    """The claim with the labels that it is found by, derived from its spec."""
    return replace(claim, metadata=replace(claim.metadata, labels={**claim.metadata.labels, **_labels(claim.spec)}))


def created_claim_errors(claim: Claim) -> list[FieldError]:
    """All that is wrong with a new claim, defaulted by `default_claim`."""
    return list(_errors(claim))


def updated_claim_errors(old: Claim, new: Claim) -> list[FieldError]:
    """All that is wrong with the change from `old` to `new`: a claim may change hands, but not its address."""
    return [
        error
        for member in _IMMUTABLE
        for error in ranges.immutable_errors(_path(member), getattr(old.spec, member), getattr(new.spec, member))
    ] + list(_errors(new))


def _path(member: str) -> str:
    return "spec.ipVersion" if member == "ip_version" else f"spec.{member}"


def _labels(spec: ClaimSpec) -> dict[str, str]:
    labels = {LABEL_POOL: label_value(spec.pool)}
    if spec.node:
        labels[LABEL_NODE] = label_value(spec.node)
    if spec.pod_uid or spec.container_id:
        labels[LABEL_IDENTITY] = identity_label(spec.pod_uid, spec.container_id)
    return labels


def _errors(claim: Claim) -> Iterator[FieldError]:
    spec = claim.spec
    address = _address(spec.address)
    if address is None or str(address) != spec.address:
        yield invalid("spec.address", spec.address, "is not an IP address in canonical form, without prefix length")
    else:
        if address.version != spec.ip_version:
            yield invalid("spec.ipVersion", spec.ip_version, f"is not the family of {spec.address}")
        if claim.metadata.name != claim_name(address):
            yield invalid("metadata.name", claim.metadata.name, f"must be {claim_name(address)}, the address's name")
    if not spec.pool:
        yield required("spec.pool")
    if spec.domain != "default":
        yield not_supported("spec.domain", spec.domain, ["default"])
    if spec.set_size < 1:
        yield invalid("spec.setSize", spec.set_size, "must be at least 1")
    yield from _holder_errors(spec)
    for key, value in _labels(spec).items():
        if claim.metadata.labels.get(key) != value:
            yield invalid(f"metadata.labels[{key}]", claim.metadata.labels.get(key), f"must be {value}, as in spec")


def _holder_errors(spec: ClaimSpec) -> Iterator[FieldError]:
    if spec.state == "Quarantined":
        if spec.quarantine is None:
            yield required("spec.quarantine", "a quarantined claim says why and until when")
    elif spec.quarantine is not None:
        yield forbidden("spec.quarantine", "only a quarantined claim has it")
    elif not spec.pod_uid and not spec.container_id:
        yield required("spec.podUID", "an allocated claim names its holder by podUID or containerID")


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return None if getattr(address, "scope_id", None) else address
