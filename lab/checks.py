"""What the lab proves, one row for each; nothing is taken on trust that can be looked at from outside."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from lab import checks_faults, checks_traffic, lifecycle, nodes, pods
from lab.layout import NODES, STANDING, Lab, LabError
from lab.process import last_lines
from lab.state import State, locked
from lab.table import Row

Work = Callable[[State], list[str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table: `work` returns the evidence, or raises LabError with what was wrong."""

    name: str
    title: str
    work: Work


QUIET: Sequence[Check] = (
    Check("addresses", "Dual-stack addresses from the pools, each with its claim", checks_traffic.addresses),
    Check("agents", "Agents are healthy and say so", checks_traffic.agents),
    Check("same-node", "Pod ↔ pod on one node", checks_traffic.same_node),
    Check("cross-node", "Pod ↔ pod across nodes", checks_traffic.cross_node),
    Check("outside", "Outside ↔ pod through the router, addresses unchanged", checks_traffic.outside),
    Check("host", "Host ↔ its own pods (macvlan alone cannot)", checks_traffic.host),
    Check("service-tcp", "Pod → service, TCP: the wire sees the backend, never the VIP", checks_traffic.service_tcp),
    Check("service-udp", "Pod → service, UDP: the same, connected or not", checks_traffic.service_udp),
    Check("service-host", "Host process → service", checks_traffic.service_host),
    Check("service-spread", "A service uses all its backends", checks_traffic.service_spread),
    Check("cni-check", "CNI CHECK agrees, and notices what is broken", checks_faults.cni_check),
    Check("repair", "What somebody takes from pods on their node is restored", checks_faults.repaired),
    Check("stolen", "A stolen address is refused and replaced", checks_faults.stolen),
    Check("dead-gateway", "A gateway that does not answer is reported", checks_faults.dead_gateway),
    Check("exhaustion", "An exhausted pool is named", checks_faults.exhaustion),
    Check("retry", "A retried ADD keeps its addresses, a late DEL does not free them", checks_faults.retry),
)
"""Independent of each other: all at once."""

OUTAGE: Sequence[Check] = (
    Check("killed", "Agent killed with -9: connections and new lookups go on", checks_faults.killed),
    Check("queued", "Meanwhile ADD says try again, DEL succeeds and waits", checks_faults.queued),
)
"""At once: the second begins when the first has killed the agent."""

RECOVERY = (Check("replayed", "After the restart: DEL is replayed, news is learnt", checks_faults.replayed),)
DELETION = (Check("gone", "Everything is gone after deletion", checks_faults.gone),)

PHASES: Sequence[Sequence[Check]] = (QUIET, OUTAGE, RECOVERY, DELETION)
"""One after the other."""


def _prove(check: Check, state: State) -> Row:
    begin = time.monotonic()
    try:
        ok, evidence = True, check.work(state)
    except LabError as error:
        ok, evidence = False, str(error).splitlines()
    except Exception as error:  # noqa: BLE001 - whatever it is, this row is not proven, and the others go on
        ok, evidence = False, [f"{type(error).__name__}: {error}", *traceback.format_exc().splitlines()[-4:-1]]
    return Row(check.name, check.title, ok, tuple(evidence), time.monotonic() - begin)


def run(lab: Lab) -> Iterator[Row]:
    """The rows, in order, as they are proven. Raises LabError if the lab is not up."""
    state = State.load(lab)
    if not state.complete:
        raise lifecycle.not_up(lab)
    with locked(lab):
        for node in NODES:
            if not nodes.agent_runs(state, node.name):
                log = lab.log(nodes.agent(node.name))
                raise LabError(f"the agent of {node.name} does not run; the end of {log}:\n{last_lines(log)}")
        passing = state.attachments.keys() - {pod.name for pod in STANDING}
        lifecycle.parallel(partial(pods.destroy, state, pod) for pod in passing)  # a check that was killed left them
        checks_faults.remember(state)
        with ThreadPoolExecutor(max_workers=len(QUIET)) as pool:
            for phase in PHASES:
                yield from pool.map(partial(_prove, state=state), phase)
