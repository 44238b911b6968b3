"""The repair loop: restores on the node what pods need and somebody has taken away.

Network daemons flush rules and routes they do not know, people restart them, udev changes MAC addresses. The kernel
tells of it, and the pod concerned is looked at; when news were lost, at the start and once in a while all are. What
should be there is not remembered but found out (`plugins/coordinator/mending.py`), so it is the same after a restart.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

from agent import metrics
from agent.recheck import open_netns
from api.claim import Claim
from api.ranges import Address
from plugins.coordinator.attachment import Attachment, alias_parts
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.mending import NodeSeen, Terms
from plugins.coordinator.news import Concern, Known, concern, open_news
from plugins.coordinator.repair import Outcome, Suspect, mend_pod, mend_rules, see_node
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import CniError, InvalidEnvironmentError
from plugins.net.netlink import Netlink

_log = logging.getLogger(__name__)

SHARE = 10.0
"""A comparison of all pods is followed by a pause of so many times its length, when news are lost all the time."""
PATIENCE = 2.0
"""Seconds that a look at pods waits for NICs that are just being attached."""
RETRY = 5.0
"""Seconds after which a node that could not be looked at is looked at again."""
TOLD = 8
"""Repairs of one pod that the log names."""
NODE = ""
"""What is no pod's: stands for a container id."""


@dataclass(frozen=True, slots=True)
class _Pod:
    """A pod that may have attachments on this node."""

    container_id: str
    pair: int = 0
    netns: str = ""
    netns_inode: int = 0
    name: str = ""


@dataclass(slots=True)
class _Restraint:
    """What had to be repaired is left alone for a while: somebody may be taking away what we bring."""

    times: int
    until: float
    """Loop time."""


