"""What happened to a handful of addresses, and a sequential model that says whether it may have happened.

A history has what callers saw (CNI calls and the fates of pods, each with the time before it was asked for and the
time after it was answered) and what the API server says about the claims: every change, in order of resourceVersion.
That order is the sequential witness: a call may have had its effect at any time between its invocation and its answer,
or at any time after its invocation if it was never answered, but the claims changed in this one order.

A pod *holds* the addresses that an ADD gave it from the ADD's answer on; until when, `end_of_hold` says. All times are
seconds of the monotonic clock of the one process that records. What is called a violation here is one for certain:
where a call's effect may lie on either side, the model gives the benefit of the doubt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import combinations, pairwise, permutations
from math import inf
from typing import Literal


@dataclass(slots=True)
class Call:
    """A CNI call as its caller saw it."""

    command: Literal["ADD", "DEL"]
    pod: str
    """UID."""
    container: str
    node: str
    invoked: float
    answered: float | None = None
    """None: the process that was asked died, or the caller gave up."""
    given: Mapping[str, str] = field(default_factory=dict)
    """For an ADD that succeeded, address to the uid of its claim."""
    error: str = ""
    """For a call that failed, the kind of error."""


@dataclass(slots=True)
class Pod:
    """One pod, that is one UID."""

    uid: str
    name: str
    node: str
    static: bool
    """Whether its StatefulSet's next pod of this name is to have its addresses."""
    created: float
    deleted: float = inf
    """When its deletion was asked for, by whomever."""
    protected: float = inf
    """Until when its addresses may not be taken back although it is deleted, unless its DEL is asked for: the end of
    its grace period and the delay, or when it was removed without grace."""

    def delete(self, moment: float, until: float | None = None) -> None:
        """It is to be deleted at `moment`, with grace `until` then; without grace by default."""
        self.deleted = min(self.deleted, moment)
        self.protected = min(self.protected, moment if until is None else max(moment, until))


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a claim."""

    version: int
    seen: float
    """When it was heard of, which is after it happened."""
    address: str
    claim: str
    """UID of the claim."""
    pod: str
    """UID of the pod whose it is; empty once the claim is deleted."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A pod's possession of an address, for certain from `start` to `end`."""

    pod: Pod
    address: str
    claim: str
    start: float
    end: float


@dataclass(slots=True)
class History:
    """Everything that was recorded."""

    calls: list[Call] = field(default_factory=list)
    pods: dict[str, Pod] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    scaled: list[tuple[str, float]] = field(default_factory=list)
    """Names of static pods that their StatefulSet gave up, and when that was asked for: they may lose addresses."""
    faults: list[tuple[float, str]] = field(default_factory=list)
    """What was done to the system."""

    def holds(self) -> list[Hold]:
        """All of them, those that ended before they began left out."""
        found = []
        for call in self.calls:
            pod = self.pods[call.pod]
            if call.given and call.answered is not None:
                end = end_of_hold(pod, call, self.calls)
                if call.answered < end:
                    found += [Hold(pod, address, claim, call.answered, end) for address, claim in call.given.items()]
        return found

    def violations(self) -> list[str]:
        """What must not have happened; empty for a good history."""
        holds = self.holds()
        return [
            *_twice(holds),
            *_freed_while_used(holds, self.changes),
            *_not_whole(self.calls),
            *_changed_by_repetition(self.pods, self.calls),
            *_not_inherited(self),
            *_given_to_others(self),
        ]

    def told(self) -> str:
        """The whole story in order of time, for people."""
        lines: list[tuple[float, str]] = list(self.faults)
        for call in self.calls:
            who = f"{call.command} {self.pods[call.pod].name} pod={call.pod[:8]} {call.container} on {call.node}"
            outcome = " ".join(call.given) or call.error or "success"
            lines.append((call.invoked, f"{who} ..."))
            if call.answered is not None:
                lines.append((call.answered, f"{who}: {outcome}"))
        for pod in self.pods.values():
            lines.append((pod.created, f"pod {pod.name} {pod.uid[:8]} on {pod.node}"))
            if pod.deleted < inf:
                lines.append((pod.deleted, f"delete {pod.name} {pod.uid[:8]}, protected until {pod.protected:.3f}"))
        lines += [(moment, f"{name} is not wanted any more") for name, moment in self.scaled]
        for change in self.changes:
            whose = f"pod={change.pod[:8]}" if change.pod else "free"
            lines.append((change.seen, f"    {change.address} {whose} claim={change.claim[:8]} rv={change.version}"))
        return "\n".join(f"{moment:.3f} {line}" for moment, line in sorted(lines))


def end_of_hold(pod: Pod, add: Call, calls: Iterable[Call]) -> float:
    """Until when the pod has for certain what `add` gave it.

    A pod that is not deleted has it for ever: a DEL of a living pod frees nothing, and its next sandbox is to find the
    same addresses. Once it is deleted, a DEL ends the hold as soon as it is asked for, if it names the container of the
    ADD or of one that came later; but a DEL of a container before that has no right to. Without a DEL the pod is
    protected until the end of its grace period and the delay, or until it is removed.
    """
    if pod.deleted == inf:
        return inf
    assert add.answered is not None
    mine = [call for call in calls if call.pod == pod.uid]
    later = {call.container for call in mine if call.command == "ADD" and (call.answered or inf) >= add.answered}
    ends = [
        max(call.invoked, pod.deleted)
        for call in mine
        if call.command == "DEL" and call.container in later and (call.answered or inf) > pod.deleted
    ]
    return min([pod.protected, *ends])


