"""Scripts for the windows of known races, each as short as it can be.

What has to happen in the window happens while the proxy holds a named request up, so neither luck nor the machine's
speed decides whether the window is met. `mutants` has for each a mistake in the code that it finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from tests.kube.fault_proxy import Fault, Hold
from tests.kube.history_child import ATTEMPT
from tests.kube.history_kills import must_be_given, released
from tests.kube.history_play import Play, Slot
from tests.kube.history_program import Remove
from tests.kube.history_stage import OURS, SlowProxy

T = TypeVar("T")

CLAIMS = "spideripclaims"
PATIENT = 8.0
"""Seconds of an attempt that outlasts what happens while it is held up."""
BOTH = 2
"""Requests of one step of an ADD or DEL: one for each family."""


class Aimed(NamedTuple):
    """A script, and when its processes count an answer as lost."""

    script: Callable[[Play], Awaitable[None]]
    attempt: float = ATTEMPT


async def overtaken_del(play: Play) -> None:
    """A DEL's deletions are under way when the reclaim makes them, and another pod gets the addresses."""
    web, *others, last = play.slots
    await _serve(web, *others)
    pod = await web.there()
    hold = _nodes(play).hold("DELETE", CLAIMS, BOTH)
    await play.stage.delete(pod, 0)
    ending = _begin(web.cni("DEL", pod, web.container))
    await hold.full()
    await released(play, pod)
    await must_be_given(last)
    await _let_go(hold)
    await ending


async def overtaken_reclaim(play: Play) -> None:
    """The reclaim's deletions are under way when the pod's DEL makes them, and another pod gets the addresses."""
    web, *others, last = play.slots
    await _serve(web, *others)
    pod = await web.there()
    hold = _leader(play).hold("DELETE", CLAIMS, BOTH)
    await play.stage.delete(pod, 0)
    await hold.full()
    await web.cni("DEL", pod, web.container)
    await must_be_given(last)
    await _let_go(hold)


async def reclaim_overtaken_by_take_over(play: Play) -> None:
    """The reclaim's deletions are under way when the StatefulSet grows again, and its pod takes the claims over."""
    *_, db, _ = play.slots
    await must_be_given(db)
    hold = _leader(play).hold("DELETE", CLAIMS, BOTH)
    await play.stage.scale(0)
    await hold.full()
    await play.stage.scale(2)
    await must_be_given(db)
    await _let_go(hold)


async def overtaken_take_over(play: Play) -> None:
    """A take-over is under way when its pod is replaced by another, which takes the same claims over."""
    await _replaced_during(play, "PUT", CLAIMS)


async def late_take_over(play: Play) -> None:
    """An ADD comes to its predecessor's claims when its pod was replaced by another, which has taken them over."""
    await _replaced_during(play, "GET", "spiderendpoints")


async def _replaced_during(play: Play, method: str, resource: str) -> None:
    *_, db, _ = play.slots
    await must_be_given(db)
    await _told(play, db)
    await db.remove(await db.there(), Remove(force=True, cni="never", node=1))
    pod = await db.there()
    hold = _nodes(play).hold(method, resource, 1)
    adding = _begin(db.add(pod))
    await hold.full()
    await db.remove(pod, Remove(force=True, cni="never", node=2))
    await must_be_given(db)
    await _let_go(hold)
    await adding


async def take_over_of_what_others_got(play: Play) -> None:
    """A take-over is under way when its claims are released, since the set shrinks, and others get the addresses."""
    *webs, db, _ = play.slots
    await must_be_given(db)
    first = await db.there()
    await db.remove(first, Remove(force=True, cni="never", node=1))
    pod = await db.there()
    hold = _nodes(play).hold("PUT", CLAIMS, 1)  # one family after the other
    adding = _begin(db.add(pod))
    await hold.full()
    await play.stage.scale(0)
    await released(play, first)
    await _serve(*webs)
    await play.stage.scale(2)
    await must_be_given(play.slots[-1])
    await _let_go(hold)
    await adding


async def one_address_for_two(play: Play) -> None:
    """Two nodes claim the last address at the same time."""
    *webs, one, two = play.slots
    await _serve(*webs)
    await one.there()
    await two.there()
    hold = _nodes(play).hold("POST", CLAIMS, 2 * BOTH)
    adding = [_begin(each.add(await each.there())) for each in (one, two)]
    await hold.full()
    await _let_go(hold)
    await asyncio.gather(*adding)


async def unseen_pod(play: Play) -> None:
    """The reclaim hears of claims and not of their pod."""
    web, *_ = play.slots
    leader = _leader(play)
    blind = leader.hold("WATCH", "pods", 100)
    asked, freed = leader.hold("GET", "pods", 1), leader.hold("DELETE", CLAIMS, 1)
    asked.let_go()
    freed.let_go()
    leader.cut()
    await blind.some()
    await must_be_given(web)
    looks = [_begin(each.full()) for each in (asked, freed)]
    await asyncio.wait(looks, return_when=asyncio.FIRST_COMPLETED)  # either it makes sure, or it does not
    for look in looks:
        look.cancel()
    await asyncio.wait(looks)


