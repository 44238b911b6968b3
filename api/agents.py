"""Whose agents and controllers run in a cluster, ours or upstream's: told by labels. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from api.apps import DaemonSet
from api.core import Pod

LABEL_COMPONENT: Final = "app.kubernetes.io/component"
AGENT: Final = "spiderpool-agent"
"""What upstream's chart labels its agents' DaemonSet and pods with, and ours too."""
LABEL_RECORDS: Final = "spiderpool.spidernet.io/records"
"""Label on pods of agents and controllers, and on their templates, that tells where they keep their records."""
CLAIMS: Final = "claims"
"""Ours do so in claims. Upstream's have no such label."""


def upstream_that_runs(pods: Iterable[Pod], sets: Iterable[DaemonSet]) -> list[str]:
    """Upstream's agents that run, or may start at any moment, for people; empty: none can write records any more.

    A pod that has ended counts no more, one that is being deleted does until it is gone. A DaemonSet counts by its
    template: nodes may come whenever they like. That of a cluster whose nodes it selects none of does not.
    """
    found = [
        f"Pod {pod.metadata.namespace}/{pod.metadata.name}"
        for pod in pods
        if is_agent(pod.metadata.labels)
        and pod.metadata.labels.get(LABEL_RECORDS) != CLAIMS
        and pod.status.phase not in ("Succeeded", "Failed")
    ]
    return found + [
        f"DaemonSet {each.metadata.namespace}/{each.metadata.name}"
        for each in sets
        if is_agent(each.spec.template.metadata.labels)
        and each.spec.template.metadata.labels.get(LABEL_RECORDS) != CLAIMS
        and each.status.desired_number_scheduled > 0
    ]


def ours_that_run(pods: Iterable[Pod], sets: Iterable[DaemonSet]) -> list[str]:
    """Our agents and controllers that run or may start, for people."""
    found = [
        f"Pod {pod.metadata.namespace}/{pod.metadata.name}"
        for pod in pods
        if pod.metadata.labels.get(LABEL_RECORDS) == CLAIMS and pod.status.phase not in ("Succeeded", "Failed")
    ]
    return found + [
        f"DaemonSet {each.metadata.namespace}/{each.metadata.name}"
        for each in sets
        if each.spec.template.metadata.labels.get(LABEL_RECORDS) == CLAIMS and each.status.desired_number_scheduled > 0
    ]


def is_agent(labels: Mapping[str, str]) -> bool:
    """Whether these are an agent's labels, upstream's or ours."""
    return labels.get(LABEL_COMPONENT) == AGENT
