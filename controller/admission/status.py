"""Refusals as the API server's clients know them: metav1.Status with code, reason and causes.

The API server puts `admission webhook "…" denied the request: ` before the message and hands on the rest.
Source: k8s.io/apimachinery `pkg/api/errors/errors.go` (NewInvalid, NewForbidden, NewAlreadyExists),
`pkg/apis/meta/v1/types.go`; k8s.io/apiserver `pkg/admission/plugin/webhook/errors/statuserror.go`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.meta import Kind
from api.validate.fields import FieldError, refusal
from api.validate.verdict import Denial, Verdict

Json = dict[str, Any]


def refused(kind: Kind, name: str, uid: str, verdict: Verdict) -> Json | None:
    """The Status that says no, or None if `verdict` has nothing to object to."""
    if isinstance(verdict, Denial):
        return _denied(kind, name, uid, verdict)
    return _invalid(kind, name, uid, verdict) if verdict else None


def unavailable(detail: str) -> Json:
    """The decision cannot be made now; clients that retry on a server's trouble will."""
    return _status(503, "ServiceUnavailable", f"{detail}; try again")


def broken(detail: str) -> Json:
    """We failed."""
    return _status(500, "InternalError", f"Internal error occurred: {detail}")


def _invalid(kind: Kind, name: str, uid: str, errors: Sequence[FieldError]) -> Json:
    message = refusal(kind.kind, kind.group, name, errors)
    causes = [
        {
            "reason": f"FieldValue{error.type}",
            "message": str(error).removeprefix(f"{error.path}: "),
            "field": error.path,
        }
        for error in errors
    ]
    details = {"group": kind.group, "kind": kind.kind, "name": name, "uid": uid, "causes": causes}
    return _status(422, "Invalid", message, details)


def _denied(kind: Kind, name: str, uid: str, denial: Denial) -> Json:
    resource = f"{kind.plural}.{kind.group}" if kind.group else kind.plural
    details = {"group": kind.group, "kind": kind.plural, "name": name, "uid": uid}
    if denial.reason == "AlreadyExists":
        return _status(409, denial.reason, f'{resource} "{name}" already exists', details)
    return _status(403, denial.reason, f'{resource} "{name}" is forbidden: {denial.detail}', details)


def _status(code: int, reason: str, message: str, details: Json | None = None) -> Json:
    status: Json = {"status": "Failure", "code": code, "reason": reason, "message": message}
    if details is not None:
        status["details"] = details
    return status
