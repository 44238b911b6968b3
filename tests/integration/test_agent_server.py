"""The real agent process, called by the real executable; the plugins only record what reaches them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.host import Host
from agent.server import Server
from agent.settings import ServerSettings
from agent.wire import Status
from plugins.cni import Call
from tests.integration.installation import CONFIG, ROOT, Agent, Installation, collect, netns


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)


@pytest.fixture(scope="session")
def pod() -> Iterator[str]:
    with netns() as path:
        yield path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One agent for the tests that leave it as it was."""
    cni = Installation(tmp_path_factory.mktemp("shared"))
    with cni.agent("--log-level=debug") as agent:
        yield cni
        assert agent.process.poll() is None, agent.log()
        errors = [line for line in agent.lines() if line["level"] in ("error", "critical")]
        assert all("KeyError: 'stub'" in line.get("trace", "") for line in errors), errors
        assert_no_descriptors_left(agent)
        assert agent.stop() == 0


@pytest.fixture
def cni(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


def assert_no_descriptors_left(agent: Agent) -> None:
    folder = f"/proc/{agent.process.pid}/fd"
    targets = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    assert not [target for target in targets if target.startswith(("net:", "/proc", "/run/netns"))], targets


def stub(**orders: Any) -> dict[str, Any]:
    return {**CONFIG, "stub": orders}


def connect(cni: Installation) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(cni.socket))
    return client


def frame(*, stdin: bytes = b"{}", **env: str) -> bytes:
    packed = b"".join(f"{key}={value}\0".encode() for key, value in env.items())
    return b"SPD1" + struct.pack("!II", len(packed), len(stdin)) + packed + stdin


def read_all(client: socket.socket) -> bytes:
    data = b""
    while chunk := client.recv(65536):
        data += chunk
    return data


def wait_for_record(cni: Installation, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + 10
    while sum(text in line for line in cni.recorded()) < count:
        assert time.monotonic() < deadline, cni.recorded()
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_in_flight(port: int, count: int) -> None:
    """Until so many calls are inside the agent."""
    deadline = time.monotonic() + 10
    while f"spiderpool_agent_cni_calls_in_flight {float(count)}" not in get(port, "/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_namespace_arrives_open(shared: Installation, pod: str) -> None:
    outcome = shared.call("ADD", netns=pod, CNI_CONTAINERID="inode")
    assert outcome.status == 0
    assert outcome.json == {"cniVersion": "1.0.0", "ips": [], "dns": {}}
    (line,) = [line for line in shared.recorded() if line.startswith("end") and " inode " in line]
    assert int(line.split()[-1]) == os.stat(pod).st_ino


@pytest.mark.parametrize("version", ["0.3.0", "0.4.0", "1.1.0"])
def test_errors_come_in_the_callers_version(shared: Installation, pod: str, version: str) -> None:
    config = {**stub(error="refused"), "cniVersion": version}
    shared.call("ADD", config, netns=pod).error(7, version)


def test_a_bug_is_an_internal_error_without_a_trace(shared: Installation, pod: str) -> None:
    outcome = shared.call("ADD", stub(error="bug"), netns=pod, CNI_ARGS="K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p")
    outcome.error(199)
    assert b"Traceback" not in outcome.stdout
    assert b"KeyError" not in outcome.stdout


@pytest.mark.parametrize(
    ("stdin", "code", "word"),
    [
        (b"", 6, "empty"),
        (b" \n", 6, "empty"),
        (b'{"cniVersion":"1.0.0","na', 6, "JSON"),
        (b'{"cniVersion":"1.0.0","name":"\xff\xfe"}', 6, "JSON"),
        (b"\xff\xfe{\0}\0", 6, "JSON"),
        (b"[1]", 6, "list"),
        (b"null", 6, "NoneType"),
        (b'"' + b"x" * ((1 << 20) - 2) + b'"', 6, "str"),
        (b"x" * ((1 << 20) + 1), 6, "1048576"),
        (b"[" * 500_000, 6, "JSON"),
        (b"{}", 1, "0.1.0"),
        (b'{"cniVersion":"9.9.9"}', 1, "9.9.9"),
        (b'{"cniVersion":["1.0.0"]}', 1, "1.0.0"),
        (b'{"cniVersion":"1.0.0\\u0000"}', 1, "cniVersion"),
    ],
)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_malformed_input(shared: Installation, pod: str, command: str, stdin: bytes, code: int, word: str) -> None:
    error = shared.call(command, stdin, netns=pod, CNI_CONTAINERID="malformed").error(code)
    assert word in error["msg"] + error["details"]
    assert not [line for line in shared.recorded() if " malformed " in line]


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"CNI_CONTAINERID": "(unset)"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": ""}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "../../etc/passwd"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "a/b"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "a\nb"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "a" * 300}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "\udcff"}, "CNI_CONTAINERID"),
        ({"CNI_IFNAME": "(unset)"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "../eth0"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": ".."}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a" * 16}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "eth 0"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "eth0:1"}, "CNI_IFNAME"),
        ({"CNI_ARGS": "nonsense"}, "CNI_ARGS"),
        ({"CNI_ARGS": "=x"}, "CNI_ARGS"),
        ({"CNI_ARGS": "K8S_POD_NAME=\udcfe"}, "CNI_ARGS"),
    ],
)
def test_hostile_environment(shared: Installation, pod: str, env: dict[str, Any], name: str) -> None:
    for command in ("ADD", "DEL"):
        error = shared.call(command, netns=pod, **env).error(4)
        assert name in error["msg"]


