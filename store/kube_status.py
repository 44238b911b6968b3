"""What the API server's refusals mean to the port: the one place where they are translated.

Source: Kubernetes API conventions, "Response Status Kind"; k8s.io/apimachinery `pkg/apis/meta/v1/types.go`,
`pkg/api/errors/errors.go`.
"""

from __future__ import annotations

import msgspec

from api.meta import Kind
from store.errors import (
    AlreadyExistsError,
    ConflictError,
    ExpiredError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    NotServedError,
    StoreError,
    UnavailableError,
)


class Details(msgspec.Struct, frozen=True, rename="camel"):
    """`details` of a Status."""

    name: str = ""
    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """metav1.Status, as much of it as decides."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: Details | None = None


_decode = msgspec.json.Decoder(Status).decode

OVERLOADED = frozenset({429})
"""The request was turned away before anything was done with it."""

BROKEN = frozenset({500, 502, 503, 504})
"""The server, a proxy before it or etcd behind it failed: a write may have been done all the same."""


def read_status(code: int, body: bytes) -> Status:
    """The Status that came with an HTTP status; a proxy's page or plain text becomes one without a reason."""
    try:
        status = _decode(body)
    except msgspec.MsgspecError:
        return Status(code=code, message=body[:200].decode(errors="replace").strip() or "no explanation")
    return status if status.code else msgspec.structs.replace(status, code=code)


def label(kind: Kind, namespace: str, name: str) -> str:
    """How messages name an object, or all objects of the kind if `name` is empty."""
    if not name:
        return f"{kind.kind} objects"
    return f"{kind.kind} {f'{namespace}/{name}' if namespace else name!r}"


_BY_REASON: dict[str, type[StoreError]] = {
    "AlreadyExists": AlreadyExistsError,
    "Conflict": ConflictError,
    "Expired": ExpiredError,
    "Gone": ExpiredError,
}

_BY_CODE: dict[int, tuple[type[StoreError], str]] = {
    401: (UnavailableError, "the API server does not accept our credentials: "),
    403: (ForbiddenError, "permission is missing: "),
    404: (NotServedError, "the API server does not serve this kind; are the CRDs installed? "),
    410: (ExpiredError, ""),
    **dict.fromkeys(OVERLOADED | BROKEN, (UnavailableError, "")),
}


def refusal(status: Status, what: str) -> StoreError:
    """The error of the port for a refusal of a request about `what`."""
    message = status.message or status.reason or f"HTTP status {status.code}"
    if status.reason in _BY_REASON:
        return _BY_REASON[status.reason](f"{what}: {message}")
    if status.reason == "NotFound" and status.details is not None and status.details.name:
        return NotFoundError(f"{what} not found" if status.details.name in what else f"{what}: {message}")
    if status.code == 403 and "admission webhook" in message:
        return InvalidError(f"{what} is invalid: {message}")
    error, meaning = _BY_CODE.get(status.code, (InvalidError, "is invalid: "))
    return error(f"{what}: {meaning}{message}")


def retry_after(header: str | None, status: Status) -> float:
    """Seconds that the server asks to wait; 0 if it does not say. A date, which it never sends, counts as silence."""
    if header is not None and header.isascii() and header.isdigit():
        return float(header)
    return float(status.details.retry_after_seconds) if status.details is not None else 0.0
