"""The API server of tests and labs is a real one, with real authorization, and our definitions are valid there."""

from __future__ import annotations

import glob
import json
import os
import re
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from api.columns import COLUMNS
from lab.kube import build, lifecycle
from lab.kube.cluster import CRDS, Cluster
from lab.kube.components import CONTROLLERS, ETCD, ORDER, SERVER, Place
from lab.kube.pki import Authority
from lab.layout import STATE_ROOT, Lab, LabError
from lab.process import alive, cgroup2_root
from lab.table import Paper
from tests.kube.conftest import NewCluster

MANIFESTS = Path(__file__).parents[2] / "lab" / "manifests"
KINDS = {"SpiderIPPool": "sp", "SpiderReservedIP": "sr", "SpiderEndpoint": "se", "SpiderIPClaim": "sic"}
"""Kinds of ours, and their short names."""


def apply(kube: Cluster, document: object, *flags: str, user: str = "admin") -> str:
    return kube.kubectl("apply", "--validate=strict", *flags, "-f", "-", stdin=json.dumps(document), user=user)


def get(kube: Cluster, *what: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(kube.kubectl("get", *what, "-o", "json"))
    return found


def pool(name: str, **spec: object) -> dict[str, object]:
    return {
        "apiVersion": "spiderpool.spidernet.io/v2beta1",
        "kind": "SpiderIPPool",
        "metadata": {"name": name},
        "spec": {"subnet": "10.0.0.0/8", "ips": ["10.0.0.1-10.0.0.9"]} | spec,
    }


def wait_for(kube: Cluster, seconds: float, *arguments: str) -> str:
    """What kubectl prints as soon as it succeeds and prints something."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if said := kube.kubectl(*arguments):
                return said
        except LabError:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, f"nothing within {seconds} s: {arguments}"
        time.sleep(0.05)


@pytest.fixture
def make(kube: Cluster) -> Iterator[Callable[..., None]]:
    """Apply documents on the session's cluster, from which they are removed after the test."""
    made: list[str] = []

    def apply_all(*documents: object) -> None:
        made.append(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))
        kube.kubectl("apply", "--validate=strict", "-f", "-", stdin=made[-1])

    yield apply_all
    for text in reversed(made):
        kube.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=text)


@pytest.fixture(scope="module")
def demo(kube: Cluster) -> Iterator[None]:
    """The namespace that the lab's manifests are for."""
    kube.kubectl("create", "namespace", "demo")
    yield
    kube.kubectl("delete", "namespace", "demo", "--wait=false")


class TestServer:
    def test_it_is_the_release_that_is_pinned(self, kube: Cluster) -> None:
        versions = json.loads(kube.kubectl("version", "-o", "json"))
        assert versions["serverVersion"]["gitVersion"] == versions["clientVersion"]["gitVersion"] == build.release()
        assert kube.kubectl("get", "--raw", "/readyz") == "ok"

    def test_one_port_on_loopback_is_all_it_opens(self, kube: Cluster) -> None:
        inodes = set()
        for process in kube.processes.values():
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                try:
                    inodes.add(os.readlink(fd))
                except FileNotFoundError:
                    continue
        listening = []
        for family in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                    listening.append(local)
        assert listening == [f"0100007F:{kube.place.port:04X}"]

    def test_its_files_are_roots_alone(self, kube: Cluster) -> None:
        state = Path(kube.place.lab.state)
        assert state.stat().st_mode & 0o777 == 0o700
        secrets = [*state.glob("*.kubeconfig"), *state.glob("pki/*.key")]
        assert len(secrets) > 5
        assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}

    def test_controllers_are_at_work(self, kube: Cluster) -> None:
        kube.kubectl("create", "namespace", "controllers")
        kube.kubectl("create", "deployment", "web", "--image=none", "--replicas=2", "-n", "controllers")
        ready = ("get", "pods", "-n", "controllers", "-l", "app=web", "-o", "jsonpath={.items[1].metadata.name}")
        assert wait_for(kube, 20, *ready).startswith("web-")
        kube.kubectl("delete", "namespace", "controllers", "--timeout=30s")
        assert get(kube, "pods", "-n", "controllers")["items"] == []

    def test_service_account_tokens_are_honoured(self, kube: Cluster) -> None:
        token = kube.kubectl("create", "token", "default", "-n", "default").strip()
        config = yaml.safe_load(Path(kube.admin).read_text())
        config["users"][0]["user"] = {"token": token}
        path = Path(kube.place.kubeconfig("token"))
        path.write_text(yaml.safe_dump(config))
        assert "system:serviceaccount:default:default" in kube.kubectl("auth", "whoami", user="token")
        with pytest.raises(LabError, match=r"system:serviceaccount:default:default.*cannot list"):
            kube.kubectl("get", "spiderippools", user="token")


