"""Whether labels satisfy a label selector. Source: Kubernetes, "Labels and Selectors"; metav1.LabelSelector."""

from __future__ import annotations

from collections.abc import Mapping

from api.pool import LabelSelector


def matches(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether `labels` satisfy every part of a selector that `api.validate.selectors` has nothing against.

    An empty selector is satisfied by all; NotIn also where the label is missing.
    """
    if any(labels.get(key) != value for key, value in (selector.match_labels or {}).items()):
        return False
    for requirement in selector.match_expressions or ():
        there, values = requirement.key in labels, requirement.values or ()
        holds = {
            "In": there and labels.get(requirement.key) in values,
            "NotIn": not there or labels[requirement.key] not in values,
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not holds[requirement.operator]:
            return False
    return True


def keys(selector: LabelSelector) -> set[str]:
    """The labels that the selector looks at."""
    return {*(selector.match_labels or {}), *(requirement.key for requirement in selector.match_expressions or ())}