def test_netns_paths_that_are_something_else(shared: Installation) -> None:
    plain = shared.root / "plain"
    plain.write_text("x")
    fifo = shared.root / "fifo"
    os.mkfifo(fifo)
    cases = ["(unset)", str(plain), str(fifo), "/nowhere/x", str(shared.root), "/dev/null", "/proc/self/ns/mnt"]
    cases += [str(shared.socket), "/proc/1/ns/net", "/proc/self/ns/net"]
    for path in cases:
        error = shared.call("ADD", CNI_NETNS=path, CNI_CONTAINERID="elsewhere").error(4)
        assert "CNI_NETNS" in error["msg"], (path, error)
        shared.call("DEL", CNI_NETNS=path, CNI_CONTAINERID="elsewhere").empty()
    lines = [line for line in shared.recorded() if " elsewhere " in line]
    assert {line.split()[2] for line in lines} == {"DEL"}
    assert {line.split()[-1] for line in lines} == {"0"}


def test_names_without_a_plugin(shared: Installation, pod: str) -> None:
    (shared.bin / "other").hardlink_to(shared.bin / "spiderpool")
    for command in ("ADD", "DEL"):
        assert "other" in shared.call(command, name="other", netns=pod).error(4)["msg"]


def test_calls_for_one_nic_execute_in_order(shared: Installation, pod: str) -> None:
    first = shared.start("ADD", stub(sleep=0.5), netns=pod, CNI_CONTAINERID="order")
    wait_for_record(shared, "begin spiderpool ADD order")
    second = shared.start("DEL", netns=pod, CNI_CONTAINERID="order")
    shared.call("ADD", netns=pod, CNI_CONTAINERID="order", CNI_IFNAME="net1")
    assert collect(first).status == 0
    collect(second).empty()
    lines = [line.split()[:5] for line in shared.recorded() if " order " in line]
    eth0 = [f"{when} {command}" for when, _, command, _, ifname in lines if ifname == "eth0"]
    assert eth0 == ["begin ADD", "end ADD", "begin DEL", "end DEL"]
    assert lines.index(["end", "spiderpool", "ADD", "order", "net1"]) < lines.index(
        ["end", "spiderpool", "ADD", "order", "eth0"]
    )


def test_malformed_frames_harm_nobody(shared: Installation, pod: str) -> None:
    garbage = [
        b"",
        b"S",
        b"SPD1",
        b"GET / HTTP/1.1\r\n\r\n",
        b"SPD1" + struct.pack("!II", (128 << 10) + 1, 0),
        b"SPD1" + struct.pack("!II", 0, (1 << 20) + 1),
        b"SPD1" + struct.pack("!II", 0xFFFFFFFF, 0xFFFFFFFF),
        b"SPD1" + struct.pack("!II", 100, 100) + b"x" * 150,
        frame(CNI_COMMAND="DEL") + b"more",
    ]
    for data in garbage:
        with connect(shared) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"", data
    assert shared.call("ADD", netns=pod).status == 0


