"""Admission where the administrator switched something on or off: guarded deletion, one family, no subnets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.kube.cluster import Cluster
from tests.kube.controller_rig import (
    API,
    POOLS,
    RESERVED,
    SUBNETS,
    Json,
    Requests,
    controllers,
    eventually,
    manifest,
)

V4 = {"subnet": "10.7.0.0/24", "ips": ["10.7.0.10-10.7.0.20"]}
V6 = {"subnet": "fd07::/64", "ips": ["fd07::1"]}


@contextmanager
def admitting(cluster: Cluster, folder: Path, *flags: str) -> Iterator[Requests]:
    """Requests that are admitted by a controller with these flags."""
    ask = Requests(cluster)
    with controllers(cluster, folder) as launch:
        replica = launch("switched", "--reclaim-enabled=false", *flags)  # the claims here are nobody's
        try:
            eventually(40, lambda: replica.probe() == 200, "the controller is ready")
            wrong = manifest(POOLS, "probe", subnet="nonsense")
            eventually(20, lambda: ask("POST", f"{API}/{POOLS}?dryRun=All", wrong)[0] == 422, "it is asked")
            yield ask
        finally:
            for plural in ("spideripclaims", POOLS, SUBNETS, RESERVED):
                for item in ask("GET", f"{API}/{plural}")[1]["items"]:
                    ask.remove(plural, item["metadata"]["name"])


def claim(ask: Requests, pool: str, address: str, state: str = "Allocated") -> None:
    body = {
        "apiVersion": API.removeprefix("/apis/"),
        "kind": "SpiderIPClaim",
        "metadata": {"name": address, "labels": {"ipam.spidernet.io/pool": pool}},
        "spec": {"address": address, "ipVersion": 4, "pool": pool, "podUID": "u", "nic": "eth0", "state": state},
    }
    status, answer = ask("POST", f"{API}/spideripclaims", body)
    assert status == 201, answer


def forbidden(found: tuple[int, Json], text: str) -> None:
    status, answer = found
    assert (status, answer["reason"], answer["code"]) == (403, "Forbidden", 403), answer
    assert text in answer["message"]


def test_deletion_is_guarded_and_one_family_is_off(kube: Cluster, tmp_path: Path) -> None:
    flags = ("--admission-guard-deletion=true", "--admission-enable-ipv6=false")
    with admitting(kube, tmp_path, *flags) as ask:
        # A pool with an allocated address stays; an address in quarantine is nobody's and keeps nothing.
        assert ask.create(POOLS, "p", **V4)[0] == 201
        claim(ask, "p", "10.7.0.15")
        claim(ask, "p", "10.7.0.16", "Quarantined")
        pool = f"{API}/{POOLS}/p"
        forbidden(ask("DELETE", pool), "cannot delete an IPPool with allocated IPs(1)")
        assert "deletionTimestamp" not in ask("GET", pool)[1]["metadata"]
        ask("DELETE", f"{API}/spideripclaims/10.7.0.15")
        assert ask("DELETE", pool)[0] == 200
        ask("DELETE", f"{API}/spideripclaims/10.7.0.16")
        eventually(20, lambda: ask("GET", pool)[0] == 404, "the pool is gone")

        # So does a subnet of which a pool has addresses.
        assert ask.create(SUBNETS, "s", subnet="10.8.0.0/24", ips=["10.8.0.1-10.8.0.9"])[0] == 201
        subnet = f"{API}/{SUBNETS}/s"
        assert ask.create(POOLS, "q", subnet="10.8.0.0/24", ips=["10.8.0.1-10.8.0.2"])[0] == 201
        # At once: what its status tells may be behind, or emptied.
        forbidden(ask("DELETE", subnet), "cannot delete a Subnet with allocated IPs(2)")
        fewer = {"spec": {"ips": ["10.8.0.2-10.8.0.9"]}}
        status, answer = ask.merge(SUBNETS, "s", fewer)
        assert (status, answer["reason"]) == (422, "Invalid"), answer
        assert "[10.8.0.1] that is being used by IPPool q" in answer["message"]
        assert ask("DELETE", f"{API}/{POOLS}/q")[0] == 200
        eventually(20, lambda: ask("DELETE", subnet)[0] == 200, "the subnet may go after its pool")
        eventually(20, lambda: ask("GET", subnet)[0] == 404, "it is gone")

        # Nothing new of the family that is off.
        for plural, spec in ((POOLS, V6), (SUBNETS, V6), (RESERVED, {"ips": ["fd07::1"]})):
            status, answer = ask.create(plural, "six", **spec)
            assert (status, answer["reason"]) == (422, "Invalid"), answer
            told = [(cause["field"], cause["message"]) for cause in answer["details"]["causes"]]
            assert any(field == "spec.ipVersion" and "IPv6 is disabled" in text for field, text in told), told
        assert ask.create(RESERVED, "four", ips=["10.7.0.1"])[0] == 201


def test_without_subnets_pools_are_nobodys(kube: Cluster, tmp_path: Path) -> None:
    with admitting(kube, tmp_path, "--subnets-enabled=false") as ask:
        forbidden(ask.create(SUBNETS, "s", **V4), "SpiderSubnets are switched off in this installation")
        assert ask("GET", f"{API}/{SUBNETS}/s")[0] == 404
        status, made = ask.create(POOLS, "p", **V4)
        assert status == 201, made
        assert "ownerReferences" not in made["metadata"]
        assert "ipam.spidernet.io/owner-spider-subnet" not in made["metadata"]["labels"]
        # Deletion is not guarded unless asked for: the pool waits for its address.
        claim(ask, "p", "10.7.0.15")
        assert ask("DELETE", f"{API}/{POOLS}/p")[0] == 200
        assert ask("GET", f"{API}/{POOLS}/p")[1]["metadata"]["deletionTimestamp"]
        ask("DELETE", f"{API}/spideripclaims/10.7.0.15")
        eventually(20, lambda: ask("GET", f"{API}/{POOLS}/p")[0] == 404, "the pool goes with its last address")
