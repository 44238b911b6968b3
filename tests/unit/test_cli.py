"""`spiderpoolctl` on a real store: what it prints, what it refuses, and that a refused file changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from api.claim import Claim
from api.meta import Resource
from api.pool import Pool, PoolStatus
from api.validate import defaulted
from cli.__main__ import main
from cli.output import age, table
from store.errors import NotFoundError
from store.port import Store
from store.sqlite import SqliteStore

POOL = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: web-v4, labels: {team: shop}}
spec:
  subnet: 172.30.40.0/24
  ips: [172.30.40.10-172.30.40.99]
  nodeName: [node-1, node-2]
"""

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.7, ports: [{name: http, port: 80}, {name: https, port: 443}]}
"""


class Shell:
    """Runs commands on one store and remembers what they printed."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store = str(folder / "state" / "store.db")
        self._folder = folder
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        status = main([*words, "--store", self.store])
        self.out, self.err = self._capsys.readouterr()
        return status

    def file(self, text: str, name: str = "manifest.yaml") -> str:
        path = self._folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def apply(self, text: str) -> int:
        return self("apply", "-f", self.file(text))

    def edit(self, work: Callable[[Store], Any]) -> Any:
        async def run() -> Any:
            store = await SqliteStore.open(self.store)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def create(self, resource: Resource) -> None:
        self.edit(lambda store: store.create(resource))


@pytest.fixture(name="shell")
def shell_fixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


def claim(address: str, **spec: Any) -> Claim:
    whole = {
        "address": address,
        "ipVersion": 4,
        "pool": "web-v4",
        "podUID": "u-1",
        "nic": "eth0",
        "node": "node-1",
        "workload": {"namespace": "web", "name": "front-1"},
        **spec,
    }
    return defaulted(msgspec.convert({"metadata": {"name": address}, "spec": whole}, Claim))


def test_created_unchanged_configured(shell: Shell) -> None:
    assert shell.apply(POOL + "---" + SERVICE) == 0
    assert shell.out == "spiderippool.spiderpool.spidernet.io/web-v4 created\nservice/web created\n"
    assert shell.apply(POOL + "---" + SERVICE) == 0
    assert shell.out == "spiderippool.spiderpool.spidernet.io/web-v4 unchanged\nservice/web unchanged\n"
    assert shell.apply(POOL.replace("172.30.40.99", "172.30.40.120") + "---" + SERVICE) == 0
    assert shell.out == "spiderippool.spiderpool.spidernet.io/web-v4 configured\nservice/web unchanged\n"
    assert shell.err == ""
    assert shell("get", "sp", "web-v4", "-o", "json") == 0
    stored = json.loads(shell.out)
    assert stored["spec"]["ips"] == ["172.30.40.10-172.30.40.120"]
    assert stored["spec"]["ipVersion"] == 4
    assert stored["metadata"]["finalizers"] == ["spiderpool.spidernet.io"]
    assert stored["metadata"]["labels"] == {"team": "shop", "ipam.spidernet.io/ippool-cidr": "172-30-40-0-24"}


def test_a_file_with_one_bad_document_changes_nothing(shell: Shell) -> None:
    bad = POOL.replace("web-v4", "other").replace("172.30.40.10-172.30.40.99", "172.30.40.99-172.30.40.10")
    assert shell.apply(POOL + "---" + bad + "---\nkind: [") == 1
    assert shell.out == ""
    assert "document 3: not YAML" in shell.err
    assert not os.path.exists(shell.store), "nothing was opened, let alone written"
    assert shell.apply(POOL + "---" + bad + "---" + SERVICE.replace("name: web}", "name: Web}")) == 1
    lines = shell.err.splitlines()
    assert len(lines) == 3, lines
    assert 'document 2: SpiderIPPool "other": spec.ips[0]: Invalid value' in lines[0]
    assert "reversed" in lines[0]
    assert 'document 3: Service "Web": ' in lines[1]
    assert lines[2] == "error: nothing was changed"
    assert shell("get", "sp") == 0
    assert (shell.out, shell.err) == ("", "No resources found.\n")


def test_documents_of_one_file_are_checked_against_each_other(shell: Shell) -> None:
    assert shell.apply(POOL + "---" + POOL.replace("web-v4", "twin")) == 1
    assert 'document 2: SpiderIPPool "twin": spec.ips: Forbidden: overlap with IPPool web-v4' in shell.err
    assert shell.apply(POOL + "---" + POOL) == 1
    assert "the same object as" in shell.err


def test_a_pool_may_not_drop_a_claimed_address(shell: Shell) -> None:
    assert shell.apply(POOL) == 0
    shell.create(claim("172.30.40.10"))
    assert shell.apply(POOL.replace("172.30.40.10-", "172.30.40.11-")) == 1
    assert "remove an IP address 172.30.40.10 that is being used by Pod web/front-1" in shell.err
    assert shell.apply(POOL.replace("-172.30.40.99", "-172.30.40.98")) == 0


