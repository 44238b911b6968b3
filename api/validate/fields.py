"""What is wrong with one field, in the words of Kubernetes' field errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

ErrorType = Literal["Invalid", "Required", "Forbidden", "NotSupported"]

_SHOWN_VALUE = 256
"""Characters of a refused value that are worth repeating; a hostile one may be a megabyte long."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One error. `str()` is the text form: `spec.gateway: Invalid value: "x": is not an IP address`.

    Source: k8s.io/apimachinery/pkg/util/validation/field, whose texts tools recognise.
    """

    path: str
    """Where, as in `spec.routes[0].dst`."""
    type: ErrorType
    value: object
    """What was refused; not shown for Required and Forbidden."""
    detail: str
    """Why, and what would be right."""

    def __str__(self) -> str:
        match self.type:
            case "Invalid":
                kind = f"Invalid value: {_shown(self.value)}"
            case "NotSupported":
                kind = f"Unsupported value: {_shown(self.value)}"
            case "Required":
                kind = "Required value"
            case "Forbidden":
                kind = "Forbidden"
        return f"{self.path}: {kind}: {self.detail}" if self.detail else f"{self.path}: {kind}"


def invalid(path: str, value: object, detail: str) -> FieldError:
    """The value is malformed or contradicts another one."""
    return FieldError(path, "Invalid", value, detail)


def required(path: str, detail: str = "") -> FieldError:
    """The value is missing."""
    return FieldError(path, "Required", None, detail)


def forbidden(path: str, detail: str) -> FieldError:
    """The value might be right elsewhere, but not here or not now."""
    return FieldError(path, "Forbidden", None, detail)


def not_supported(path: str, value: object, supported: Iterable[object]) -> FieldError:
    """The value is none of an enumeration's."""
    return FieldError(path, "NotSupported", value, "supported values: " + ", ".join(f'"{item}"' for item in supported))


def refusal(kind: str, group: str, name: str, errors: Iterable[FieldError]) -> str:
    """All errors of one object in one text: `SpiderIPPool.spiderpool.spidernet.io "web" is invalid: …`."""
    texts = [str(error) for error in errors]
    listed = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    return f'{kind}{"." if group else ""}{group} "{name}" is invalid: {listed}'


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_VALUE else text[:_SHOWN_VALUE] + "…"