def test_descriptors_that_nobody_asked_for_are_closed(shared: Installation, pod: str) -> None:
    namespace = os.open(pod, os.O_RDONLY)
    try:
        for count in (1, 2, 3, 50):
            for data in (b"S", b"garbage-garbage", frame(CNI_COMMAND="DEL", SPIDERPOOL_PLUGIN="x")):
                with connect(shared) as client:
                    socket.send_fds(client, [data], [namespace] * count)
                    client.shutdown(socket.SHUT_WR)
                    read_all(client)
    finally:
        os.close(namespace)  # that the agent closed its copies is asserted when the module ends


def test_a_request_in_single_bytes(shared: Installation) -> None:
    data = frame(stdin=json.dumps(CONFIG).encode(), CNI_COMMAND="STATUS", SPIDERPOOL_PLUGIN="spiderpool")
    with connect(shared) as client:
        for byte in data:
            client.sendall(bytes([byte]))
        assert read_all(client)[:4] == b"SPD1"


def test_only_root_may_call(shared: Installation) -> None:
    """The file's mode keeps others out, and where it does not, their credentials do."""
    assert shared.socket.stat().st_mode & 0o777 == 0o600
    code = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1]); s.settimeout(5)\n"
        "try: s.sendall(bytes.fromhex(sys.argv[2]))\n"
        "except BrokenPipeError: pass\n"
        "try: print(s.recv(100))\n"
        "except ConnectionResetError: print(b'')\n"
    )
    for folder in (shared.socket.parent, *shared.socket.parent.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    request = frame(stdin=json.dumps(CONFIG).encode(), CNI_COMMAND="DEL", SPIDERPOOL_PLUGIN="spiderpool")
    command = [sys.executable, "-c", code, str(shared.socket), request.hex()]
    refused = subprocess.run(command, capture_output=True, check=False)
    assert b"PermissionError" in refused.stderr
    shared.socket.chmod(0o666)
    try:
        closed = subprocess.run(command, capture_output=True, check=True)
    finally:
        shared.socket.chmod(0o600)
    assert closed.stdout == b"b''\n"


def test_log_lines_name_pod_and_container(cni: Installation, pod: str) -> None:
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=u-1"
    with cni.agent() as agent:
        cni.call("ADD", netns=pod, CNI_CONTAINERID="cc", CNI_ARGS=args)
        cni.call("ADD", stub(error="bug"), netns=pod, CNI_CONTAINERID="dd", CNI_ARGS=args)
        lines = {line["container"]: line for line in agent.lines() if "container" in line}
    for line in lines.values():
        assert line["pod"] == "ns/web-0"
        assert line["pod_uid"] == "u-1"
        assert (line["plugin"], line["command"], line["ifname"]) == ("spiderpool", "ADD", "eth0")
    assert lines["cc"]["level"] == "info"
    assert "Traceback" in lines["dd"]["trace"]


def test_a_call_beyond_its_deadline_is_rolled_back(cni: Installation, pod: str) -> None:
    with cni.agent("--server-add-deadline=0.3", "--server-deadline=0.2", "--ipam-add-deadline=0.25"):
        error = cni.call("ADD", stub(sleep=30), netns=pod).error(11)
        assert "0.3 s" in error["details"]
        cni.call("DEL", stub(sleep=30), netns=pod).error(11)
    assert [line.split()[0] for line in cni.recorded()] == ["begin", "rolled-back"] * 2


def test_more_calls_than_the_room_holds(cni: Installation, pod: str) -> None:
    metrics = free_port()
    with cni.agent("--server-concurrency=2", "--server-waiting=3", f"--health-metrics-port={metrics}"):
        running = [cni.start("ADD", stub(sleep=1.2), netns=pod, CNI_CONTAINERID=f"c{n}") for n in range(5)]
        wait_in_flight(metrics, 5)
        outcomes = [cni.call("ADD", stub(), netns=pod, CNI_CONTAINERID=f"late{n}") for n in range(3)]
        cni.call("DEL", stub(), netns=pod, CNI_CONTAINERID="gone").empty()
        assert not [line for line in cni.recorded() if line.startswith("end spiderpool ADD")]  # told at once
        for outcome in outcomes:
            assert "busy" in outcome.error(11)["details"]
        assert sum(line.startswith("begin spiderpool ADD") for line in cni.recorded()) == 2
        assert [collect(process).status for process in running] == [0] * 5
        wait_for_record(cni, "end spiderpool DEL gone")


def test_an_add_whose_caller_has_gone_is_not_begun(cni: Installation, pod: str) -> None:
    """The runtime deletes then, and if that goes by the queue it overtakes what waits."""
    metrics = free_port()
    with cni.agent("--server-concurrency=1", f"--health-metrics-port={metrics}") as agent:
        executing = cni.start("ADD", stub(sleep=0.6), netns=pod, CNI_CONTAINERID="first")
        wait_for_record(cni, "begin", 1)
        abandoned = cni.start("ADD", netns=pod, CNI_CONTAINERID="abandoned")
        wait_in_flight(metrics, 2)
        abandoned.kill()
        collect(abandoned)
        assert collect(executing).status == 0
        assert cni.call("ADD", netns=pod, CNI_CONTAINERID="next").status == 0
        assert any("the caller has gone" in line["message"] for line in agent.lines())
    assert [line.split()[3] for line in cni.recorded() if line.startswith("end")] == ["first", "next"]


def test_a_slow_caller_is_given_up(cni: Installation) -> None:
    with cni.agent("--server-read-deadline=0.2"), connect(cni) as client:
        client.sendall(b"SPD1\0")
        started = time.monotonic()
        assert read_all(client) == b""
        assert time.monotonic() - started < 3


def test_a_second_agent_refuses_to_start(cni: Installation, pod: str) -> None:
    with cni.agent() as first:
        with cni.agent(ready=False) as second:
            assert second.process.wait(15) == 1
            assert "another agent serves" in second.log()
        assert cni.call("ADD", netns=pod).status == 0
        assert first.process.poll() is None


def test_a_foreign_listener_is_not_replaced(cni: Installation) -> None:
    cni.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(cni.socket))
        listener.listen(1)
        with cni.agent(ready=False) as agent:
            assert agent.process.wait(15) == 1
            assert "another process answers" in agent.log()
    cni.socket.unlink()
    cni.socket.write_text("precious")
    with cni.agent(ready=False) as agent:
        assert agent.process.wait(15) == 1
        assert "not a socket" in agent.log()
    assert cni.socket.read_text() == "precious"


