"""Where the API server has what: paths and selectors."""

from __future__ import annotations

from api.meta import Kind
from store.port import Query


def collection(kind: Kind, namespace: str) -> str:
    """The path of all objects of a kind, in a namespace if one is named."""
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    return f"{root}/namespaces/{namespace}/{kind.plural}" if namespace else f"{root}/{kind.plural}"


def item(kind: Kind, namespace: str, name: str) -> str:
    """The path of one object."""
    return f"{collection(kind, namespace)}/{name}"


def selectors(query: Query) -> dict[str, str]:
    """A query's conditions but for the namespace, as parameters."""
    parameters = {}
    if query.labels:
        parameters["labelSelector"] = ",".join(f"{key}={value}" for key, value in query.labels.items())
    fields = {"metadata.name": query.name, "spec.nodeName": query.node}
    if any(fields.values()):
        parameters["fieldSelector"] = ",".join(f"{key}={value}" for key, value in fields.items() if value)
    return parameters