class TestAuthorization:
    def test_a_nobody_may_nothing_until_a_role_says_so(self, kube: Cluster) -> None:
        kube.kubeconfig("nobody")
        for verb, *arguments in (("list", "get", "sp"), ("delete", "delete", "sp", "x"), ("get", "get", "sp", "x")):
            with pytest.raises(LabError, match=f'User "nobody" cannot {verb} '):
                kube.kubectl(*arguments, user="nobody")
        kube.kubectl("create", "clusterrole", "reader", "--verb=get,list", "--resource=spiderippools")
        kube.kubectl("create", "clusterrolebinding", "reader", "--clusterrole=reader", "--user=nobody")
        wait_for(kube, 5, "auth", "can-i", "list", "spiderippools", "--as=nobody")
        kube.kubectl("get", "spiderippools", user="nobody")
        with pytest.raises(LabError, match='User "nobody" cannot create'):
            kube.kubectl("create", "-f", "-", stdin=json.dumps(pool("mine")), user="nobody")

    def test_groups_count(self, kube: Cluster) -> None:
        kube.kubeconfig("chief", ["system:masters"])
        kube.kubectl("get", "secrets", "-A", user="chief")

    def test_a_stranger_is_not_known(self, kube: Cluster, tmp_path: Path) -> None:
        stranger = Authority(str(tmp_path))
        stranger.create()
        stranger.issue("chief", "chief", groups=["system:masters"])
        config = stranger.kubeconfig("chief", kube.place.url)
        known = yaml.safe_load(Path(kube.admin).read_text())
        config["clusters"] = known["clusters"]
        Path(kube.place.kubeconfig("stranger")).write_text(yaml.safe_dump(config))
        with pytest.raises(LabError, match=r"Unauthorized|must be logged in"):
            kube.kubectl("get", "namespaces", user="stranger")

    def test_the_server_proves_who_it_is(self, kube: Cluster, tmp_path: Path) -> None:
        stranger = Authority(str(tmp_path))
        stranger.create()
        config = yaml.safe_load(Path(kube.admin).read_text())
        config["clusters"] = stranger.kubeconfig("ca", kube.place.url)["clusters"]
        Path(kube.place.kubeconfig("deceived")).write_text(yaml.safe_dump(config))
        with pytest.raises(LabError, match="certificate signed by unknown authority"):
            kube.kubectl("get", "namespaces", user="deceived")