def test_a_claimed_pool_is_terminating_until_its_last_address_goes(shell: Shell) -> None:
    assert shell.apply(POOL) == 0
    for n in range(10, 15):
        shell.create(claim(f"172.30.40.{n}"))
    assert shell("delete", "spiderippool", "web-v4") == 0
    assert shell.out == (
        "spiderippool.spiderpool.spidernet.io/web-v4 is terminating: 5 of its addresses are claimed "
        "(172.30.40.10, 172.30.40.11, 172.30.40.12, …), it goes with the last of them "
        "(finalizer spiderpool.spidernet.io)\n"
    )
    assert shell.apply(POOL) == 1
    assert "cannot update a terminating IPPool" in shell.err


def test_delete_by_file_goes_backwards_and_names_what_is_missing(shell: Shell) -> None:
    assert shell.apply(POOL + "---" + SERVICE) == 0
    file = shell.file(POOL + "---" + SERVICE)
    assert shell("delete", "-f", file) == 0
    first, second = shell.out.splitlines()
    assert first == "service/web deleted"
    assert second.startswith("spiderippool.spiderpool.spidernet.io/web-v4 is terminating: no address is claimed")
    assert shell("delete", "service", "web", "nope") == 1
    assert shell.err == (
        "error: service/web not found in namespace default\nerror: service/nope not found in namespace default\n"
    )
    assert shell("delete", "service", "web", "--ignore-not-found") == 0
    assert shell("delete", "sp") == 1
    assert shell("delete") == 1


