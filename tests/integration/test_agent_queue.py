"""Replay of queued deletions: order, retries, what is set aside, and that no ADD overtakes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent.host import Reply
from agent.queue import CallQueue
from agent.settings import QueueSettings
from agent.wire import Request, Status, decode_env, encode_frame
from plugins.errors import TryAgainLaterError
from tests.integration.installation import CONFIG, ROOT, Installation, collect, netns

DONE = Reply(Status.DONE, b"")


@pytest.fixture
def cni(tmp_path: Path) -> Installation:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    return Installation(tmp_path)


@pytest.fixture(scope="session")
def pod() -> Iterator[str]:
    with netns() as path:
        yield path


def stub(**orders: Any) -> dict[str, Any]:
    return {**CONFIG, "stub": orders}


def ended(cni: Installation) -> list[str]:
    return [line.split()[3] for line in cni.recorded() if line.startswith("end")]


def test_everything_is_replayed_once_before_the_first_add(cni: Installation, pod: str) -> None:
    for number in range(40):
        cni.call("DEL", CNI_CONTAINERID=f"c{number}").empty()
    cni.call("GC", {**CONFIG, "cniVersion": "1.1.0"}).empty()
    assert len(cni.queued()) == 41
    add = cni.start("ADD", netns=pod, CNI_CONTAINERID="new")
    with cni.agent():
        assert collect(add).status == 0
        assert cni.queued() == []
    lines = [line.split()[1:4] for line in cni.recorded() if line.startswith("end")]
    assert lines[-1] == ["spiderpool", "ADD", "new"]
    replayed = [["spiderpool", "DEL", f"c{number}"] for number in range(40)] + [["spiderpool", "GC", "0"]]
    assert sorted(lines[:-1]) == sorted(replayed)


def test_one_containers_plugins_are_replayed_in_order(cni: Installation) -> None:
    config = stub(sleep=0.05)
    for number in range(5):
        cni.call("DEL", config, name="coordinator", CNI_CONTAINERID=f"c{number}").empty()
        cni.call("DEL", config, name="spiderpool", CNI_CONTAINERID=f"c{number}").empty()
    with cni.agent():
        pass
    for number in range(5):
        mine = [line.split()[:2] for line in cni.recorded() if f" c{number} " in line]
        assert mine == [[when, who] for who in ("coordinator", "spiderpool") for when in ("begin", "end")]


def test_an_add_for_the_same_container_waits_for_its_queued_deletion(cni: Installation, pod: str) -> None:
    """Also while the agent runs; and waiting for it must not be in its way."""
    with cni.agent() as agent:
        paths = (cni.bin / ".spiderpool.paths").read_text()
        cni.settle(f"{cni.root}/nobody.sock\n{cni.queue}\n")
        cni.call("DEL", stub(sleep=0.5), CNI_CONTAINERID="same").empty()
        cni.settle(paths)
        assert cni.call("ADD", netns=pod, CNI_CONTAINERID="same").status == 0
        assert agent.process.poll() is None
    assert [line.split()[:3] for line in cni.recorded()] == [
        ["begin", "spiderpool", "DEL"],
        ["end", "spiderpool", "DEL"],
        ["begin", "spiderpool", "ADD"],
        ["end", "spiderpool", "ADD"],
    ]


def test_a_deletion_does_not_overtake_an_add_that_waits(cni: Installation, pod: str) -> None:
    """The caller of the ADD may be gone by now: executed after the DEL, it would leave an address to nobody."""
    cni.call("DEL", stub(error="again"), CNI_CONTAINERID="stuck").empty()
    with cni.agent("--queue-wait=1", ready=False):
        add = cni.start("ADD", netns=pod, CNI_CONTAINERID="c")
        time.sleep(0.1)
        while not cni.socket.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        delete = cni.start("DEL", CNI_CONTAINERID="c")
        collect(delete).empty()
        assert add.poll() is not None
        collect(add).error(11)
    assert [line.split()[:4] for line in cni.recorded() if " c " in line] == [
        ["begin", "spiderpool", "DEL", "c"],
        ["end", "spiderpool", "DEL", "c"],
    ]


def test_malformed_files_are_set_aside_and_block_nothing(cni: Installation, pod: str) -> None:
    cni.call("DEL", CNI_CONTAINERID="good").empty()
    whole = cni.queued()[0].read_bytes()
    bad = {
        "00000000000000000001-0000000001.call": b"",
        "00000000000000000002-0000000001.call": whole[:-1],
        "00000000000000000003-0000000001.call": whole + b"x",
        "00000000000000000004-0000000001.call": b"nonsense",
        "00000000000000000005-0000000001.call": os.urandom(3 << 20),
        "00000000000000000006-0000000001.call": encode_frame({"CNI_COMMAND": "DEL"}, b"{"),
        "what is this": whole,
    }
    for name, data in bad.items():
        (cni.queue / name).write_bytes(data)
    (cni.queue / "00000000000000000007-0000000001.call").symlink_to("/etc/passwd")
    (cni.queue / "00000000000000000008-0000000001.call").mkdir()
    os.mkfifo(cni.queue / "00000000000000000009-0000000001.call")
    (cni.queue / "00000000000000000010-0000000001.call").write_bytes(whole)
    os.chown(cni.queue / "00000000000000000010-0000000001.call", 65534, 65534)
    old = cni.queue / "00000000000000000011-0000000001.call.tmp"
    old.write_bytes(whole[:5])
    os.utime(old, (1, 1))
    young = cni.queue / "00000000000000000012-0000000001.call.tmp"
    young.write_bytes(whole[:5])
    with cni.agent():
        assert cni.call("ADD", netns=pod, CNI_CONTAINERID="new").status == 0
        assert ended(cni) == ["good", "new"]
        assert not old.exists()
        young.unlink()
        assert cni.queued() == []
        assert len(list((cni.queue / "failed").iterdir())) == len(bad) + 4
    assert Path("/etc/passwd").exists()


def test_what_the_plugin_refuses_for_good_is_set_aside_at_once(cni: Installation) -> None:
    cni.call("DEL", stub(error="refused"), CNI_CONTAINERID="bad").empty()
    cni.call("DEL", b"not json", CNI_CONTAINERID="worse").empty()
    with cni.agent() as agent:
        assert cni.queued() == []
        assert len(list((cni.queue / "failed").iterdir())) == 2
        assert sum("moved to" in line["message"] for line in agent.lines()) == 2


# The queue by itself: a replay function in place of the host.


def write(directory: Path, number: int, container: str, command: str = "DEL") -> str:
    name = f"{number:020}-0000000001.call"
    env = {"CNI_COMMAND": command, "CNI_CONTAINERID": container}
    (directory / f"{name}.tmp").write_bytes(encode_frame(env, b"{}"))
    (directory / f"{name}.tmp").rename(directory / name)
    return name


@asynccontextmanager
async def running(directory: Path, replay: Callable[[str], Awaitable[Reply]], **more: Any) -> Any:
    async def execute(request: Request) -> Reply:
        env = decode_env(request.env)
        return await replay(env["CNI_CONTAINERID"] or env["CNI_COMMAND"])

    queue = CallQueue(QueueSettings(directory=str(directory), **more), execute)
    queue.open()
    task = asyncio.create_task(queue.run())
    try:
        yield queue
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (files have no events here)
            await asyncio.sleep(0.01)


def pending(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix == ".call")


def failed(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "failed").iterdir())


def test_failures_are_retried_and_then_set_aside(tmp_path: Path) -> None:
    calls: list[str] = []

    async def replay(container: str) -> Reply:
        calls.append(container)
        outcomes = {"again": 11, "broken": 5, "wrong": 7}
        if container == "healing" and calls.count("healing") == 3:
            return DONE
        return Reply(Status.FAILED, b"why", outcomes.get(container, 5))

    async def scenario() -> None:
        names = {name: write(tmp_path, n, name) for n, name in enumerate(["again", "broken", "healing", "wrong"])}
        async with running(tmp_path, replay, attempts=3, backoff=0.05) as queue:
            await until(lambda: not pending(tmp_path))
            await queue.settled()
        assert failed(tmp_path) == [names["again"], names["broken"], names["wrong"]]
        assert {name: calls.count(name) for name in names} == {"again": 3, "broken": 3, "healing": 3, "wrong": 1}

    asyncio.run(scenario())


def test_what_waiting_does_not_cure_blocks_no_add(tmp_path: Path) -> None:
    async def replay(container: str) -> Reply:
        return Reply(Status.FAILED, b"", 5 if container == "broken" else 11)

    async def scenario() -> None:
        write(tmp_path, 1, "broken")
        write(tmp_path, 2, "broken")  # held back by the first, it blocks nobody else either
        async with running(tmp_path, replay, wait=0.5) as queue:
            await queue.settled()
            await queue.settled("another")
            with pytest.raises(TryAgainLaterError):
                await queue.settled("broken")  # its ADD must not come before a deletion that is tried again
        write(tmp_path, 3, "again")
        async with running(tmp_path, replay, wait=0.3) as queue:
            with pytest.raises(TryAgainLaterError):
                await queue.settled()

    asyncio.run(scenario())


def test_a_failed_deletion_holds_back_its_own_container_only(tmp_path: Path) -> None:
    calls: list[str] = []
    healed = asyncio.Event()

    async def replay(container: str) -> Reply:
        calls.append(container)
        return DONE if healed.is_set() or container != "a" else Reply(Status.FAILED, b"", 11)

    async def scenario() -> None:
        for number, container in enumerate(["a", "b", "a", "b"]):
            write(tmp_path, number, container)
        async with running(tmp_path, replay, backoff=0.1) as queue:
            await until(lambda: calls.count("b") == 2)
            assert calls.count("a") < 4
            healed.set()
            await queue.settled()
        assert pending(tmp_path) == failed(tmp_path) == []

    asyncio.run(scenario())


def test_a_file_that_cannot_be_read_any_more_ends_nothing(tmp_path: Path) -> None:
    async def replay(container: str) -> Reply:
        if container == "first":
            (tmp_path / names[1]).unlink()
            (tmp_path / names[1]).symlink_to("/etc/passwd")
        return DONE

    names = [write(tmp_path, number, container) for number, container in enumerate(["first", "second"])]

    async def scenario() -> None:
        async with running(tmp_path, replay, concurrency=1) as queue:
            await queue.settled()
            await until(lambda: not pending(tmp_path))
        assert failed(tmp_path) == [names[1]]

    asyncio.run(scenario())


def test_a_gc_is_tried_once(tmp_path: Path) -> None:
    """Repeated later, its list of valid attachments would delete what was attached in between."""
    calls: list[str] = []

    async def replay(container: str) -> Reply:
        calls.append(container)
        return Reply(Status.FAILED, b"", 11)

    async def scenario() -> None:
        name = write(tmp_path, 1, "", "GC")
        async with running(tmp_path, replay) as queue:
            await queue.settled()
        assert calls == ["GC"]
        assert failed(tmp_path) == [name]

    asyncio.run(scenario())


def test_new_files_are_noticed_at_once(tmp_path: Path) -> None:
    async def replay(_container: str) -> Reply:
        return DONE

    async def scenario() -> None:
        async with running(tmp_path, replay):
            for number in range(20):
                await asyncio.sleep(0.005)
                name = write(tmp_path, number, "c")
                started = time.monotonic()
                while (tmp_path / name).exists():
                    await asyncio.sleep(0.001)
                    assert time.monotonic() - started < 0.5

    asyncio.run(scenario())


def test_the_folder_of_failures_is_bounded(tmp_path: Path) -> None:
    async def replay(_container: str) -> Reply:
        return Reply(Status.FAILED, b"", 7)

    async def scenario() -> None:
        for number in range(30):
            write(tmp_path, number, f"c{number}")
        async with running(tmp_path, replay, keep_failed=5) as queue:
            await queue.settled()
        assert len(failed(tmp_path)) == 5

    asyncio.run(scenario())


def test_many_containers_replay_side_by_side(tmp_path: Path) -> None:
    active = peak = 0

    async def replay(_container: str) -> Reply:
        nonlocal active, peak
        active += 1
        peak = max(peak, active)
        await asyncio.sleep(0.005)
        active -= 1
        return DONE

    async def scenario() -> None:
        for number in range(50):
            write(tmp_path, number, f"c{number}")
        async with running(tmp_path, replay, concurrency=4) as queue:
            await queue.settled()
        assert peak == 4

    asyncio.run(scenario())


def test_agent_killed_at_random_while_shims_call(cni: Installation, pod: str) -> None:
    """Every output is valid; every DEL that was answered with success ends, in the agent or out of the queue."""
    rng = random.Random(4)
    answered: set[str] = set()
    deadline = time.monotonic() + 60
    number = 0
    for _round in range(6):
        with cni.agent(ready=rng.random() < 0.7) as agent:
            running_calls = []
            for _ in range(20):
                number += 1
                command = rng.choice(["ADD", "DEL", "DEL", "CHECK"])
                config = stub(sleep=rng.random() * 0.05)
                call = cni.start(command, config, netns=pod, CNI_CONTAINERID=f"c{number}")
                running_calls.append((command, f"c{number}", call))
            time.sleep(rng.random() * 0.3)
            agent.kill()
            for command, container, call in running_calls:
                if command == "ADD":
                    continue
                outcome = collect(call)
                if command == "DEL":
                    outcome.empty()
                    answered.add(container)
                elif outcome.status:
                    outcome.error(11)
            adds = [call for command, _, call in running_calls if command == "ADD"]
        with cni.agent():
            for call in adds:
                outcome = collect(call)
                if outcome.status:
                    outcome.error(11)
                else:
                    assert json.loads(outcome.stdout)["ips"] == []
        assert time.monotonic() < deadline
    with cni.agent():
        assert cni.queued() == []
        assert not list((cni.queue / "failed").iterdir())
    done = {line.split()[3] for line in cni.recorded() if line.startswith("end spiderpool DEL")}
    assert len(answered) > 30
    assert answered <= done
