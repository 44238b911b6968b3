"""Kills at every point: one operation, killed at its first call to the API, then at the second, and so on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.kube.history import Pod
from tests.kube.history_play import DURING, GC_LIMIT, SLACK, Play, Slot
from tests.kube.history_processes import DiedError, Process
from tests.kube.history_program import SLOTS, STATEFUL, Remove
from tests.kube.history_stage import now

_MOST = 40
"""Calls of one operation at most."""
_QUIET = 0.1
"""Seconds without a call after which an operation, with all that it left to the background, is through."""

Step = Callable[[], Awaitable[None]]


async def kills_in_add(play: Play) -> int:
    """A pod's first ADD; the next one must give it a whole set."""
    slot = play.slots[0]

    async def prepare() -> None:
        await slot.there()

    async def act() -> None:
        await slot.add(await slot.there())

    async def mend() -> None:
        await must_be_given(slot)
        await slot.remove(await slot.there(), Remove(force=False, cni="in time", node=0))

    return await _killed_at_each(play, play.stage.nodes[0].agent, prepare, act, mend)


async def kills_in_del(play: Play) -> int:
    """The DEL of a pod that goes; the next one must leave nothing."""
    slot = play.slots[0]

    async def prepare() -> None:
        await must_be_given(slot)
        await play.stage.delete(await slot.there(), 1)

    async def act() -> None:
        assert slot.pod is not None
        await slot.cni("DEL", slot.pod, slot.container)

    async def mend() -> None:
        await act()
        assert slot.pod is not None
        assert slot.pod.uid not in (await play.stage.claims()).values()
        await play.stage.delete(slot.pod, 0)

    return await _killed_at_each(play, play.stage.nodes[0].agent, prepare, act, mend)


async def kills_in_take_over(play: Play) -> int:
    """The ADD of a StatefulSet's pod on another node than the last: whatever happens, the addresses stay the same."""
    slot = play.slots[SLOTS - STATEFUL]

    async def prepare() -> None:
        slot.next_node = 0
        if slot.pod is not None:
            await slot.remove(slot.pod, Remove(force=True, cni="never", node=0))
        await must_be_given(slot)
        await slot.remove(await slot.there(), Remove(force=True, cni="late", node=1))
        await slot.there()

    async def act() -> None:
        await slot.add(await slot.there())

    async def mend() -> None:
        await must_be_given(slot)

    return await _killed_at_each(play, play.stage.nodes[1].agent, prepare, act, mend)


async def kills_in_reclaim(play: Play) -> int:
    """The release of a pod's addresses that nobody else releases."""
    slot = play.slots[0]

    async def prepare() -> None:
        await must_be_given(slot)

    async def act() -> None:
        await slot.remove(await slot.there(), Remove(force=True, cni="never", node=0))
        await released(play, slot.pod, play.stage.leader)

    async def mend() -> None:
        await released(play, slot.pod)

    return await _killed_at_each(play, play.stage.leader, prepare, act, mend)


async def _killed_at_each(play: Play, process: Process, prepare: Step, act: Step, mend: Step) -> int:
    """How many calls the operation makes: at so many it was killed, after and during each."""
    for calls in range(1, _MOST):
        deaths = 0
        for within in (None, DURING):
            await process.ensure()
            await prepare()
            await _quiet(process)
            play.stage.note(f"kill at call {calls}, {'after' if within is None else 'during'} it")
            await process.arm(calls, within)
            await act()
            await _quiet(process)
            deaths += not process.alive
            await process.arm(0)
            await process.ensure()
            await mend()
        if not deaths:
            return calls - 1
    raise AssertionError(f"an operation with {_MOST} calls")


async def _quiet(process: Process) -> None:
    """Return when it has nothing to do and has made no calls for a while, or is dead."""
    last = -1
    try:
        while True:
            answer = await process.answer("count")
            if answer["idle"] and answer["calls"] == last:
                return
            last = answer["calls"]
            await asyncio.sleep(_QUIET)
    except DiedError:
        return


async def must_be_given(slot: Slot) -> None:
    """An ADD for the slot's pod, which succeeds."""
    call = await slot.add(await slot.there())
    assert call.given, f"{slot.name} gets nothing: {call.error or 'its agent died'}"


async def released(play: Play, pod: Pod | None, process: Process | None = None) -> None:
    """Wait until the pod's claims are gone, or the process is."""
    end = now() + GC_LIMIT + SLACK
    assert pod is not None
    while pod.uid in (await play.stage.claims()).values():
        if process is not None and not process.alive:
            return
        assert now() < end, f"claims of {pod.uid} are still there"
        await asyncio.sleep(0.05)
