"""The structural schema of a resource type (OpenAPI v3 as CRDs have it), and what an API server does with one.

The types in this package are the only source: members, enumerations, bounds and defaults come from the annotations,
descriptions from the docstrings. `conform` prunes, defaults and checks a document as an API server does before any
webhook sees it, so that manifests mean the same with and without Kubernetes.
Source: Kubernetes, "Extend the Kubernetes API with CustomResourceDefinitions", sections "Specifying a structural
schema", "Field pruning", "Defaulting".
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from msgspec import inspect as types

from api.meta import Resource
from api.validate.fields import FieldError, invalid, not_supported, required

Schema = dict[str, Any]

_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "string": "a string",
    "integer": "an integer",
    "boolean": "true or false",
}
_PYTHON_TYPES: dict[str, type] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


@functools.cache
def schema_of(kind: type[Resource]) -> Schema:
    """The schema of a whole object, apiVersion and kind apart. Shared: do not change it."""
    return _struct(cast(types.StructType, types.type_info(kind)))


def _struct(info: types.StructType) -> Schema:
    texts = _attribute_docs(info.cls)
    properties = {}
    for member in info.fields:
        schema = _schema(member.type)
        if member.name in texts:
            schema = _described(texts[member.name]) | {k: v for k, v in schema.items() if k != "description"}
        if member.default not in (msgspec.NODEFAULT, None, "", 0):
            schema["default"] = member.default
        properties[member.encode_name] = schema
    needed = sorted(member.encode_name for member in info.fields if member.required)
    return {
        **_described(inspect.getdoc(info.cls)),
        "type": "object",
        **({"required": needed} if needed else {}),
        "properties": dict(sorted(properties.items())),
    }


def _described(text: str | None) -> Schema:
    return {"description": " ".join(text.split())} if text else {}


def _schema(info: types.Type) -> Schema:  # noqa: PLR0911 - one line per type is the clearest form
    match info:
        case types.Metadata():
            return _schema(info.type) | (info.extra_json_schema or {})
        case types.UnionType():
            return _union([part for part in info.types if not isinstance(part, types.NoneType)])
        case types.StructType():
            return _struct(info)
        case types.DictType():
            return {"type": "object", "additionalProperties": _schema(info.value_type)}
        case types.ListType():
            return {"type": "array", "items": _schema(info.item_type)}
        case types.LiteralType():
            number = all(isinstance(value, int) for value in info.values)
            return (_integer() if number else {"type": "string"}) | {"enum": list(info.values)}
        case types.BoolType():
            return {"type": "boolean"}
        case types.IntType():
            bounds = {"minimum": info.ge, "maximum": info.le}
            return _integer() | {name: bound for name, bound in bounds.items() if bound is not None}
        case types.DateTimeType():
            return {"type": "string", "format": "date-time"}
        case types.StrType():
            return {"type": "string"}
    raise TypeError(f"{info} has no schema")


def _integer() -> Schema:
    return {"type": "integer", "format": "int64"}


def _union(parts: Sequence[types.Type]) -> Schema:
    if len(parts) == 1:
        return _schema(parts[0])
    return {"x-kubernetes-int-or-string": True}


@functools.cache
def _attribute_docs(cls: type) -> dict[str, str]:
    """The string literals below the members of `cls` (PEP 257's attribute docstrings)."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if base.__module__.startswith("msgspec"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = cast(ast.ClassDef, tree).body
        for member, after in itertools.pairwise(body):
            if (
                isinstance(member, ast.AnnAssign)
                and isinstance(member.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                texts[member.target.id] = " ".join(after.value.value.split())
    return texts


def conform(value: object, schema: Schema, path: str, errors: list[FieldError]) -> Any:
    """`value` without unknown members and nulls, with defaults; every breach of `schema` is added to `errors`."""
    name = schema.get("type")
    if name is None:
        if isinstance(value, bool) or not isinstance(value, int | str):
            errors.append(invalid(path, value, "must be an integer or a string"))
        return value
    if not isinstance(value, _PYTHON_TYPES[name]) or (name == "integer" and isinstance(value, bool)):
        hint = " (quote it)" if name == "string" and isinstance(value, bool | int | float) else ""
        errors.append(invalid(path or "(the document)", value, f"must be {_WORDS[name]}{hint}"))
        return value
    if isinstance(value, dict):
        return _conform_mapping(value, schema, path, errors)
    if isinstance(value, list):
        return [conform(item, schema["items"], f"{path}[{i}]", errors) for i, item in enumerate(value)]
    if "enum" in schema and value not in schema["enum"]:
        errors.append(not_supported(path, value, schema["enum"]))
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        limits = [
            f"{word} {schema[key]}" for word, key in (("at least", "minimum"), ("at most", "maximum")) if key in schema
        ]
        errors.append(invalid(path, value, f"must be {' and '.join(limits)}"))
    return value


def _conform_mapping(value: dict[str, Any], schema: Schema, path: str, errors: list[FieldError]) -> dict[str, Any]:
    if "additionalProperties" in schema:
        inner = schema["additionalProperties"]
        return {key: conform(item, inner, f"{path}[{key}]", errors) for key, item in value.items() if item is not None}
    result = {}
    for key, inner in schema["properties"].items():
        where = f"{path}.{key}" if path else key
        item = value.get(key)
        if item is None:
            item = inner.get("default")
        if item is not None:
            result[key] = conform(item, inner, where, errors)
        elif key in schema.get("required", ()):
            errors.append(required(where))
    return result