async def creation_that_lands_late(play: Play) -> None:
    """The claims of an ADD are made after it has stopped waiting for the answers, and it or the next has gone on."""
    web, *_ = play.slots
    hold = _nodes(play).hold("POST", CLAIMS, BOTH)
    await web.add(await web.there())
    await must_be_given(web)
    await _let_go(hold)


async def creation_that_lands_after_its_add(play: Play) -> None:
    """The claims of an ADD are made when it was given up and undone, and the pod has got others."""
    web, *_ = play.slots
    hold = _nodes(play).hold("POST", CLAIMS, BOTH)
    await web.add(await web.there(), abandon=hold.full)
    await must_be_given(web)
    await _let_go(hold)


async def creation_in_doubt_for_long(play: Play) -> None:
    """The answers to all of a creation's attempts are lost, it lands meanwhile, and the next attempt is told so."""
    web, *_ = play.slots
    rounds = _nodes(play).hold("POST", CLAIMS, 3 * BOTH)
    again = _nodes(play).hold("POST", CLAIMS, BOTH)
    adding = _begin(web.add(await web.there()))
    await rounds.full()
    await again.full()
    await _let_go(rounds)
    await _let_go(again)
    await adding
    await must_be_given(web)


async def creation_that_is_lost(play: Play) -> None:
    """Connections break before the API server hears of the creations; then another pod comes."""
    *webs, one, two = play.slots
    await _serve(*webs)
    await one.there()
    _nodes(play).faults += [Fault("POST", f"/{CLAIMS}", times=BOTH)]
    await one.add(await one.there())
    await two.add(await two.there())


async def other_name(play: Play) -> None:
    """Addresses are kept for a StatefulSet's pod, and another one of the set asks for its first."""
    *_, other, db = play.slots
    await must_be_given(db)
    await db.remove(await db.there(), Remove(force=True, cni="never", node=1))
    await must_be_given(other)
    await db.add(await db.there())


async def kept_while_others_want_it(play: Play) -> None:
    """Addresses are kept for a StatefulSet's pod, and a pod that finds no other free wants one."""
    *webs, other, db = play.slots
    await _serve(*webs, db)
    await db.remove(await db.there(), Remove(force=True, cni="never", node=1))
    await play.stage.leader.answer("scan")
    for _ in range(10):
        await other.add(await other.there())
        await asyncio.sleep(0.1)
    await webs[0].remove(await webs[0].there(), Remove(force=False, cni="in time", node=0))
    await must_be_given(db)


async def del_of_an_earlier_sandbox(play: Play) -> None:
    """A pod that is going has its second sandbox when the DEL of its first one comes."""
    web, *_ = play.slots
    await must_be_given(web)
    first = web.container
    pod = await web.there()
    web.new_box(pod)
    await must_be_given(web)
    await play.stage.delete(pod, 20)
    await web.cni("DEL", pod, first)
    await play.log_is_complete()  # the hold ends with the next DEL
    await web.cni("DEL", pod, web.container)
    await play.stage.delete(pod, 0)


AIMED = {
    "overtaken-del": Aimed(overtaken_del, PATIENT),
    "overtaken-reclaim": Aimed(overtaken_reclaim, PATIENT),
    "reclaim-overtaken-by-take-over": Aimed(reclaim_overtaken_by_take_over, PATIENT),
    "overtaken-take-over": Aimed(overtaken_take_over, PATIENT),
    "late-take-over": Aimed(late_take_over, PATIENT),
    "take-over-of-what-others-got": Aimed(take_over_of_what_others_got, PATIENT),
    "one-address-for-two": Aimed(one_address_for_two, PATIENT),
    "unseen-pod": Aimed(unseen_pod, PATIENT),
    "creation-that-lands-late": Aimed(creation_that_lands_late),
    "creation-that-lands-after-its-add": Aimed(creation_that_lands_after_its_add, PATIENT),
    "creation-in-doubt-for-long": Aimed(creation_in_doubt_for_long),
    "creation-that-is-lost": Aimed(creation_that_is_lost),
    "other-name": Aimed(other_name),
    "kept-while-others-want-it": Aimed(kept_while_others_want_it),
    "del-of-an-earlier-sandbox": Aimed(del_of_an_earlier_sandbox),
}


def _nodes(play: Play) -> SlowProxy:
    return play.stage.proxies["nodes"]


def _leader(play: Play) -> SlowProxy:
    return play.stage.proxies["leader"]


async def _serve(*slots: Slot) -> None:
    for slot in slots:
        await must_be_given(slot)


async def _told(play: Play, slot: Slot) -> None:
    """Return when the pod's endpoint is there, which agents write a moment after the ADD."""
    path = f"{OURS}/namespaces/{play.stage.namespace}/spiderendpoints/{slot.name}"
    async with asyncio.timeout(30):
        while (await play.stage.ask("GET", path, fine=(404,)))[0] == 404:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def _let_go(hold: Hold) -> None:
    hold.let_go()
    await hold.over()


def _begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.create_task(work)
