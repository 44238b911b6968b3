"""From an AdmissionReview to its answer: which rules apply, and what follows from them.

kopf's own handlers for this are not used: they can say a code and a message, but neither the reason nor the causes
by which clients tell Kubernetes' errors apart; they answer 404 for kinds that kopf's discovery has not seen; and they
remember every object they have ever been asked about.
Source: Kubernetes documentation "Dynamic Admission Control"; k8s.io/api `admission/v1/types.go`.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import logging
from typing import Any, cast

import msgspec
from prometheus_client import Histogram

from api.meta import ObjectMeta, Resource, encode
from api.validate.fields import invalid
from api.validate.verdict import Denial, Verdict
from controller.admission import status
from controller.admission.patch import difference
from controller.admission.rules import Context, Entry, Injection, Json, Operation, Rules
from store.errors import StoreError

DEADLINE = 8.0
"""Seconds for one decision: below the ten after which the API server gives up, so that it gets our reason."""

DURATION = Histogram(
    "spiderpool_controller_admission_duration_seconds",
    "How long one admission review took.",
    ["kind", "step", "operation", "allowed"],
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 8),
)

_log = logging.getLogger(__name__)


class User(msgspec.Struct, frozen=True):
    """`request.userInfo`."""

    username: str = ""


class Request(msgspec.Struct, frozen=True, rename="camel"):
    """`request`, as much of it as decides."""

    uid: str
    operation: Operation
    name: str = ""
    namespace: str = ""
    user_info: User = User()
    object: Json | None = None
    old_object: Json | None = None
    dry_run: bool = False


class Review(msgspec.Struct, frozen=True, rename="camel"):
    """An AdmissionReview that asks."""

    api_version: str
    kind: str
    request: Request


class _Head(msgspec.Struct, frozen=True):
    metadata: ObjectMeta


decode_review = msgspec.json.Decoder(Review).decode
"""Raises msgspec.DecodeError, msgspec.ValidationError."""


async def mutated(entry: Entry, review: Review, context: Context) -> Json:
    """The answer to a review at the kind's mutating path: allowed, perhaps with a patch.

    Only an injection can refuse. What cannot be decoded is passed on as it is: the schema will refuse it, in its words.
    """
    request = review.request
    new = request.object
    if new is None or request.operation == "DELETE":
        return _answer(review, None)
    if isinstance(entry, Injection):
        result = await entry.inject(copy.deepcopy(new), request.namespace, context)
        if isinstance(result, Denial):
            return _answer(review, status.refused(entry.kind.TYPE, _name(request), "", result))
        return _answer(review, None, difference(new, result))
    try:
        typed = msgspec.convert(new, entry.kind)
    except msgspec.ValidationError:
        return _answer(review, None)
    defaulted = await entry.default(typed, _lenient(entry, request.old_object), context)
    return _answer(review, None, difference(_as_sent(_plain(typed), new), _plain(defaulted)))


async def validated(entry: Rules[Any], review: Review, context: Context) -> Json:
    """The answer to a review at the kind's validating path."""
    request = review.request
    verdict: Verdict = []
    if request.operation == "DELETE":
        old = _lenient(entry, request.old_object)
        if entry.validate_deletion is not None and old is not None:
            verdict = await entry.validate_deletion(old, context)
    elif request.object is not None:
        try:
            new = msgspec.convert(request.object, entry.kind)
        except msgspec.ValidationError as error:
            verdict = [] if _only_leaves(request) else [_undecodable(error)]
        else:
            verdict = await entry.validate(new, _lenient(entry, request.old_object), context)
    uid = str(((request.object or request.old_object or {}).get("metadata") or {}).get("uid", ""))
    return _answer(review, status.refused(entry.kind.TYPE, _name(request), uid, verdict))


async def decided(entry: Entry, step: str, review: Review, context: Context) -> Json:
    """The answer of `mutated` or `validated`, whatever goes wrong on the way: the API server is told why."""
    began = asyncio.get_running_loop().time()
    kind = entry.kind.TYPE.kind
    try:
        async with asyncio.timeout(DEADLINE):
            if step == "mutate":
                answer = await mutated(entry, review, context)
            else:
                answer = await validated(cast(Rules[Any], entry), review, context)
    except StoreError as error:
        answer = _answer(review, status.unavailable(f"{kind} cannot be checked: {error}"))
    except TimeoutError:
        answer = _answer(review, status.unavailable(f"{kind} cannot be checked within {DEADLINE:g} s"))
    except Exception as error:  # the outermost loop: a request  # noqa: BLE001
        _log.error("%s of %s %s failed", step, kind, _name(review.request), exc_info=error)
        answer = _answer(review, status.broken(f"{step} of {kind}: {type(error).__name__}"))
    allowed = bool(answer["response"]["allowed"])
    if not allowed:
        message = answer["response"]["status"]["message"]
        _log.info("refused %s by %s: %s", review.request.operation, review.request.user_info.username, message)
    taken = asyncio.get_running_loop().time() - began
    DURATION.labels(kind, step, review.request.operation, str(allowed).lower()).observe(taken)
    return answer


def _lenient(entry: Rules[Any], stored: Json | None) -> Resource | None:
    """What was there before, or None if it breaks its schema: then the new object is judged as if it were created."""
    if stored is None:
        return None
    try:
        return cast(Resource, msgspec.convert(stored, entry.kind))
    except msgspec.ValidationError:
        return None


def _only_leaves(request: Request) -> bool:
    """Whether an object that breaks its schema only loses finalizers or gets metadata: its way out stays open."""
    new, old = request.object, request.old_object
    if new is None or old is None or new.get("spec") != old.get("spec"):
        return False
    try:
        head = msgspec.convert(new, _Head)
    except msgspec.ValidationError:
        return False
    return head.metadata.deletion_timestamp is not None


def _undecodable(error: msgspec.ValidationError) -> Any:
    text, _, where = str(error).partition(" - at `$")
    return invalid(where.rstrip("`").lstrip(".") or "object", None, text)


def _as_sent(plain: Json, sent: Json) -> Json:
    """`plain` without what only decoding put there: a patch may not name a member of a `spec` that is not there."""
    return {
        key: _as_sent(value, sent[key]) if isinstance(value, dict) and isinstance(sent[key], dict) else value
        for key, value in plain.items()
        if key in sent
    }


def _plain(resource: Resource) -> Json:
    return cast(Json, msgspec.json.decode(encode(resource)))


def _name(request: Request) -> str:
    metadata = (request.object or {}).get("metadata") or {}
    return request.name or str(metadata.get("name") or metadata.get("generateName") or "")


def _answer(review: Review, refused: Json | None, patch: list[Json] | None = None) -> Json:
    response: Json = {"uid": review.request.uid, "allowed": refused is None}
    if refused is not None:
        response["status"] = refused
    elif patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(msgspec.json.encode(patch)).decode()
    return {"apiVersion": review.api_version, "kind": review.kind, "response": response}