def _twice(holds: Iterable[Hold]) -> list[str]:
    """No address is held by two pods at any time."""
    by_address: defaultdict[str, list[Hold]] = defaultdict(list)
    for hold in holds:
        by_address[hold.address].append(hold)
    return [
        f"{address} is held by two pods: {_name(one.pod)} {_span(one)} and {_name(two.pod)} {_span(two)}"
        for address, those in by_address.items()
        for one, two in combinations(those, 2)
        if one.pod.uid != two.pod.uid and max(one.start, two.start) < min(one.end, two.end)
    ]


def _freed_while_used(holds: Iterable[Hold], changes: Iterable[Change]) -> list[str]:
    """The very claim that an ADD named is there, and the pod's, as long as the pod holds the address.

    A loss is heard of after it happened; so one that is heard of before the end of the hold happened before it.
    """
    lost: dict[tuple[str, str], Change] = {}
    seen: set[tuple[str, str]] = set()
    whose: dict[str, str] = {}
    for change in changes:
        before = whose.get(change.claim)
        if before and before != change.pod:
            lost[change.claim, before] = change
        elif change.pod:
            lost.pop((change.claim, change.pod), None)
        if change.pod:
            seen.add((change.claim, change.pod))
        whose[change.claim] = change.pod
    found = []
    for hold in holds:
        key = hold.claim, hold.pod.uid
        if key not in seen:
            found.append(f"{hold.address} was given to {_name(hold.pod)} and never claimed for it")
        elif key in lost and lost[key].seen < hold.end:
            now = f"pod {lost[key].pod}" if lost[key].pod else "nobody"
            found.append(
                f"{hold.address} was taken from {_name(hold.pod)} and is of {now} by {lost[key].seen:.3f},"
                f" rv {lost[key].version}, while it was held {_span(hold)}"
            )
    return found


def _not_whole(calls: Iterable[Call]) -> list[str]:
    """An ADD gives one address of each family, or nothing."""
    return [
        f"ADD of container {call.container} gave {', '.join(call.given)}"
        for call in calls
        if call.given and sorted(ip_address(address).version for address in call.given) != [4, 6]
    ]


def _changed_by_repetition(pods: Mapping[str, Pod], calls: Iterable[Call]) -> list[str]:
    """All ADDs for a living pod give the same addresses, whichever sandbox they are for."""
    first: dict[str, Call] = {}
    found = []
    for call in calls:
        if call.given and call.answered is not None and call.answered < pods[call.pod].deleted:
            known = first.setdefault(call.pod, call)
            if known.given.keys() != call.given.keys():
                found.append(f"{_name(pods[call.pod])} had {', '.join(known.given)} and then {', '.join(call.given)}")
    return found


def _not_inherited(history: History) -> list[str]:
    """A StatefulSet's pod has the addresses of the pod before, unless the StatefulSet gave it up in between."""
    had: defaultdict[str, list[Call]] = defaultdict(list)
    for call in _served(history):
        if history.pods[call.pod].static:
            had[history.pods[call.pod].name].append(call)
    return [
        f"{name} had {', '.join(before.given)}, its successor {', '.join(after.given)}"
        for name, calls in had.items()
        for before, after in pairwise(sorted(calls, key=lambda call: call.answered or inf))
        if before.given.keys() != after.given.keys() and not _given_up(history, before, after)
    ]


def _given_to_others(history: History) -> list[str]:
    """What a StatefulSet's pod had waits for the next pod of that name, unless the StatefulSet gave it up."""
    served = _served(history)
    found = []
    for before, after in permutations(served, 2):
        one, other = history.pods[before.pod], history.pods[after.pod]
        both = before.given.keys() & after.given.keys()
        late = (before.answered or inf) < after.invoked
        if one.static and one.name != other.name and both and late and not _given_up(history, before, after):
            found.append(f"{', '.join(both)} waited for the next {one.name}, and was given to {_name(other)}")
    return found


def _served(history: History) -> list[Call]:
    """ADDs that gave something to a pod that was there when they were answered."""
    return [
        call
        for call in history.calls
        if call.given and call.answered is not None and call.answered < history.pods[call.pod].deleted
    ]


def _given_up(history: History, before: Call, after: Call) -> bool:
    """Whether the StatefulSet gave up the pod of the first ADD before the second one was answered."""
    pod = history.pods[before.pod]
    return any(name == pod.name and pod.created <= when <= (after.answered or inf) for name, when in history.scaled)


def _name(pod: Pod) -> str:
    return f"{pod.name} ({pod.uid[:8]}, {pod.node})"


def _span(hold: Hold) -> str:
    return f"[{hold.start:.3f}, {hold.end:.3f})"
