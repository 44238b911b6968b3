"""Leading and being succeeded, certificates that are renewed under way, and an API server that goes away."""

from __future__ import annotations

import asyncio
import base64
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from controller.certificates import x509
from controller.daemon import Controller
from controller.settings import SOURCES
from lab.kube.cluster import Cluster, free_ports
from lab.kube.components import SERVER
from store.kube import KubeStore
from store.kube_access import Credentials
from store.kube_settings import KubeSettings
from tests.kube.controller_rig import (
    API,
    CONFIGURATIONS,
    LEASE,
    NAMESPACE,
    POOLS,
    SECRET,
    Json,
    Replica,
    Requests,
    controllers,
    eventually,
    forget,
    manifest,
)

HOOKS = ("mutatingwebhookconfigurations", "validatingwebhookconfigurations")
DURATION = 5.0
"""Seconds of the leases in these tests; see the rig."""


@pytest.fixture
def cluster(mortal: Cluster) -> Cluster:
    """It is stopped here."""
    return mortal


@pytest.fixture
def ask(cluster: Cluster) -> Iterator[Requests]:
    """Requests; and what controllers leave behind is removed, of those that run in this process too."""
    requests = Requests(cluster)
    yield requests
    forget(cluster)
    for item in requests("GET", f"{API}/{POOLS}")[1]["items"]:
        requests.remove(POOLS, item["metadata"]["name"])


def holder(ask: Requests) -> str:
    """Name of the replica that holds the lease."""
    status, lease = ask("GET", LEASE)
    return str(lease["spec"].get("holderIdentity", "")).partition("_")[0] if status == 200 else ""


def bundle(ask: Requests, kind: str = HOOKS[0]) -> tuple[bytes, ...]:
    """The authorities that the API server trusts for our webhooks; all of them have the same."""
    status, found = ask("GET", f"{CONFIGURATIONS}/{kind}/spiderpool-controller")
    if status != 200:
        return ()
    (one,) = {hook["clientConfig"].get("caBundle", "") for hook in found["webhooks"]}
    return x509.split(base64.b64decode(one))


def admits(ask: Requests) -> bool:
    """Whether the API server gets our answer."""
    return ask("POST", f"{API}/{POOLS}?dryRun=All", manifest(POOLS, "probe", subnet="nonsense"))[0] == 422


