"""Kubernetes' rules for label selectors.

Source: k8s.io/apimachinery pkg/apis/meta/v1/validation, `ValidateLabelSelector`.
"""

from __future__ import annotations

from collections.abc import Iterator

from api.pool import LabelSelector, Requirement
from api.validate.fields import FieldError, forbidden, invalid, required
from api.validate.labels import key_problem, value_problem


def selector_errors(selector: LabelSelector, path: str) -> Iterator[FieldError]:
    """What is wrong with a label selector; an empty one is fine here."""
    for key, value in (selector.match_labels or {}).items():
        if problem := key_problem(key):
            yield invalid(f"{path}.matchLabels", key, problem)
        if problem := value_problem(value):
            yield invalid(f"{path}.matchLabels[{key}]", value, problem)
    for i, requirement in enumerate(selector.match_expressions or ()):
        yield from _requirement_errors(requirement, f"{path}.matchExpressions[{i}]")


def _requirement_errors(requirement: Requirement, path: str) -> Iterator[FieldError]:
    if problem := key_problem(requirement.key):
        yield invalid(f"{path}.key", requirement.key, problem)
    if requirement.operator in {"In", "NotIn"}:
        if not requirement.values:
            yield required(f"{path}.values", "must be given when the operator is In or NotIn")
    elif requirement.operator in {"Exists", "DoesNotExist"}:
        if requirement.values:
            yield forbidden(f"{path}.values", "must not be given when the operator is Exists or DoesNotExist")
    else:
        yield invalid(f"{path}.operator", requirement.operator, "not a valid selector operator")
    for j, value in enumerate(requirement.values or ()):
        if problem := value_problem(value):
            yield invalid(f"{path}.values[{j}]", value, problem)
