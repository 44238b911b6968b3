"""The rival of `bench_alloc`: a process that creates objects in a Kubernetes API and does nothing else.

Each line `COUNT OFFSET` on standard input makes it create so many claims, one after the other; it answers with a line
when they are there. The session is open and warm before the first.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from ipaddress import IPv4Address

import aiohttp

from api.claim import LABEL_IDENTITY, LABEL_NODE, LABEL_POOL, Claim, ClaimSpec, Controller, Workload, claim_name
from api.meta import ObjectMeta, encode
from store.kube_paths import collection


def claim(number: int) -> bytes:
    """A claim as large as those that an allocation makes."""
    address = IPv4Address((100 << 24) + number)
    uid = f"00000000-0000-4000-8000-{number:012}"
    return encode(
        Claim(
            metadata=ObjectMeta(
                name=claim_name(address),
                labels={LABEL_POOL: "raw", LABEL_NODE: "raw", LABEL_IDENTITY: f"pod.{uid}"},
            ),
            spec=ClaimSpec(
                address=str(address),
                ip_version=4,
                pool="raw",
                workload=Workload(
                    namespace="bench",
                    name=f"pod-{number}",
                    controller=Controller(api_version="v1", kind="Pod", name=f"pod-{number}", uid=uid),
                ),
                pod_uid=uid,
                container_id=f"c{number}",
                nic="eth0",
                network="bench",
                node="raw",
                netns="/proc/1/fd/1",
                netns_inode=1,
            ),
        )
    )


async def main(server: str, pki: str) -> None:
    """Serve the lines."""
    tls = ssl.create_default_context(cafile=f"{pki}/ca.crt")
    tls.load_cert_chain(f"{pki}/admin.crt", f"{pki}/admin.key")
    async with aiohttp.ClientSession(server, connector=aiohttp.TCPConnector(ssl=tls)) as session:
        async with session.get("/readyz") as answer:
            await answer.read()
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            count, offset = map(int, line.split())
            for number in range(offset, offset + count):
                data, headers = claim(number), {"Content-Type": "application/json"}
                async with session.post(collection(Claim.TYPE, ""), data=data, headers=headers) as answer:
                    await answer.read()
                    answer.raise_for_status()
            print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
