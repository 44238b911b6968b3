"""Pods that a kubelet runs from files, whose objects in the API come and go while the containers go on.

The objects are made here as a kubelet makes them; test_node_static_pods.py has a real one do it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api.claim import Claim, Controller
from api.mirror import MIRROR
from lab.kube.cluster import Cluster
from plugins.errors import PodGoneError
from plugins.ipam.plugin import Ipam
from plugins.ipam.settings import IpamSettings
from tests.integration.ipam_rig import addresses, until
from tests.kube.ipam_pods import CORE, Json, Started, World, pools, world
from tests.kube.reclaim_rig import QUICK, api, leading, new_claim, stays, until_gone
from tests.kube.test_cli import Shell
from tests.kube.test_ipam_retained import settled


@dataclass(frozen=True)
class Node:
    """A node with IPAM, and with static pods."""

    there: World
    name: str
    uid: str
    ipam: Ipam

    async def mirror(self, name: str, of: str, pool: str) -> str:
        """The object for the node's static pod of that UID; its own UID."""
        owner = {"apiVersion": "v1", "kind": "Node", "name": self.name, "uid": self.uid, "controller": True}
        annotations = {
            **pools(pool),
            MIRROR: of,
            "kubernetes.io/config.hash": of,
            "kubernetes.io/config.source": "file",
        }
        meta = {"name": name, "annotations": annotations, "ownerReferences": [owner]}
        spec: Json = {"nodeName": self.name, "containers": [{"name": "c", "image": "none"}]}
        body = {"metadata": meta, "spec": spec}
        made = await self.there.ask("POST", self.there.path(CORE, "pods"), body)
        return str(made["metadata"]["uid"])

    async def unmirror(self, name: str, *, seconds: int = 0) -> None:
        """Delete the object; with `seconds` it goes on terminating."""
        await self.there.ask("DELETE", self.there.path(CORE, "pods", name), {"gracePeriodSeconds": seconds})


@asynccontextmanager
async def a_node(kube: Cluster, settings: IpamSettings | None = None) -> AsyncIterator[Node]:
    name = f"static-{secrets.token_hex(4)}"
    async with world(kube) as there:
        made = await there.ask("POST", f"{CORE}/nodes", {"metadata": {"name": name}})
        try:
            async with there.node(name, settings=settings or IpamSettings()) as ipam:
                yield Node(there, name, made["metadata"]["uid"], ipam)
        finally:
            await there.ask("DELETE", f"{CORE}/nodes/{name}", missing_ok=True)