class TestDefinitions:
    @pytest.mark.parametrize("path", sorted(glob.glob(f"{CRDS}/*.yaml")), ids=os.path.basename)
    def test_each_is_accepted_as_it_stands(self, kube: Cluster, path: str) -> None:
        (wanted,) = (document for document in yaml.safe_load_all(Path(path).read_text()) if document)
        stored = get(kube, "crd", wanted["metadata"]["name"])
        conditions = {condition["type"]: condition["status"] for condition in stored["status"]["conditions"]}  # type: ignore[index]
        assert conditions["Established"] == conditions["NamesAccepted"] == "True"
        assert "NonStructuralSchema" not in conditions
        # Nothing was dropped or rewritten, so the server understands every word of it.
        (ours,), (theirs,) = wanted["spec"]["versions"], stored["spec"]["versions"]  # type: ignore[index]
        assert theirs == ours

    @pytest.mark.parametrize(("kind", "short"), KINDS.items())
    def test_names(self, kube: Cluster, kind: str, short: str) -> None:
        resources = kube.kubectl("api-resources", "--api-group=spiderpool.spidernet.io", "--no-headers")
        assert any(line.split()[1] == short and line.split()[-1] == kind for line in resources.splitlines())
        assert kind.lower() in kube.kubectl("api-resources", "--categories=spiderpool", "-o", "name")
        assert re.search(r"^DESCRIPTION:\n +\S", kube.kubectl("explain", short), re.MULTILINE)

    @pytest.mark.usefixtures("demo")
    @pytest.mark.parametrize("manifest", ["pools.yaml", "services.yaml", "late-service.yaml"])
    def test_manifests_of_the_lab_are_taken_and_kept(
        self, kube: Cluster, make: Callable[..., None], manifest: str
    ) -> None:
        documents = list(yaml.safe_load_all((MANIFESTS / manifest).read_text()))
        make(*documents)
        for document in documents:
            name, namespace = document["metadata"]["name"], document["metadata"].get("namespace", "default")
            stored = get(kube, document["kind"], name, "-n", namespace)
            assert contains(stored["spec"], document["spec"]), (stored["spec"], document["spec"])

    @pytest.mark.usefixtures("demo")
    def test_the_endpoint_slice_of_the_lab_is_taken(self, kube: Cluster, make: Callable[..., None]) -> None:
        template = string.Template((MANIFESTS / "endpointslice.yaml").read_text())
        endpoint = '  - addresses: ["172.20.0.103"]\n    nodeName: node1\n    conditions: {ready: true}'
        text = template.substitute(service="web", family="ipv4", address_type="IPv4", endpoints=endpoint)
        make(*yaml.safe_load_all(text))
        assert get(kube, "endpointslice", "web-ipv4", "-n", "demo")["addressType"] == "IPv4"

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"subnet": 10}, r"spec\.subnet: Invalid value: .*must be of type string"),
            ({"subnet": None}, r"spec\.subnet: Required value"),
            ({"ipVersion": 5}, r"spec\.ipVersion: Unsupported value: 5"),
            ({"ips": "10.0.0.1"}, r"spec\.ips: Invalid value: .*must be of type array"),
            ({"disable": "yes"}, r"spec\.disable: Invalid value: .*must be of type boolean"),
            ({"routes": [{"dst": "0.0.0.0/0"}]}, r"spec\.routes\[0\]\.gw: Required value"),
            ({"subnets": "10.0.0.0/8"}, r'unknown field "spec\.subnets"'),
            ({"podAffinity": {"matchLabels": {"a": 1}}}, r"spec\.podAffinity\.matchLabels\.a: Invalid value"),
        ],
    )
    def test_nonsense_is_refused_by_field(self, kube: Cluster, change: dict[str, object], complaint: str) -> None:
        document = pool("nonsense", **change)
        with pytest.raises(LabError, match=complaint):
            kube.kubectl("create", "--validate=strict", "-f", "-", stdin=json.dumps(document))

    def test_the_status_of_a_pool_has_its_own_door(self, kube: Cluster, make: Callable[..., None]) -> None:
        make(pool("status") | {"status": {"allocatedIPCount": 7}})
        assert "status" not in get(kube, "spiderippool", "status")
        patch = json.dumps({"status": {"allocatedIPCount": 3, "totalIPCount": 9}, "spec": {"gateway": "10.9.9.9"}})
        kube.kubectl("patch", "spiderippool", "status", "--subresource=status", "--type=merge", f"--patch={patch}")
        stored = get(kube, "spiderippool", "status")
        assert stored["status"] == {"allocatedIPCount": 3, "totalIPCount": 9}
        assert "gateway" not in stored["spec"]  # type: ignore[operator]
        patch = json.dumps({"status": {"allocatedIPCount": -1}})
        with pytest.raises(LabError, match=r"status\.allocatedIPCount"):
            kube.kubectl("patch", "sp", "status", "--subresource=status", "--type=merge", f"--patch={patch}")


class TestColumns:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
    def test_heads(self, kube: Cluster, kind: str, wide: bool) -> None:
        path = f"/apis/spiderpool.spidernet.io/v2beta1/{kind.lower()}s"
        _, table = kube.ask(path, accept="application/json;as=Table;v=v1;g=meta.k8s.io")
        shown = [column["name"] for column in table["columnDefinitions"] if wide or not column["priority"]]
        assert shown == ["Name", *(column.name for column in COLUMNS[kind] if wide or not column.priority)]

    def test_a_pool_as_kubectl_prints_it(self, kube: Cluster, make: Callable[..., None]) -> None:
        affinity = {"matchLabels": {"ipam.spidernet.io/app-namespace": "shop"}}
        make(pool("shown", ipVersion=4, nodeName=["a", "b"], podAffinity=affinity, default=True))
        patch = json.dumps({"status": {"allocatedIPCount": 2, "totalIPCount": 9}})
        kube.kubectl("patch", "sp", "shown", "--subresource=status", "--type=merge", f"--patch={patch}")
        head, row = cells(kube.kubectl("get", "sp", "shown"))
        assert head == ["NAME", "VERSION", "SUBNET", "ALLOCATED-IP-COUNT", "TOTAL-IP-COUNT", "DEFAULT"]
        assert row == ["shown", "4", "10.0.0.0/8", "2", "9", "true"]
        head, row = cells(kube.kubectl("get", "sp", "shown", "-o", "wide"))
        assert head[6:] == ["DISABLE", "NODENAME", "MULTUSNAME", "APP-NAMESPACE", "READY"]
        assert row[6:] == ["false", '["a","b"]', "", "shop", ""]


