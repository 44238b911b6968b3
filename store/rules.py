"""Kubernetes' rules for names, labels, annotations and metadata, as pure functions that every adapter shares.

They are enforced on our side of the port, so that what one adapter accepts the other accepts too.
Source: k8s.io/apimachinery `pkg/util/validation/validation.go`, `pkg/api/validation/objectmeta.go`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from api.meta import Kind, ObjectMeta, OwnerReference, Resource
from api.validate.labels import LABEL_1123, is_subdomain, key_problem, value_problem
from store.errors import InvalidError
from store.port import Query

ANNOTATIONS_BYTES = 256 * 1024
"""Limit of all annotations' keys and values together."""

OBJECT_BYTES = 1536 * 1024
"""Limit of one object's JSON: what etcd takes in one request."""

_is_label_1123 = re.compile(LABEL_1123).fullmatch
_is_label_1035 = re.compile(r"[a-z](?:[-a-z0-9]*[a-z0-9])?").fullmatch

_NAMED_AS_DNS_LABEL = {("v1", "Service")}
"""Kinds whose name becomes a single label of a DNS name that starts with a letter (RFC 1035)."""


def check(resource: Resource) -> None:
    """Raise InvalidError that lists every broken rule of `resource.metadata`, each with its field path."""
    problems = list(_problems(resource.TYPE, resource.metadata))
    if problems:
        raise InvalidError(f"{resource.TYPE.kind} {resource.metadata.name!r} is invalid: {'; '.join(problems)}")


def check_query(kind: Kind, query: Query) -> None:
    """Raise InvalidError if objects of `kind` cannot be asked for in this way: no object could match."""
    if query.namespace and not kind.namespaced:
        raise InvalidError(f"{kind.kind} is cluster-scoped, it cannot be asked for by namespace")
    problems = [*label_problems(query.labels)]
    if query.name:
        problems += name_problems(kind, query.name)
    if query.node and (kind.api_version, kind.kind) != ("v1", "Pod"):
        problems.append("only pods can be asked for by node")
    elif query.node and not is_subdomain(query.node):
        problems.append(f"spec.nodeName: {query.node!r} is no name of a node")
    if query.namespace:
        problems += namespace_problems(kind, query.namespace)
    if problems:
        raise InvalidError(f"{kind.kind} objects cannot be asked for in this way: {'; '.join(problems)}")


def _problems(kind: Kind, metadata: ObjectMeta) -> Iterator[str]:
    yield from name_problems(kind, metadata.name)
    yield from namespace_problems(kind, metadata.namespace)
    yield from label_problems(metadata.labels)
    if metadata.annotations:
        yield from annotation_problems(metadata.annotations)
    for index, finalizer in enumerate(metadata.finalizers):
        if problem := key_problem(finalizer):
            yield f"metadata.finalizers[{index}]: {finalizer!r}: {problem}"
    if metadata.owner_references:
        yield from owner_problems(metadata.owner_references)


def name_problems(kind: Kind, name: str) -> Iterator[str]:
    """Problems of `metadata.name` for an object of `kind`."""
    if not name:
        yield "metadata.name: is required"
    elif (kind.api_version, kind.kind) in _NAMED_AS_DNS_LABEL:
        if len(name) > 63 or not _is_label_1035(name):
            yield (
                f"metadata.name: {name!r} must be a DNS-1035 label: at most 63 lower-case letters, digits and '-', "
                "starting with a letter, ending with a letter or digit"
            )
    elif len(name) > 253 or not is_subdomain(name):
        yield (
            f"metadata.name: {name!r} must be a DNS-1123 subdomain: at most 253 lower-case letters, digits, '-' "
            "and '.', each part starting and ending with a letter or digit"
        )


def namespace_problems(kind: Kind, namespace: str) -> Iterator[str]:
    """Problems of `metadata.namespace` for an object of `kind`."""
    if not kind.namespaced:
        if namespace:
            yield f"metadata.namespace: {namespace!r}: must be empty, {kind.kind} is cluster-scoped"
    elif not namespace:
        yield f"metadata.namespace: is required, {kind.kind} is namespaced"
    elif len(namespace) > 63 or not _is_label_1123(namespace):
        yield (
            f"metadata.namespace: {namespace!r} must be a DNS-1123 label: at most 63 lower-case letters, digits "
            "and '-', starting and ending with a letter or digit"
        )


def label_problems(labels: Mapping[str, str]) -> Iterator[str]:
    """Problems of `metadata.labels`."""
    for key, value in labels.items():
        if problem := key_problem(key):
            yield f"metadata.labels: key {key!r}: {problem}"
        if problem := value_problem(value):
            yield f"metadata.labels[{key}]: {value!r}: {problem}"


def annotation_problems(annotations: Mapping[str, str]) -> Iterator[str]:
    """Problems of `metadata.annotations`; keys are compared without regard to case."""
    for key in annotations:
        if problem := key_problem(key.lower()):
            yield f"metadata.annotations: key {key!r}: {problem}"
    size = sum(len(text.encode(errors="surrogatepass")) for pair in annotations.items() for text in pair)
    if size > ANNOTATIONS_BYTES:
        yield f"metadata.annotations: {size} bytes are too long, at most {ANNOTATIONS_BYTES}"


def owner_problems(references: list[OwnerReference]) -> Iterator[str]:
    """Problems of `metadata.ownerReferences`."""
    for index, reference in enumerate(references):
        for member, value in (
            ("apiVersion", reference.api_version),
            ("kind", reference.kind),
            ("name", reference.name),
            ("uid", reference.uid),
        ):
            if not value:
                yield f"metadata.ownerReferences[{index}].{member}: must not be empty"
    if sum(1 for reference in references if reference.controller) > 1:
        yield "metadata.ownerReferences: only one reference can have controller set to true"