class Creator(threading.Thread):
    """Creates pools and removes them, and keeps every answer that is not as it should be."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        super().__init__(daemon=True)
        self._ask = Requests(cluster)
        self._prefix = name
        self._over = threading.Event()
        self.failures: list[tuple[int, Json]] = []
        self.created = 0

    def run(self) -> None:
        for i in count():
            if self._over.is_set():
                return
            number = int(self._prefix[1:]) * 64 + i % 64
            status, answer = self._ask.create(
                POOLS, self._prefix, subnet=f"10.{number}.0.0/24", ips=[f"10.{number}.0.9"]
            )
            if status == 201 and answer["spec"]["ipVersion"] == 4:
                self.created += 1
                self._ask.remove(POOLS, self._prefix)
            else:
                self.failures.append((status, answer))
                time.sleep(0.05)

    def stop(self) -> None:
        self._over.set()
        self.join(30)


def stopping(script: Callable[[], None], *creators: Creator) -> Callable[[], None]:
    """`script`, and then the end of the creators, however it ended: they need the controller that it runs beside."""

    def whole() -> None:
        try:
            script()
        finally:
            for creator in creators:
                if creator.is_alive():
                    creator.stop()

    return whole


class Guest:
    """A controller in this process, for its clock."""

    def __init__(self, cluster: Cluster, *flags: str) -> None:
        self.ahead = timedelta()
        (self.port,) = free_ports(1)
        self.settings, _ = SOURCES.load(
            [
                *("--kubernetes-kubeconfig", cluster.admin, "--pod-name", "guest", "--pod-namespace", NAMESPACE),
                *("--webhook-host", "127.0.0.1", "--webhook-port", str(self.port), "--webhook-drain", "0"),
                *("--webhook-url", f"https://127.0.0.1:{self.port}", "--tls-check", "0.1"),
                *("--health-port", "0", "--health-metrics-port", "0"),
                *flags,
            ],
            {},
        )

    def clock(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def live(self, script: Callable[[], None]) -> None:
        """Live while `script` runs in a thread."""

        async def life() -> None:
            kube = KubeSettings(kubeconfig=self.settings.kubernetes.kubeconfig)
            credentials = Credentials(kube)
            store = KubeStore(kube, credentials)
            stop = asyncio.Event()
            controller = Controller(self.settings, store, credentials, self.clock)
            running = asyncio.create_task(controller.run(stop, lambda: None))
            try:
                script_done = asyncio.create_task(asyncio.to_thread(script))
                await asyncio.wait({running, script_done}, return_when=asyncio.FIRST_COMPLETED)
                assert not running.done(), running
                await script_done
            finally:
                stop.set()
                await asyncio.wait({running}, timeout=15)
                await store.close()
            assert await running == 0

        asyncio.run(life())

    def shown(self) -> bytes:
        """The certificate that a new connection sees."""
        return ssl.get_server_certificate(("127.0.0.1", self.port)).encode()


class TestCertificates:
    def test_authority_and_certificate_are_renewed_while_pools_are_being_created(
        self, cluster: Cluster, ask: Requests
    ) -> None:
        """The API server's clock is right, ours moves towards it from the past: what we issue is valid to both."""
        guest = Guest(
            cluster,
            "--tls-authority-days",
            "60",
            "--tls-server-days",
            "60",
            "--tls-overlap",
            "60",
            "--tls-names",
            "extra",
        )
        creators = [Creator(cluster, f"c{i}") for i in range(3)]

        def more() -> None:
            before = [creator.created for creator in creators]
            eventually(
                20,
                lambda: all(c.created > b + 2 or c.failures for c, b in zip(creators, before, strict=True)),
                "pools are being created",
            )
            assert [creator.failures for creator in creators] == [[], [], []]

        def script() -> None:
            eventually(20, lambda: admits(ask), "the webhook is asked")
            for creator in creators:
                creator.start()
            more()
            (first,), certificate = bundle(ask), guest.shown()
            assert x509.names_of(certificate) == {"127.0.0.1", "extra"}
            guest.ahead = timedelta(days=-9)  # less than a third of the 60 days is left
            eventually(10, lambda: len(bundle(ask)) == 2 == len(bundle(ask, HOOKS[1])), "the next is announced")
            more()
            old, second = bundle(ask)
            assert old == first
            assert guest.shown() == certificate, "the next authority signed before it had been announced for a while"
            guest.ahead += timedelta(seconds=61)
            eventually(10, lambda: guest.shown() != certificate, "the next authority signs")
            assert x509.signed_by(guest.shown(), second)
            assert set(bundle(ask)) == {first, second}
            more()
            guest.ahead += timedelta(seconds=61)
            eventually(10, lambda: bundle(ask) == (second,) == bundle(ask, HOOKS[1]), "the old one leaves")
            more()

        guest.ahead = timedelta(days=-50)
        guest.live(stopping(script, *creators))

    def test_nobody_gets_away_with_changing_them(self, cluster: Cluster, ask: Requests) -> None:
        guest = Guest(cluster)
        creator = Creator(cluster, "c0")

        def script() -> None:
            eventually(20, lambda: admits(ask), "the webhook is asked")
            (first,) = bundle(ask)
            stranger = x509.new_authority(datetime.now(UTC), timedelta(days=1)).certificate
            for kind in HOOKS:
                reverted = base64.b64encode(stranger).decode()
                patch = [
                    {"op": "replace", "path": "/webhooks/0/clientConfig/caBundle", "value": reverted},
                    {"op": "replace", "path": "/webhooks/1/failurePolicy", "value": "Ignore"},
                ]
                path = f"{CONFIGURATIONS}/{kind}/spiderpool-controller"
                before = ask("GET", path)[1]["webhooks"]
                assert ask("PATCH", path, patch, "application/json-patch+json")[0] == 200
                took = eventually(5, lambda: ask("GET", path)[1]["webhooks"] == before, "it is repaired")  # noqa: B023
                print(f"{kind} repaired after {took:.3f} s")
                ask("DELETE", path)
                eventually(5, lambda: bundle(ask, kind) == (first,), "it is back")  # noqa: B023
            eventually(5, lambda: admits(ask), "the webhook is asked")
            creator.start()
            for broken in (None, {"data": {"tls.key": base64.b64encode(b"junk").decode()}}):
                certificate = guest.shown()
                if broken is None:
                    ask("DELETE", SECRET)
                else:
                    ask("PATCH", SECRET, broken, "application/merge-patch+json")
                eventually(10, lambda: guest.shown() != certificate, "there is a new one")  # noqa: B023
                before_count = creator.created
                eventually(10, lambda: creator.created > before_count + 3 or creator.failures, "pools")  # noqa: B023
            assert creator.failures == []

        guest.live(stopping(script, creator))

    def test_certificates_from_elsewhere(self, cluster: Cluster, ask: Requests, tmp_path: Path) -> None:
        now = datetime.now(UTC)
        authority = x509.new_authority(now, timedelta(days=1))

        def issue() -> bytes:
            pair = x509.new_server(authority, ["127.0.0.1"], now, timedelta(days=1))
            (tmp_path / "tls.key").write_bytes(pair.key)
            (tmp_path / "tls.crt").write_bytes(pair.certificate)
            return pair.certificate

        (tmp_path / "ca.crt").write_bytes(authority.certificate)
        first = issue()
        guest = Guest(cluster, "--tls-server-cert", f"{tmp_path}/tls.crt", "--tls-server-key", f"{tmp_path}/tls.key")

        def script() -> None:
            eventually(20, lambda: admits(ask), "the webhook is asked")
            assert guest.shown() == first
            assert bundle(ask) == (authority.certificate,)
            second = issue()
            eventually(5, lambda: guest.shown() == second, "the new files are used")
            assert admits(ask)
            assert ask("GET", SECRET)[0] == 404

        guest.live(script)

    def test_a_chain_from_elsewhere_that_ends_in_its_root_needs_no_authority_beside_it(
        self, cluster: Cluster, ask: Requests, tmp_path: Path
    ) -> None:
        now = datetime.now(UTC)
        authority = x509.new_authority(now, timedelta(days=1))
        pair = x509.new_server(authority, ["127.0.0.1"], now, timedelta(days=1))
        (tmp_path / "tls.key").write_bytes(pair.key)
        (tmp_path / "tls.crt").write_bytes(pair.certificate + authority.certificate)
        (tmp_path / "ca.crt").touch()  # as cert-manager leaves it where the issuer tells none
        guest = Guest(cluster, "--tls-server-cert", f"{tmp_path}/tls.crt", "--tls-server-key", f"{tmp_path}/tls.key")

        def script() -> None:
            eventually(20, lambda: admits(ask), "the webhook is asked")
            assert bundle(ask) == (authority.certificate,)

        guest.live(script)