def test_the_socket_of_a_dead_agent_is_replaced(cni: Installation, pod: str) -> None:
    with cni.agent() as agent:
        agent.kill()
    assert cni.socket.exists()
    with cni.agent():
        assert cni.call("ADD", netns=pod).status == 0


def test_stop_finishes_what_executes_and_hands_on_what_waits(cni: Installation, pod: str) -> None:
    metrics = free_port()
    with cni.agent("--server-concurrency=2", f"--health-metrics-port={metrics}") as agent:
        executing = [cni.start("ADD", stub(sleep=0.6), netns=pod, CNI_CONTAINERID=f"run{n}") for n in range(2)]
        wait_for_record(cni, "begin", 2)
        waiting_add = cni.start("ADD", netns=pod, CNI_CONTAINERID="later")
        waiting_check = cni.start("CHECK", netns=pod, CNI_CONTAINERID="check")
        waiting_del = cni.start("DEL", netns=pod, CNI_CONTAINERID="del")
        wait_in_flight(metrics, 5)
        agent.process.send_signal(signal.SIGTERM)
        agent.wait_for("STOPPING=1")
        collect(waiting_check).error(11)
        collect(waiting_del).empty()
        assert [collect(process).status for process in executing] == [0, 0]
        assert agent.process.wait(10) == 0
        assert not cni.socket.exists()
    with cni.agent():
        assert collect(waiting_add).status == 0
        assert cni.queued() == []
    ends = [line.split()[3] for line in cni.recorded() if line.startswith("end")]
    assert sorted(ends) == ["del", "later", "run0", "run1"]
    assert ends[-1] == "later"


