"""What is done in a history: programs, and how Hypothesis makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

NODES = 3
SLOTS = 5
"""Names of pods: the last `STATEFUL` are of a StatefulSet."""
STATEFUL = 2
Whom = Literal["nodes", "leader"]
Method = Literal["POST", "PUT", "DELETE", "GET"]


@dataclass(frozen=True)
class Add:
    """ADD for the pod's sandbox, which may have been made before; at the same time as often as said."""

    times: int


@dataclass(frozen=True)
class Sandbox:
    """A new sandbox for the same pod; the runtime takes the old one down first, or later, or never."""

    old: Literal["first", "late", "never"]


@dataclass(frozen=True)
class Abandon:
    """An ADD whose caller goes away after so many milliseconds."""

    after: int


@dataclass(frozen=True)
class Del:
    """DEL of the sandbox of a pod that is alive."""


@dataclass(frozen=True)
class LateDel:
    """DELs of earlier sandboxes, of this pod and of those that had its name, at the same time as what comes next."""


@dataclass(frozen=True)
class Remove:
    """The pod goes, and the next of its name is on another node.

    Its DEL comes within the grace period, after it, late (with its successor) or never; a forced deletion has none.
    """

    force: bool
    cni: Literal["in time", "over time", "late", "never"]
    node: int


@dataclass(frozen=True)
class Up:
    """The pod runs, and has its addresses in its status."""


@dataclass(frozen=True)
class Pause:
    """Milliseconds in which nothing is done."""

    milliseconds: int


PodStep = Add | Sandbox | Abandon | Del | LateDel | Remove | Up | Pause


@dataclass(frozen=True)
class Kill:
    """A node's agent is killed with -9 at its n-th call to the API; while it waits for the answer, or after that."""

    node: int
    calls: int
    during: bool


@dataclass(frozen=True)
class KillLeader:
    """The same for the controller's leader."""

    calls: int
    during: bool


@dataclass(frozen=True)
class Lose:
    """A node dies with its agent, and its pods are evicted; so many milliseconds later it is back."""

    node: int
    back: int


@dataclass(frozen=True)
class Scan:
    """The leader looks at all claims."""


@dataclass(frozen=True)
class Break:
    """The next requests of a method fail in a way."""

    whom: Whom
    fault: str
    method: Method
    times: int


@dataclass(frozen=True)
class Cut:
    """All watches break off; the next ones may be refused as expired (410)."""

    whom: Whom
    gone: bool


@dataclass(frozen=True)
class Mute:
    """Watches say nothing for so many milliseconds, and are not ended: caches are stale."""

    whom: Whom
    milliseconds: int


@dataclass(frozen=True)
class Blind:
    """Watches of pods are not answered, each for as long as an attempt takes; all others go on at once."""

    whom: Whom
    times: int


@dataclass(frozen=True)
class Slow:
    """From now on requests of a method take so many milliseconds longer to get to the server."""

    whom: Whom
    method: Method
    milliseconds: int


@dataclass(frozen=True)
class Scale:
    """The StatefulSet is to have so many pods."""

    replicas: int


@dataclass(frozen=True)
class RestartServer:
    """The API server is killed with -9 and comes back."""


ChaosStep = Kill | KillLeader | Lose | Scan | Break | Cut | Mute | Blind | Slow | Scale | RestartServer | Pause


@dataclass(frozen=True)
class Program:
    """What the kubelets do with each of the pods' names in turn, and what happens to all meanwhile."""

    pods: tuple[tuple[PodStep, ...], ...]
    chaos: tuple[ChaosStep, ...]


FAULTS = ("409", "429", "500", "lost", "silent", "refused")
_pauses = st.sampled_from([0, 5, 20, 50, 150, 400]).map(Pause)
_nodes = st.integers(0, NODES - 1)
_calls = st.integers(1, 12)
_removals = st.builds(
    Remove,
    force=st.booleans(),
    cni=st.sampled_from(["in time", "in time", "late", "never", "over time"]),
    node=_nodes,
)
_adds = st.sampled_from([1, 1, 2]).map(Add)
_pod_steps = st.one_of(
    _adds,
    _adds,
    st.builds(Sandbox, st.sampled_from(["first", "late", "never"])),
    st.sampled_from([3, 15, 60]).map(Abandon),
    st.just(Del()),
    st.just(LateDel()),
    _removals,
    _removals,
    _removals,
    st.just(Up()),
    _pauses,
)
_whom = st.sampled_from(["nodes", "nodes", "leader"])
_chaos_steps: st.SearchStrategy[ChaosStep] = st.one_of(
    st.builds(Kill, _nodes, _calls, st.booleans()),
    st.builds(Kill, _nodes, _calls, st.booleans()),
    st.builds(KillLeader, st.integers(1, 6), st.booleans()),
    st.builds(Lose, _nodes, st.sampled_from([200, 1500, 2500])),
    st.just(Scan()),
    st.builds(
        Break,
        _whom,
        st.sampled_from(FAULTS),
        st.sampled_from(["POST", "PUT", "DELETE", "DELETE", "GET"]),
        st.integers(1, 3),
    ),
    st.builds(
        Break,
        _whom,
        st.sampled_from(FAULTS),
        st.sampled_from(["POST", "PUT", "DELETE", "DELETE", "GET"]),
        st.integers(1, 3),
    ),
    st.builds(Cut, _whom, st.booleans()),
    st.builds(Mute, _whom, st.sampled_from([300, 1000])),
    st.builds(Mute, _whom, st.sampled_from([300, 1000])),
    st.builds(Blind, _whom, st.integers(1, 2)),
    st.builds(Slow, _whom, st.sampled_from(["POST", "PUT", "DELETE", "GET"]), st.sampled_from([0, 50, 300, 1000])),
    st.integers(0, STATEFUL).map(Scale),
    _pauses,
    _pauses,
)


@st.composite
def programs(draw: st.DrawFn, *, restarts: bool = False, most: int = 8) -> Program:
    """Programs with up to `most` steps for each name; with `restarts`, the API server is killed in one of eight."""
    pods = tuple(tuple(draw(st.lists(_pod_steps, min_size=3, max_size=most))) for _ in range(SLOTS))
    chaos = draw(st.lists(_chaos_steps, min_size=2, max_size=most))
    if restarts and draw(st.integers(0, 7)) == 7:
        chaos.insert(draw(st.integers(0, len(chaos))), RestartServer())
    return Program(pods, tuple(chaos))


LATE_DELS = Program(
    (
        (Add(1), Remove(force=True, cni="late", node=0), Add(1), Pause(400), Add(1)),
        (Add(1), Remove(force=False, cni="late", node=1), Add(1), Pause(400), Remove(True, "late", 1), Add(1)),
        (Add(1), LateDel(), Sandbox("late"), Pause(400)),
        (Add(1), Remove(force=True, cni="late", node=0), Add(1), Pause(400), Add(1)),
        (Add(1), Pause(400)),
    ),
    (),
)
"""DELs that come when the name's next pod has its addresses, on the same node."""