class RepairLoop:
    """Repairs until cancelled. One pod at a time."""

    def __init__(
        self,
        coordinator: Coordinator,
        settings: CoordinatorSettings,
        claims: Callable[[], Iterable[Claim]],
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        """`claims` tells those of this node, all of them once `ready` has returned."""
        self._coordinator = coordinator
        self._settings = settings
        self._claims = claims
        self._ready = ready
        self._known: dict[str, Known] = {}
        """By container, as its last look found it."""
        self._tables: dict[int, int] = {}
        self._again: dict[str, float] = {}
        """Loop time at which a container is to be looked at, whatever is told of it."""
        self._restraints: dict[str, _Restraint] = {}
        self._cut_off: set[str] = set()
        self._addresses: tuple[object, ...] = ()
        """The node's, as the last look saw them."""
        self._next_full = 0.0
        self._earliest_full = 0.0

    async def run(self) -> None:
        """Repair until cancelled. Raises OSError if the kernel gives no socket."""
        await self._ready()
        news = open_news(self._settings.kernel_timeout)
        try:
            while True:
                await self._work(self._read(news))
                await self._wait(news)
        finally:
            news.close()

    def _read(self, news: Netlink) -> Concern:
        """What is told."""
        by_address = {address: known for known in self._known.values() for address in known.addresses}
        by_link = {known.ifindex: known for known in self._known.values()}
        try:
            return concern(news.pending(), by_link, by_address)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            _log.debug("news of changes were lost")
            return Concern(everything=True)

    async def _wait(self, news: Netlink) -> None:
        """Until there is news, and a moment for more of it, or something is due."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        loop.add_reader(news.fileno(), woken.set)
        try:
            async with asyncio.timeout_at(min((self._next_full, *self._again.values()))):
                await woken.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(news.fileno())
        await asyncio.sleep(self._settings.repair_gather)

    async def _work(self, found: Concern) -> None:
        """Look at what is of concern, and at what is due."""
        loop = asyncio.get_running_loop()
        if found.everything:
            self._next_full = min(self._next_full, self._earliest_full)
        began = loop.time()
        is_full = began >= self._next_full
        due = [container for container, moment in self._again.items() if moment <= began]
        if not (found or is_full or due):
            return
        await self._calm()
        try:
            terms = await self._terms()
            tables = {terms.default_table, *terms.tables.values()}
            view, pairs = await self._coordinator.on_node(lambda host: see_node(host, tables))
            self._tables.update(view.tags)
            pods = self._pods(pairs)
            if is_full or found.rules or NODE in due:
                await self._look_at_rules(view)
            if found.addresses_of_node and self._addresses != (view.own, view.present):
                is_full = True
            self._addresses = (view.own, view.present)
            targets = pods if is_full else {*due, *self._concerned(found, pairs, terms.holders)} - {NODE}
            for container in [*targets]:
                self._again.pop(container, None)
                if container in pods:
                    await self._look(pods[container], view, terms)
                else:
                    self._forget(container)
        except CniError as error:
            metrics.REPAIR_FAILURES.inc()
            _log.warning("the node cannot be looked at: %s", error)
            self._next_full = loop.time() + min(RETRY, self._settings.repair_interval)
            return
        if is_full:
            now = loop.time()
            self._next_full = now + self._settings.repair_interval
            self._earliest_full = now + max(self._settings.repair_gather, SHARE * (now - began))
            for container in (self._known.keys() | self._cut_off | self._restraints.keys()) - {*pods, NODE}:
                self._forget(container)
            tags = {tag for known in self._known.values() for tag in known.tags}
            self._tables = {tag: table for tag, table in self._tables.items() if tag in tags}
        metrics.CUT_OFF.set(len(self._cut_off))

    async def _calm(self) -> None:
        """Let pods that are starting go first."""
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE
        while self._coordinator.is_busy and loop.time() < end:  # noqa: ASYNC110 - the hot path need not tell
            await asyncio.sleep(self._settings.repair_gather)

    async def _terms(self) -> Terms:
        try:
            settings = await self._coordinator.defaults()
        except CniError:
            settings = self._settings
        holders: dict[Address, str] = {}
        for claim in self._claims():
            with suppress(ValueError):  # written by hand, and no address
                holders[ip_address(claim.spec.address)] = claim.spec.container_id
        return Terms(
            holders, self._tables, settings.host_rule_table, settings.pod_default_cni_nic, settings.kernel_timeout
        )

    def _pods(self, pairs: Mapping[str, int]) -> dict[str, _Pod]:
        """The pods of this node by container id: those with a pair of ours, and those with claims."""
        found: dict[str, _Pod] = {}
        rest = dict(pairs)
        for claim in self._claims():
            spec = claim.spec
            if spec.container_id and spec.container_id not in found and spec.netns:
                whose = alias_parts(Attachment(spec.container_id, "", "").alias)[0]
                found[spec.container_id] = _Pod(
                    spec.container_id, rest.pop(whose, 0), spec.netns, spec.netns_inode, _name(claim)
                )
        for container, pair in rest.items():
            found[container] = _Pod(container, pair, name=f"of container {container}")
        return found

    def _concerned(self, found: Concern, pairs: Mapping[str, int], holders: Mapping[Address, str]) -> set[str]:
        """The containers that news are about."""
        of_links = {index: container for container, index in pairs.items()}
        of_links |= {known.ifindex: known.container_id for known in self._known.values()}
        of_addresses = {a: known.container_id for known in self._known.values() for a in known.addresses} | {**holders}
        concerned = {of_links[index] for index in found.links if index in of_links}
        concerned |= {of_addresses[address] for address in found.addresses if address in of_addresses}
        return concerned | self._cut_off if found.has_new_pair else concerned

    async def _look_at_rules(self, view: NodeSeen) -> None:
        """Restore the rules that all pods share."""
        self._again.pop(NODE, None)
        if self._is_restrained(NODE):
            return
        outcome = await self._coordinator.on_node(lambda host: mend_rules(host, view))
        self._tell("the node", outcome)
        if outcome.done or outcome.failures:
            self._restrain(NODE)

    async def _look(self, pod: _Pod, view: NodeSeen, terms: Terms) -> None:
        """Look at one pod and restore what it lacks."""
        container = pod.container_id
        if self._is_restrained(container):
            return
        try:
            fd = open_netns(pod.netns, pod.netns_inode)
        except (OSError, InvalidEnvironmentError):
            fd = None
            if not pod.pair:
                self._forget(container)  # an address that outlives its pod
                return
        try:
            outcome = await self._coordinator.undisturbed(
                container,
                lambda host, gone: mend_pod(host, Suspect(container, pod.pair, gone), fd, view, terms),
            )
        except CniError as error:
            outcome = Outcome(failures=(str(error),))
        finally:
            if fd is not None:
                os.close(fd)
        if outcome is None:
            self._again[container] = asyncio.get_running_loop().time() + self._settings.repair_gather
            return
        self._note(pod, outcome)
        self._tell(f"pod {pod.name}", outcome)
        if outcome.done or outcome.failures:
            self._restrain(container)

    def _note(self, pod: _Pod, outcome: Outcome) -> None:
        container = pod.container_id
        if outcome.known is not None:
            self._known[container] = outcome.known
        elif not outcome.failures:
            self._known.pop(container, None)
        if outcome.is_cut_off and container not in self._cut_off:
            _log.warning("pod %s has lost its link to the node; only a new sandbox brings it back", pod.name)
        (self._cut_off.add if outcome.is_cut_off else self._cut_off.discard)(container)

    def _tell(self, who: str, outcome: Outcome) -> None:
        for kind in outcome.kinds:
            metrics.REPAIRS.labels(kind).inc()
        if outcome.done:
            more = f" and {len(outcome.done) - TOLD} more" if len(outcome.done) > TOLD else ""
            _log.warning("restored for %s: %s%s", who, "; ".join(outcome.done[:TOLD]), more)
        if outcome.failures:
            metrics.REPAIR_FAILURES.inc()
            _log.warning("cannot restore all for %s: %s", who, "; ".join(outcome.failures[:TOLD]))

    def _is_restrained(self, who: str) -> bool:
        """Whether it is left alone for now; if so, it is looked at later."""
        restraint = self._restraints.get(who)
        if restraint is None or asyncio.get_running_loop().time() >= restraint.until:
            return False
        self._again[who] = restraint.until
        return True

    def _restrain(self, who: str) -> None:
        now, longest = asyncio.get_running_loop().time(), self._settings.repair_interval
        former = self._restraints.get(who)
        times = former.times + 1 if former is not None and now < former.until + longest else 1
        pause = min(longest, self._settings.repair_gather * 2 ** min(times, 20))
        self._restraints[who] = _Restraint(times, now + pause)

    def _forget(self, container: str) -> None:
        for each in (self._known, self._again, self._restraints):
            each.pop(container, None)
        self._cut_off.discard(container)


def _name(claim: Claim) -> str:
    workload = claim.spec.workload
    return f"{workload.namespace}/{workload.pod_name}" if workload is not None else claim.spec.container_id