class TestLife:
    def test_a_restart_keeps_what_was_written_and_the_address(self, new_kube: NewCluster) -> None:
        own = new_kube()
        apply(own, pool("kept"))
        port = own.place.port
        own.stop(SERVER, signal.SIGKILL)
        assert not own.runs(SERVER)
        with pytest.raises(LabError, match=r"connection to the server .* was refused"):
            own.kubectl("get", "sp")
        own.start(SERVER)
        assert own.place.port == port
        assert get(own, "sp", "kept")["metadata"]["name"] == "kept"  # type: ignore[index]
        own.stop(ETCD, signal.SIGKILL)
        own.start(ETCD)
        assert "kept" in wait_for(own, 20, "get", "sp", "kept")
        assert Cluster.load(own.place.lab).processes == own.processes

    def test_the_past_can_be_forgotten(self, new_kube: NewCluster) -> None:
        own = new_kube("--watch-cache=false")
        apply(own, pool("old"))
        past = str(get(own, "sp", "old")["metadata"]["resourceVersion"])  # type: ignore[index]
        watch = f"/apis/spiderpool.spidernet.io/v2beta1/spiderippools?watch=1&timeoutSeconds=1&resourceVersion={past}"
        assert "Expired" not in own.kubectl("get", "--raw", watch)
        for value in ("10.0.0.8", "10.0.0.9"):
            apply(own, pool("old", gateway=value))
        own.compact()
        assert '"reason":"Expired","code":410' in own.kubectl("get", "--raw", watch)

    def test_down_leaves_nothing_also_of_what_does_not_want_to(self, new_kube: NewCluster) -> None:
        own = new_kube(crds=False)
        lab, processes = own.place.lab, dict(own.processes)
        assert sorted(processes) == sorted(ORDER)
        assert all(map(alive, processes.values()))
        os.kill(processes[CONTROLLERS].pid, signal.SIGSTOP)
        began = time.monotonic()
        assert lifecycle.down(lab)
        assert time.monotonic() - began < 15
        assert_gone(own.place)
        assert not any(map(alive, processes.values()))
        assert not lifecycle.down(lab)

    def test_down_takes_away_an_up_that_was_killed(self) -> None:
        with killed_up("etcd") as (command, lab):
            there = Cluster.load(lab)
            subprocess.run([*command, "down"], check=True, stdout=subprocess.DEVNULL, timeout=60)
            assert_gone(there.place)

    def test_up_takes_the_place_of_one_that_was_killed(self) -> None:
        with killed_up("kube-apiserver") as (command, lab):
            subprocess.run([*command, "up"], check=True, stdout=subprocess.DEVNULL, timeout=100)
            again = subprocess.run([*command, "up"], capture_output=True, text=True, timeout=60, check=False)
            assert (again.returncode, "is up already" in again.stderr) == (2, True)
            assert subprocess.run([*command, "status"], stdout=subprocess.DEVNULL, check=False).returncode == 0
            there = Cluster.load(lab)
            there.stop(CONTROLLERS)
            assert subprocess.run([*command, "status"], stdout=subprocess.DEVNULL, check=False).returncode == 1
        assert_gone(there.place)

    def test_a_server_that_cannot_start_says_why(self, new_kube: NewCluster) -> None:
        with pytest.raises(LabError, match="unknown flag: --nonsense"):
            new_kube("--nonsense")

    def test_what_is_not_built_is_an_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(build, "CACHE", str(tmp_path))
        with pytest.raises(LabError, match=r"kube-apiserver.* not built: run `make kube`"):
            lifecycle.up(Lab("spltabsent"), Paper())
        assert not os.path.exists(f"{STATE_ROOT}/spltabsent")


@contextmanager
def killed_up(log: str) -> Iterator[tuple[list[str], Lab]]:
    """The start of a command of the lab, and the lab, whose `up` was killed when it had begun that log."""
    lab = Lab(f"splt{os.urandom(4).hex()}")
    command = [sys.executable, "-m", "lab.kube", "--name", lab.name]
    try:
        with subprocess.Popen([*command, "up"], stdout=subprocess.DEVNULL) as half:
            deadline = time.monotonic() + 30
            while not os.path.exists(lab.log(log)):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            half.kill()
        assert os.listdir(f"{cgroup2_root()}/{lab.name}")
        yield command, lab
    finally:
        lifecycle.down(lab)


def assert_gone(place: Place) -> None:
    assert not os.path.exists(place.lab.state)
    assert not os.path.exists(f"{cgroup2_root()}/{place.lab.name}")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before linger
        free.bind(("127.0.0.1", place.port))
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            assert place.lab.state not in Path(f"{folder}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue


def contains(whole: object, part: object) -> bool:
    """Whether everything in `part` is in `whole`, which the server may have given defaults."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) == len(whole) and all(map(contains, whole, part))
    return whole == part


def cells(table: str) -> list[list[str]]:
    """What kubectl printed, by the columns that its head has."""
    lines = table.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", lines[0])]
    return [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
