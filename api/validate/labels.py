"""Kubernetes' rules for the keys and values of labels.

Source: k8s.io/apimachinery pkg/util/validation, `IsQualifiedName` and `IsValidLabelValue`.
"""

from __future__ import annotations

import re
from functools import lru_cache

LABEL_1123 = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
"""Pattern of a DNS-1123 label, of any length."""

is_subdomain = re.compile(rf"{LABEL_1123}(?:\.{LABEL_1123})*").fullmatch
"""Whether a text is a DNS-1123 subdomain, of any length."""
_is_word = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?").fullmatch

_WORD = "letters, digits, '-', '_' and '.', starting and ending with a letter or digit"


@lru_cache(maxsize=1024)
def key_problem(text: str) -> str:
    """What is wrong with `text` as `[DNS subdomain/]name`, as keys and finalizers are written; empty if nothing."""
    prefix, slash, name = text.rpartition("/")
    if slash and (len(prefix) > 253 or not is_subdomain(prefix)):
        return "the part before '/' must be a DNS-1123 subdomain"
    if len(name) > 63 or not _is_word(name):
        return f"the name must be 1 to 63 {_WORD}"
    return ""


def value_problem(text: str) -> str:
    """What is wrong with `text` as a label's value; empty if nothing."""
    if not text or (len(text) <= 63 and _is_word(text)):
        return ""
    return f"must be empty or at most 63 {_WORD}"