def test_stop_answers_what_is_in_the_listen_queue(tmp_path: Path) -> None:
    """More connections than one turn of the event loop takes: none may be cut off without an answer."""
    settings = ServerSettings(socket=str(tmp_path / "cni.sock"))
    request = frame(CNI_COMMAND="DEL", CNI_CONTAINERID="c", CNI_IFNAME="eth0", SPIDERPOOL_PLUGIN="ifacer")

    async def admit(_: Call) -> None:
        return

    async def main() -> None:
        server = Server(settings)
        server.claim()
        server.listen(Host({}, settings, admit))
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
            for client in clients:
                client.settimeout(5)
                client.connect(settings.socket)
                client.sendall(request)
            await server.stop(1)
            assert {client.recv(8) for client in clients} == {b"SPD1" + struct.pack("!I", Status.STOPPING)}

    asyncio.run(main())


def test_stop_does_not_wait_for_ever(cni: Installation, pod: str) -> None:
    with cni.agent("--server-stop-patience=0.3") as agent:
        check = cni.start("CHECK", stub(sleep=60), netns=pod, CNI_CONTAINERID="check")
        delete = cni.start("DEL", stub(sleep=60), netns=pod, CNI_CONTAINERID="del")
        wait_for_record(cni, "begin", 2)
        started = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - started < 5
        collect(delete).empty()
        collect(check).error(11)
    assert len(cni.queued()) == 1
    assert sum(line.startswith("rolled-back") for line in cni.recorded()) == 2


def test_sighup_is_ignored(cni: Installation, pod: str) -> None:
    with cni.agent() as agent:
        agent.process.send_signal(signal.SIGHUP)
        assert cni.call("ADD", netns=pod).status == 0
        assert agent.stop() == 0


def test_a_dead_background_task_ends_the_agent(cni: Installation) -> None:
    with cni.agent(ready=False, env={"STUB_DIE": "0.3"}) as agent:
        assert agent.process.wait(15) == 1
        assert [line for line in agent.lines() if line["level"] == "critical" and "stub" in line["message"]]
    assert not cni.socket.exists()


def test_adds_wait_for_the_start_and_status_does_not(cni: Installation, pod: str) -> None:
    with cni.agent(ready=False, env={"STUB_START": "1.5"}) as agent:
        add = cni.start("ADD", netns=pod)
        deadline = time.monotonic() + 10
        while not cni.socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "starting" in cni.call("STATUS", {**CONFIG, "cniVersion": "1.1.0"}).error(50, "1.1.0")["msg"]
        cni.call("DEL", CNI_CONTAINERID="early").empty()
        assert [line.split()[3] for line in cni.recorded()] == ["early", "early"]
        agent.wait_for("READY=1")
        assert collect(add).status == 0
        cni.call("STATUS", {**CONFIG, "cniVersion": "1.1.0"}).empty()


def test_health_and_metrics(cni: Installation, pod: str) -> None:
    health, metrics = free_port(), free_port()
    flags = (f"--health-port={health}", f"--health-metrics-port={metrics}")
    with cni.agent(*flags, ready=False, env={"STUB_START": "1"}) as agent:
        deadline = time.monotonic() + 10
        while not cni.socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert get(health, "/v1/runtime/startup")[0] == 500
        assert get(health, "/v1/runtime/readiness")[0] == 500
        assert get(health, "/v1/runtime/liveness")[0] == 200
        agent.wait_for("READY=1")
        for probe in ("startup", "readiness", "liveness"):
            assert get(health, f"/v1/runtime/{probe}")[0] == 200
        assert get(health, "/")[0] == 404
        cni.call("ADD", netns=pod)
        cni.call("ADD", stub(error="refused"), netns=pod)
        status, text = get(metrics, "/metrics")
        assert status == 200
        assert 'spiderpool_agent_cni_calls_total{code="0",command="ADD",plugin="spiderpool"} 1.0' in text
        assert 'spiderpool_agent_cni_calls_total{code="7",command="ADD",plugin="spiderpool"} 1.0' in text
        for garbage in (b"\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n", b"x" * 100_000):
            with socket.create_connection(("127.0.0.1", health), timeout=10) as client:
                try:
                    client.sendall(garbage)
                    client.recv(1000)
                except ConnectionError:
                    pass
        assert get(health, "/v1/runtime/liveness")[0] == 200
        assert "Traceback" not in agent.log()


def test_the_watchdog_is_fed(cni: Installation) -> None:
    with cni.agent(env={"WATCHDOG_USEC": "200000"}) as agent:
        for _ in range(3):
            agent.wait_for("WATCHDOG=1", 5)
