"""Kubernetes' rules for label selectors.

Source: k8s.io/apimachinery pkg/apis/meta/v1/validation, `ValidateLabelSelector`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from api.pool import LabelSelector, Requirement
from api.validate.fields import FieldError, forbidden, invalid, required

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")

_WORD_RULE = "at most 63 letters, digits, '-', '_' and '.', with a letter or digit first and last"
_KEY_RULE = f"must be {_WORD_RULE}, and may have a DNS subdomain and '/' in front"
_VALUE_RULE = f"must be empty or {_WORD_RULE}"


def is_label_key(text: str) -> bool:
    """`subdomain/name` or `name`."""
    prefix, slash, name = text.rpartition("/")
    if slash and (len(prefix) > 253 or not _SUBDOMAIN.fullmatch(prefix)):
        return False
    return len(name) <= 63 and _WORD.fullmatch(name) is not None


def is_label_value(text: str) -> bool:
    """A label's value; empty is one."""
    return not text or (len(text) <= 63 and _WORD.fullmatch(text) is not None)


def selector_errors(selector: LabelSelector, path: str) -> Iterator[FieldError]:
    """What is wrong with a label selector; an empty one is fine here."""
    for key, value in (selector.match_labels or {}).items():
        if not is_label_key(key):
            yield invalid(f"{path}.matchLabels", key, _KEY_RULE)
        if not is_label_value(value):
            yield invalid(f"{path}.matchLabels[{key}]", value, _VALUE_RULE)
    for i, requirement in enumerate(selector.match_expressions or ()):
        yield from _requirement_errors(requirement, f"{path}.matchExpressions[{i}]")


def _requirement_errors(requirement: Requirement, path: str) -> Iterator[FieldError]:
    if not is_label_key(requirement.key):
        yield invalid(f"{path}.key", requirement.key, _KEY_RULE)
    if requirement.operator in {"In", "NotIn"}:
        if not requirement.values:
            yield required(f"{path}.values", "must be given when the operator is In or NotIn")
    elif requirement.operator in {"Exists", "DoesNotExist"}:
        if requirement.values:
            yield forbidden(f"{path}.values", "must not be given when the operator is Exists or DoesNotExist")
    else:
        yield invalid(f"{path}.operator", requirement.operator, "not a valid selector operator")
    for j, value in enumerate(requirement.values or ()):
        if not is_label_value(value):
            yield invalid(f"{path}.values[{j}]", value, _VALUE_RULE)
