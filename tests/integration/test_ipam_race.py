"""Many nodes on one store, and nodes that are killed: no address twice, none lost."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from plugins.errors import ExhaustedError
from tests.integration.ipam_rig import Trouble, addresses, call, claims, opened, pool, running

Outcome = dict[str, Any]


@contextmanager
def child(store: str, node: str, *mode: str) -> Iterator[subprocess.Popen[str]]:
    """A node in a process of its own that is ready for orders."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.ipam_child", store, node, *mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def order(process: subprocess.Popen[str], lines: Iterable[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n".join(lines) + "\n")
    process.stdin.close()


def outcomes(process: subprocess.Popen[str], *, whole: bool = True) -> list[Outcome]:
    """What the child has said; without `whole`, its last line may be cut off."""
    assert process.stdout is not None
    lines = process.stdout.read().splitlines(keepends=True)
    said = [json.loads(line) for line in lines if line.endswith("\n")]
    if whole:
        assert said, process.wait()
        assert said.pop() == {"done": True}
    return [item for item in said if "done" not in item]


async def make_pools(path: str, count: int) -> None:
    async with opened(path) as store:
        await pool(store, "v4", f"10.6.0.1-10.6.0.{count}")
        await pool(store, "v6", f"fd06::1-fd06::{count:x}")


async def check_claims(store: Trouble, owners: dict[str, list[str]]) -> None:
    """Every pod has exactly the claims that its ADD said, and there are no others."""
    held = await claims(store)
    assert sorted(held) == sorted(address for got in owners.values() for address in got)
    for pod, got in owners.items():
        assert {held[address].spec.pod_uid for address in got} == {f"uid-{pod}"}


def test_as_many_pods_as_addresses_on_several_nodes(tmp_path: Path) -> None:
    count, nodes, path = 96, 3, f"{tmp_path}/store.db"
    asyncio.run(make_pools(path, count))
    pods = [f"p{number}" for number in range(count)]
    with child(path, "node0") as one, child(path, "node1") as two, child(path, "node2") as three:
        processes = [one, two, three]
        for number, process in enumerate(processes):
            order(process, [f"ADD {pod}" for pod in pods[number::nodes]])
        said = [item for process in processes for item in outcomes(process)]
    errors = [item for item in said if "error" in item]
    assert not errors
    owners = {item["pod"]: item["got"] for item in said}
    assert sorted(owners) == sorted(pods)
    assert all(len(got) == 2 for got in owners.values())
    assert max(Counter(address for got in owners.values() for address in got).values()) == 1

    async def one_too_many() -> None:
        async with opened(path) as store, running(store, node="node9") as ipam:
            await check_claims(store, owners)
            with pytest.raises(ExhaustedError, match=rf"v4: full \({count} of {count} in use\)"):
                await ipam.add(call("more", v6=("v6",)))
            await check_claims(store, owners)

    asyncio.run(one_too_many())


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9 in the middle of ADDs, eight times; retries on the restarted node complete every set, none changes."""
    path, random = f"{tmp_path}/store.db", Random(7)
    asyncio.run(make_pools(path, 200))
    pods = [f"p{number}" for number in range(180)]
    known: dict[str, list[str]] = {}
    partial = 0
    for turn in range(8):
        with child(path, "node0", *(["split"] if turn % 2 else [])) as process:
            order(process, [f"ADD {pod}" for pod in random.sample(pods, 60)])
            assert process.stdout is not None
            first = process.stdout.readline() if turn > 1 else ""  # however slow the machine is
            time.sleep(random.uniform(0.005, 0.04))
            process.kill()
            said = [*map(json.loads, first.splitlines()), *outcomes(process, whole=False)]
        for item in said:
            assert known.setdefault(item["pod"], item["got"]) == item["got"], f"turn {turn}: other addresses"
        partial += asyncio.run(partial_sets(path))
    with child(path, "node0") as process:
        order(process, [f"ADD {pod}" for pod in pods])
        said = outcomes(process)
    assert [item for item in said if "error" in item] == []
    final = {item["pod"]: item["got"] for item in said}
    assert all(final[pod] == got for pod, got in known.items())

    async def finish() -> None:
        async with opened(path) as store:
            await check_claims(store, final)
            async with running(store, node="node0") as ipam:
                await asyncio.gather(*(ipam.delete(call(pod, "DEL")) for pod in pods))
            assert not await claims(store)

    asyncio.run(finish())
    assert known
    assert partial, "no kill left a partial set: the moments are badly chosen"


async def partial_sets(path: str) -> int:
    async with opened(path) as store:
        sets = Counter(claim.spec.pod_uid for claim in (await claims(store)).values())
        return sum(size == 1 for size in sets.values())


def test_adds_and_dels_of_the_same_pods_on_two_nodes(tmp_path: Path) -> None:
    """Churn in a pool that is too small for all: whoever has an address has it alone, and nothing is left."""

    async def main() -> None:
        path = f"{tmp_path}/store.db"
        async with opened(path) as first, opened(path) as second:
            await pool(first, "v4", "10.6.0.1-10.6.0.8")
            holders: dict[str, str] = {}
            given = refused = 0
            async with running(first, node="a") as one, running(second, node="b") as two:

                async def live(ipam: Any, pod: str, random: Random) -> None:
                    nonlocal given, refused
                    for turn in range(12):
                        sandbox = f"{pod}-{turn}"
                        try:
                            (address,) = addresses(await ipam.add(call(pod, container=sandbox)))
                        except ExhaustedError:
                            refused += 1
                            await asyncio.sleep(random.uniform(0, 0.005))
                        else:
                            given += 1
                            assert holders.setdefault(address, pod) == pod, f"{address} is {holders[address]}'s"
                            await asyncio.sleep(random.uniform(0, 0.005))
                            assert holders.pop(address) == pod
                        await ipam.delete(call(pod, "DEL", container=sandbox))

                workers = [live(ipam, f"{n}{i}", Random(i)) for n, ipam in (("a", one), ("b", two)) for i in range(10)]
                await asyncio.gather(*workers)
            assert given > 100
            assert refused > 0
            assert not await claims(first)

    asyncio.run(main())