@pytest.fixture
def shell(kube: Cluster, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(kube, capsys)


def sandbox(path: Path) -> dict[str, Any]:
    """What stands for a network namespace in a call."""
    path.touch()
    return {"netns": str(path), "netns_fd": os.open(path, os.O_RDONLY)}


def test_a_claim_names_its_pod_as_kubelet_does_and_outlives_mirrors(kube: Cluster, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(kube) as node:
            there, ipam = node.there, node.ipam
            v4 = await there.pool("v4", 10, 99)
            pod = Started(there.namespace, "web", "0123456789abcdef0123456789abcdef")
            netns = sandbox(tmp_path / "netns")
            with pytest.raises(PodGoneError):
                await ipam.add(pod.call())
            first = await node.mirror("web", pod.uid, v4)
            given = await ipam.add(pod.call(**netns))
            os.close(netns["netns_fd"])
            (claim,) = (await there.claims()).values()
            assert claim.spec.pod_uid == pod.uid != first
            assert claim.spec.workload is not None
            assert claim.spec.workload.controller == Controller(
                api_version="v1", kind="Node", name=node.name, uid=node.uid
            )
            await settled(ipam)
            endpoint = await there.endpoint("web")
            assert endpoint is not None
            assert endpoint.metadata.owner_references == []  # a mirror's end is not the pod's
            assert endpoint.status is not None
            assert endpoint.status.current.uid == pod.uid

            # Somebody deletes the mirror: the sandbox may be made anew meanwhile, and keeps its address.
            await node.unmirror("web", seconds=600)
            assert await ipam.add(pod.call(netns=netns["netns"])) == given
            await ipam.delete(pod.call("DEL"))
            assert list(await there.claims()) == addresses(given)
            await node.unmirror("web")
            assert await node.mirror("web", pod.uid, v4) != first
            netns = sandbox(tmp_path / "next")
            assert await ipam.add(pod.call(container="next", **netns)) == given
            os.close(netns["netns_fd"])

            # Without a mirror, and the API server lets none be made, the sandbox is what counts.
            await node.unmirror("web")
            await ipam._house.collect_mirrored()
            assert list(await there.claims()) == addresses(given)
            os.unlink(netns["netns"])
            await ipam._house.collect_mirrored()
            assert await there.claims() == {}

            async def untold() -> bool:
                return await there.endpoint("web") is None

            await until(untold)

    asyncio.run(main())


def test_a_del_without_a_mirror_releases_and_another_files_pod_does_not_vouch(kube: Cluster) -> None:
    async def main() -> None:
        async with a_node(kube) as node:
            there, ipam = node.there, node.ipam
            v4 = await there.pool("v4", 10, 99)
            old, new = (Started(there.namespace, "web", uid) for uid in ("of-the-old-file", "of-the-new-file"))
            await node.mirror("web", old.uid, v4)
            given = await ipam.add(old.call())
            await node.unmirror("web")
            await node.mirror("web", new.uid, v4)
            with pytest.raises(
                PodGoneError, match="its UID is of-the-new-file, and K8S_POD_UID of CNI_ARGS of-the-old"
            ):
                await ipam.add(old.call())
            assert await ipam.add(new.call()) != given
            await ipam.delete(old.call("DEL"))
            (claim,) = (await there.claims()).values()
            assert claim.spec.pod_uid == new.uid

    asyncio.run(main())


def test_what_was_adopted_waits_for_the_grace_time(kube: Cluster) -> None:
    """Nobody knows the sandbox of what upstream recorded; a mirror that is away for a moment ends nothing."""

    async def main() -> None:
        async with a_node(kube, IpamSettings(partial_grace=1.0)) as node:
            there, ipam = node.there, node.ipam
            v4 = await there.pool("v4", 10, 99)
            await node.mirror("web", "of-the-file", v4)
            controller = Controller(api_version="v1", kind="Node", name=node.name, uid=node.uid)
            adopted = new_claim(
                there.address(10),
                pool=v4,
                namespace=there.namespace,
                name="web",
                uid="of-the-file",
                controller=controller,
                node=node.name,
                container="",
            )
            await there.store.inner.create(adopted)

            async def known() -> bool:
                return bool(ipam._held.sets())

            async def gone() -> bool:
                return not await there.claims()

            await until(known)
            await ipam._house.collect_mirrored()
            await node.unmirror("web")
            await ipam._house.collect_mirrored()
            assert list(await there.claims()) == [there.address(10)]
            await until(gone)  # the rounds that an agent makes by itself

    asyncio.run(main())


def test_the_reclaim_leaves_them_to_their_node_as_long_as_there_is_one(kube: Cluster) -> None:
    async def main() -> None:
        async with leading(kube) as rooms, api(kube) as admin, a_node(kube) as node:
            there = node.there
            await admin.node(node.name)
            controller = Controller(api_version="v1", kind="Node", name=node.name, uid=node.uid)

            def of(uid: str, number: int) -> Claim:
                return new_claim(
                    there.address(number),
                    namespace=there.namespace,
                    name="web",
                    uid=uid,
                    controller=controller,
                    node=node.name,
                )

            await node.mirror("web", "of-the-file", "p")
            held = await rooms.store.create(of("of-the-file", 10))
            # Everything that frees an ordinary pod's address: a deletion, its grace period, its end, and a scan.
            await node.unmirror("web", seconds=1)
            await stays(rooms.store, held, seconds=1 + QUICK.teardown + 1)
            await node.unmirror("web")
            rooms.reclaim.scan()
            await stays(rooms.store, held)
            await node.mirror("web", "of-the-next-file", "p")
            await admin.node(node.name, ready=False)
            await stays(rooms.store, held)
            await admin.node(node.name)
            await stays(rooms.store, held)
            # Nobody comes back from a node that is no more.
            await node.unmirror("web")
            await there.ask("DELETE", f"{CORE}/nodes/{node.name}")
            await until_gone(rooms.store, held)

    asyncio.run(main())


def test_the_command_line_finds_the_pod_and_never_releases_what_its_node_alone_knows_of(
    kube: Cluster, shell: Shell
) -> None:
    async def main() -> None:
        async with a_node(kube) as node:
            there, ipam = node.there, node.ipam
            v4 = await there.pool("v4", 10, 99)
            pod = Started(there.namespace, "web", "of-the-file")
            await node.mirror("web", pod.uid, v4)
            (address,) = addresses(await ipam.add(pod.call()))
            assert await shell.beside("ip", "show", address) == 0, shell.err
            assert f"{there.namespace}/web (UID of-the-file), Pending" in shell.out
            assert "yes, its pod is there" in shell.out
            assert await shell.beside("pool", "explain", f"{there.namespace}/web") == 0, shell.err
            assert address in shell.out
            await node.unmirror("web", seconds=600)
            assert await shell.beside("ip", "release", address, "--force") == 1
            assert "uses it: its pod is there" in shell.err
            await node.unmirror("web")
            assert await shell.beside("ip", "release", address, "--force") == 1
            assert f"its container may run on node {node.name}, whose agent alone knows it" in shell.err
            assert list(await there.claims()) == [address]

    asyncio.run(main())