def test_delete_spares_a_successor(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.apply(SERVICE) == 0
    real = SqliteStore.get

    async def get_then_replace(self: SqliteStore, kind: type[Any], name: str, namespace: str = "") -> Any:
        found = await real(self, kind, name, namespace)
        monkeypatch.setattr(SqliteStore, "get", real)
        await self.delete(kind, name, namespace)
        await self.create(replace(found, metadata=replace(found.metadata, uid="", resource_version="")))
        return found

    monkeypatch.setattr(SqliteStore, "get", get_then_replace)
    assert shell("delete", "svc", "web") == 1
    assert "service/web" in shell.err
    assert shell("get", "svc", "web", "-o", "name") == 0


def test_tables(shell: Shell) -> None:
    assert (
        shell.apply(POOL + "---" + SERVICE + "---" + SERVICE.replace("name: web}", "name: db, namespace: data}")) == 0
    )
    shell.edit(lambda store: _report(store, PoolStatus(total_ip_count=90, allocated_ip_count=1)))
    shell.create(claim("172.30.40.10"))
    assert shell("get", "spiderippools") == 0
    head, row = shell.out.splitlines()
    assert head.split() == ["NAME", "VERSION", "SUBNET", "ALLOCATED-IP-COUNT", "TOTAL-IP-COUNT", "DEFAULT"]
    assert row.split() == ["web-v4", "4", "172.30.40.0/24", "1", "90", "false"]
    assert head.index("SUBNET") == row.index("172.30.40.0/24")
    assert shell("get", "SpiderIPPool", "-o", "wide") == 0
    assert shell.out.splitlines()[0].split()[6:] == ["DISABLE", "NodeName", "MultusName", "APP-NAMESPACE", "READY"]
    assert shell.out.splitlines()[1].split()[6:] == ["false", '["node-1","node-2"]', "<none>", "<none>", "<none>"]
    assert shell("get", "svc") == 0
    assert [line.split()[0] for line in shell.out.splitlines()] == ["NAME", "web"]
    assert shell("get", "services", "-A") == 0
    assert [line.split()[:5] for line in shell.out.splitlines()[1:]] == [
        ["data", "db", "ClusterIP", "10.96.0.7", "80,443"],
        ["default", "web", "ClusterIP", "10.96.0.7", "80,443"],
    ]
    assert shell("get", "sic") == 0
    cells = ["172.30.40.10", "172.30.40.10", "web-v4", "Allocated", "web", "front-1", "eth0", "node-1"]
    assert shell.out.splitlines()[1].split()[:8] == cells


async def _report(store: Store, status: PoolStatus) -> None:
    await store.update_status(replace(await store.get(Pool, "web-v4"), status=status))


def test_apply_keeps_the_status_and_what_others_added(shell: Shell) -> None:
    assert shell.apply(POOL) == 0

    async def others(store: Store) -> None:
        await _report(store, PoolStatus(allocated_ip_count=3))
        pool = await store.get(Pool, "web-v4")
        metadata = replace(pool.metadata, labels={**pool.metadata.labels, "by": "other"}, annotations={"a": "b"})
        await store.update(replace(pool, metadata=metadata, spec=replace(pool.spec, disable=True)))

    shell.edit(others)
    assert shell.apply(POOL) == 0
    stored = shell.edit(lambda store: store.get(Pool, "web-v4"))
    assert stored.status.allocated_ip_count == 3
    assert stored.metadata.labels["by"] == "other"
    assert stored.metadata.annotations == {"a": "b"}
    assert stored.spec.disable is False, "the file decides about spec"


def test_what_get_prints_can_be_applied(shell: Shell) -> None:
    assert shell.apply(POOL + "---" + SERVICE) == 0
    assert shell("get", "sp", "-o", "yaml") == 0
    listed = yaml.safe_load(shell.out)
    assert (listed["apiVersion"], listed["kind"], len(listed["items"])) == ("v1", "List", 1)
    assert shell.apply(shell.out) == 0
    assert shell.out == "spiderippool.spiderpool.spidernet.io/web-v4 unchanged\n"
    stale = yaml.safe_dump(listed)
    assert shell.apply(POOL.replace("172.30.40.99", "172.30.40.120")) == 0
    assert shell.apply(stale) == 1, "a resourceVersion in the file is a precondition"
    assert "document 1, items[0]" in shell.err
    assert "changed by others" not in shell.err, "it is refused at once"


def test_apply_tries_again_after_a_race(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.apply(POOL) == 0
    real = SqliteStore.update

    async def somebody_first(self: SqliteStore, resource: Any) -> Any:
        monkeypatch.setattr(SqliteStore, "update", real)
        await _report(self, PoolStatus(allocated_ip_count=7))
        return await real(self, resource)

    monkeypatch.setattr(SqliteStore, "update", somebody_first)
    assert shell.apply(POOL.replace("172.30.40.99", "172.30.40.120")) == 0
    assert shell.out.endswith("configured\n")
    stored = shell.edit(lambda store: store.get(Pool, "web-v4"))
    assert (stored.spec.ips, stored.status.allocated_ip_count) == (["172.30.40.10-172.30.40.120"], 7)


def test_a_race_that_makes_the_change_wrong_is_refused(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.apply(POOL) == 0
    real = SqliteStore.update

    async def somebody_claims(self: SqliteStore, resource: Any) -> Any:
        monkeypatch.setattr(SqliteStore, "update", real)
        await self.create(claim("172.30.40.99"))
        await _report(self, PoolStatus(allocated_ip_count=1))
        return await real(self, resource)

    monkeypatch.setattr(SqliteStore, "update", somebody_claims)
    assert shell.apply(POOL.replace("172.30.40.99", "172.30.40.50")) == 1
    assert "172.30.40.99 that is being used by Pod web/front-1" in shell.err


def test_many_objects_keep_their_order(shell: Shell) -> None:
    services = [SERVICE.replace("name: web}", f"name: s{n}}}") for n in range(600)]
    assert shell.apply("---".join(services)) == 0
    assert shell.out == "".join(f"service/s{n} created\n" for n in range(600))


def test_ip_show(shell: Shell) -> None:
    assert shell.apply(POOL) == 0
    shell.create(claim("172.30.40.10"))
    assert shell("ip", "show", "--ip", "172.30.40.10") == 0
    assert "front-1" in shell.out
    assert shell("ip", "show", "--ip", "172.30.40.10", "-o", "json") == 0
    assert json.loads(shell.out)["spec"]["podUID"] == "u-1"
    assert shell("ip", "show", "--ip", "172.30.40.11") == 1
    assert shell.err == "error: nobody has 172.30.40.11: it is an unclaimed address of pool web-v4\n"
    assert shell("ip", "show", "--ip", "10.9.9.9") == 1
    assert "it is in no pool" in shell.err


def test_an_address_is_released_only_if_that_is_insisted_on(shell: Shell) -> None:
    assert shell.apply(POOL) == 0
    shell.create(claim("172.30.40.10"))
    assert shell("ip", "show", "172.30.40.10") == 0
    shown = {line.partition(":")[0]: line.partition(":")[2].strip() for line in shell.out.splitlines()}
    assert (shown["Pool"], shown["Pod"], shown["Node"]) == ("web-v4", "web/front-1 (UID u-1)", "node-1")
    assert shell("ip", "release", "172.30.40.10") == 1
    assert "was not released, it is kept for pod web/front-1" in shell.err
    assert "--force" in shell.err
    assert shell("ip", "release", "--ip", "172.30.40.10", "-f") == 0
    assert shell.out == "172.30.40.10 of pool web-v4 released, it was pod web/front-1's\n"
    assert shell("ip", "release", "172.30.40.10", "--force") == 1
    assert "nobody has 172.30.40.10" in shell.err


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
        ([], 2, "COMMAND"),
        (["get", "pods"], 1, 'unknown kind "pods"; kinds are: spiderippools (sp), '),
        (["get", "spiderpool"], 1, "did you mean spiderippool?"),
        (["get", "sp"], 1, "there is no store at"),
        (["delete", "sp", "x"], 1, "there is no store at"),
        (["apply", "-f", "/no/such/file.yaml"], 1, "cannot read /no/such/file.yaml: No such file or directory"),
        (["apply", "-f", "/"], 1, "cannot read /: Is a directory"),
        (["apply", "-f", os.devnull], 1, f"no objects in {os.devnull}"),
        (["apply", "-f", os.devnull], 1, "error: nothing was changed"),
        (["apply"], 2, "-f/--file"),
        (["ip", "show", "--ip", "10.0.0.300"], 2, "'10.0.0.300' is not an IP address"),
        (["get", "svc", "x", "-A"], 1, "exclude each other"),
    ],
)
def test_wrong_turns(
    shell: Shell, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    try:
        got = main([*words, "--store", shell.store] if words else [])
    except SystemExit as stop:
        got = stop.code if isinstance(stop.code, int) else -1
    err = capsys.readouterr().err
    assert got == status
    assert text in err
    assert "Traceback" not in err
    assert not os.path.exists(shell.store)


def test_a_store_that_is_none(shell: Shell, tmp_path: Path) -> None:
    shell.store = shell.file("this is no database, " * 100, "store.db")
    assert shell("get", "sp") == 1
    assert shell.err.startswith("error: ")
    assert "Traceback" not in shell.err
    shell.store = str(tmp_path / "store.db" / "nested")
    assert shell.apply(POOL) == 1
    assert "cannot create the folder" in shell.err


@pytest.mark.skipif(os.geteuid() != 0, reason="giving up root needs root")
def test_somebody_elses_store_is_not_taken_for_a_missing_one() -> None:
    with tempfile.TemporaryDirectory(prefix="spt-") as folder:  # below pytest's own folder nobody would get this far
        for mode, place in ((0o755, "store.db"), (0o700, "closed/store.db")):
            path = os.path.join(folder, place)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.chmod(os.path.dirname(path), mode)
            with open(path, "w"):
                os.chmod(path, 0o600)
        os.chmod(folder, 0o755)
        for place in ("store.db", "closed/store.db"):
            code = f"from cli.__main__ import main; main(['get', 'sp', '--store', {os.path.join(folder, place)!r}])"
            done = subprocess.run(
                [sys.executable, "-c", f"import os; import cli.__main__; os.setuid(65534); {code}"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert "no permission for the store" in done.stderr


def test_from_a_process_with_standard_input_and_environment(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    environment = {**os.environ, "SPIDERPOOL_STORE_PATH": path}

    def run(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli", *words]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment, timeout=30, check=False
        )

    assert run("apply", "-f", "-", text=POOL).stdout == "spiderippool.spiderpool.spidernet.io/web-v4 created\n"
    assert run("get", "sp", "-o", "name").stdout == "spiderippool.spiderpool.spidernet.io/web-v4\n"
    refused = run("apply", "-f", "-", text=POOL.replace("172.30.40.0/24", "172.30.41.0/24"))
    assert refused.returncode == 1
    assert (
        'standard input, document 1: SpiderIPPool "web-v4": spec.subnet: Forbidden: is not changeable' in refused.stderr
    )


def test_a_reader_that_has_seen_enough(shell: Shell) -> None:
    assert shell.apply(POOL) == 0
    command = [sys.executable, "-m", "cli", "get", "sp", "--store", shell.store]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=30, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_ages_are_those_of_kubectl() -> None:
    day = 86_400
    assert [age(s) for s in (0, 119, 120, 330, 600, 3600, 10_800, 10_860)] == [
        *("0s", "119s", "2m", "5m30s", "10m", "60m", "3h", "3h1m"),
    ]
    assert [age(s) for s in (8 * 3600, 2 * day, 2 * day + 3600, 8 * day, 800 * day, 9 * 365 * day, -5)] == [
        *("8h", "2d", "2d1h", "8d", "2y70d", "9y", "0s"),
    ]


def test_a_table_without_rows_and_missing_objects(shell: Shell) -> None:
    assert table(["A", "BB"], [["ccc", "d"]]) == "A     BB\nccc   d\n"
    assert shell.apply(POOL) == 0
    assert shell("get", "sp", "nope") == 1
    assert shell.err == 'error: spiderippools "nope" not found\n'
    assert shell("get", "svc", "nope", "-n", "x") == 1
    assert "not found in namespace x" in shell.err
    with pytest.raises(NotFoundError):
        shell.edit(lambda store: store.get(Pool, "nope"))