@contextmanager
def pair(cluster: Cluster, folder: Path, ask: Requests) -> Iterator[tuple[Replica, Replica, Callable[..., Replica]]]:
    """The leader and its standby, both ready."""
    with controllers(cluster, folder) as launch:
        leader = launch("one")
        eventually(40, lambda: leader.probe() == 200 and holder(ask) == "one", "the first one leads")
        standby = launch("two")
        eventually(40, lambda: standby.probe() == 200, "the second one is ready")
        eventually(20, lambda: admits(ask), "the webhook is asked")
        yield leader, standby, launch


class TestLeading:
    @pytest.mark.upstream("R00007")
    def test_the_other_takes_over_when_the_leader_is_killed(
        self, cluster: Cluster, ask: Requests, tmp_path: Path
    ) -> None:
        with pair(cluster, tmp_path, ask) as (leader, standby, _):
            assert not standby.lines("leading")
            leader.stop(signal.SIGKILL)
            took = eventually(20, lambda: holder(ask) == "two", "the other leads")
            works = took + eventually(20, lambda: admits(ask), "its webhook is asked")
            print(f"lease of {DURATION:g} s: taken after {took:.2f} s, admission by the new leader after {works:.2f} s")
            assert took < DURATION + 1.5  # its end, and the time until the last renewal was seen
            assert ask("GET", LEASE)[1]["spec"]["leaseTransitions"] == 1
            assert standby.probe() == 200

    def test_a_leader_that_stops_hands_over_at_once(self, cluster: Cluster, ask: Requests, tmp_path: Path) -> None:
        with pair(cluster, tmp_path, ask) as (leader, _, launch):
            assert leader.stop() == 0
            assert leader.lines("gave the lease back")
            took = eventually(5, lambda: holder(ask) == "two", "the other leads")
            assert took < 1.5
            # a process of the same pod name is another candidate
            again = launch("two")
            eventually(40, lambda: again.probe() == 200, "the third one is ready")
            assert not again.lines("leading")

    def test_a_leader_that_hung_does_not_go_on_when_it_wakes(
        self, cluster: Cluster, ask: Requests, tmp_path: Path
    ) -> None:
        with pair(cluster, tmp_path, ask) as (leader, _, _launch):
            leader.process.send_signal(signal.SIGSTOP)
            try:
                eventually(DURATION + 2, lambda: holder(ask) == "two", "the other leads")
            finally:
                leader.process.send_signal(signal.SIGCONT)
            assert leader.process.wait(5) == 70
            assert leader.lines("have not ended: exiting")
            assert holder(ask) == "two"

    def test_they_live_through_an_api_server_that_goes_away(
        self, cluster: Cluster, ask: Requests, tmp_path: Path
    ) -> None:
        with pair(cluster, tmp_path, ask) as (leader, standby, launch):
            assert ask.create(POOLS, "before", subnet="10.1.0.0/24")[0] == 201
            cluster.stop(SERVER, signal.SIGKILL)
            late = launch("late")  # starts while there is no API server
            eventually(10, lambda: leader.lines("stopping the leader's duties"), "the leader gives up")
            eventually(20, lambda: late.probe("startup") == 500, "the late one waits")
            assert leader.probe() == standby.probe() == 200, "what is cached stays, and so does admission"
            time.sleep(DURATION)  # an outage longer than the lease
            cluster.start(SERVER)
            took = eventually(30, lambda: holder(ask) in ("one", "two", "late") and admits(ask), "somebody leads")
            print(f"{took:.2f} s after the API server was back")
            eventually(40, lambda: late.probe() == 200, "the late one is ready")
            assert ask.create(POOLS, "after", subnet="10.2.0.0/24")[0] == 201
            assert [replica.process.poll() for replica in (leader, standby, late)] == [None, None, None]


def test_a_part_that_cannot_start_ends_the_whole(cluster: Cluster, tmp_path: Path) -> None:
    with controllers(cluster, tmp_path) as launch:
        first = launch("one", "--leader-enabled=false")
        eventually(40, lambda: first.probe() == 200, "it is ready without leading")
        second = launch("two", "--webhook-port", str(first.webhook))
        assert second.process.wait(40) == 1
        (line,) = second.lines("cannot go on")
        assert "address already in use" in line["trace"]
        assert first.stop() == 0
