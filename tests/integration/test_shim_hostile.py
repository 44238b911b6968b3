"""The CNI executable against agents that answer badly, late or not at all."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.installation import CONFIG, ROOT, Installation, build, collect

Behaviour = Callable[[socket.socket], None]
DONE, FAILED, BUSY, STOPPING = 0, 1, 75, 76
RESULT = b'{"cniVersion":"1.0.0","ips":[],"dns":{}}'


@pytest.fixture(scope="session")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable with an overall deadline of 0.7 s instead of 115 s."""
    return build("-DOVERALL_MS=700", out=tmp_path_factory.mktemp("impatient"))


@pytest.fixture
def cni(tmp_path: Path) -> Installation:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    return Installation(tmp_path)


@contextmanager
def server(cni: Installation, behave: Behaviour, backlog: int = 64) -> Iterator[None]:
    """Serve each connection with `behave`, one after the other."""
    cni.socket.parent.mkdir(parents=True, exist_ok=True)
    cni.socket.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(cni.socket))
        listener.listen(backlog)

        def loop() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    behave(connection)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (chunk := connection.recv(size - len(data))):
        data += chunk
    return data


def read_request(connection: socket.socket) -> bytes:
    head = receive(connection, 12)
    _, env, stdin = struct.unpack("!4sII", head)
    return head + receive(connection, env + stdin)


def reply(status: int, body: bytes) -> bytes:
    return b"SPD1" + struct.pack("!II", status, len(body)) + body


def answering(data: bytes) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(data)

    return behave


def test_a_result_is_printed_as_it_came(cni: Installation) -> None:
    with server(cni, answering(reply(DONE, RESULT))):
        outcome = cni.call("ADD")
    assert (outcome.status, outcome.stdout) == (0, RESULT)


def test_an_error_of_the_agent_is_printed_for_a_deletion_too(cni: Installation) -> None:
    body = b'{"cniVersion":"1.0.0","code":7,"msg":"m","details":"d"}'
    with server(cni, answering(reply(FAILED, body))):
        for command in ("ADD", "DEL", "GC"):
            cni.call(command).error(7)
    assert cni.queued() == []


@pytest.mark.parametrize("length", range(len(reply(DONE, RESULT))))
def test_a_reply_cut_at_any_byte(cni: Installation, length: int) -> None:
    with server(cni, answering(reply(DONE, RESULT)[:length])):
        assert "agent" in cni.call("ADD").error(11)["details"]
        cni.call("DEL").empty()
    assert len(cni.queued()) == 1


@pytest.mark.parametrize("read", [0, 1, 11, 12, 13, 50, 400, 300_000])
def test_a_request_cut_at_any_byte(cni: Installation, read: int) -> None:
    """The server reads so much of the request and closes."""
    big = {**CONFIG, "x": "y" * 900_000}

    def behave(connection: socket.socket) -> None:
        receive(connection, read)

    with server(cni, behave):
        cni.call("ADD", big).error(11)
        cni.call("STATUS", big).error(50)
        cni.call("DEL", big).empty()
    (path,) = cni.queued()
    assert len(path.read_bytes()) > 900_000


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 12,
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"spd1" + bytes(8),
        reply(2, RESULT),
        reply(0xFFFFFFFF, RESULT),
        b"SPD1" + struct.pack("!II", 0, 0xFFFFFFFF),
        b"SPD1" + struct.pack("!II", 0, (1 << 20) + 1) + b" " * ((1 << 20) + 1),
    ],
)
def test_garbage(cni: Installation, garbage: bytes) -> None:
    with server(cni, answering(garbage)):
        cni.call("CHECK").error(11)
        cni.call("STATUS").error(50)
        cni.call("DEL").empty()
        cni.call("GC").empty()
    assert len(cni.queued()) == 2


def test_the_largest_reply(cni: Installation) -> None:
    body = b'{"x":"' + b"y" * ((1 << 20) - 8) + b'"}'
    assert len(body) == 1 << 20
    with server(cni, answering(reply(DONE, body))):
        assert cni.call("ADD").stdout == body


def test_a_reply_in_single_bytes(cni: Installation) -> None:
    def behave(connection: socket.socket) -> None:
        read_request(connection)
        for byte in reply(DONE, RESULT):
            connection.sendall(bytes([byte]))

    with server(cni, behave):
        assert cni.call("ADD").stdout == RESULT


@pytest.mark.parametrize("big", [False, True])
def test_busy_without_reading(cni: Installation, big: bool) -> None:
    config = {**CONFIG, "x": "y" * 900_000} if big else CONFIG
    with server(cni, lambda connection: connection.sendall(reply(BUSY, b'too "busy"'))):
        started = time.monotonic()
        assert 'too "busy"' in cni.call("ADD", config).error(11)["details"]
        assert time.monotonic() - started < 2
        cni.call("STATUS", config).error(50)
        cni.call("DEL", config).empty()
    assert len(cni.queued()) == 1


def test_an_add_goes_to_the_successor_of_a_stopping_agent(cni: Installation) -> None:
    answers = [reply(STOPPING, b"it is stopping")] * 3 + [reply(DONE, RESULT)]

    def behave(connection: socket.socket) -> None:
        answering(answers.pop(0))(connection)

    with server(cni, behave):
        assert cni.call("ADD").stdout == RESULT
    with server(cni, answering(reply(STOPPING, b"it is stopping"))):
        cni.call("CHECK").error(11)
        cni.call("DEL").empty()
    assert len(cni.queued()) == 1


def test_an_agent_that_hangs(tmp_path: Path, impatient: Path) -> None:
    cni = Installation(tmp_path, impatient)
    release = threading.Event()

    def behave(connection: socket.socket) -> None:
        release.wait(20)

    with server(cni, behave):
        started = time.monotonic()
        add, delete = cni.start("ADD"), cni.start("DEL", CONFIG)
        assert "timed out" in collect(add).error(11)["details"]
        collect(delete).empty()
        assert 0.6 < time.monotonic() - started < 3
        release.set()
    assert len(cni.queued()) == 1


def test_a_full_listen_queue(tmp_path: Path, impatient: Path) -> None:
    """connect() would block for ever on it."""
    cni = Installation(tmp_path, impatient)
    cni.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(cni.socket))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(cni.socket))
            started = time.monotonic()
            cni.call("DEL").empty()
            cni.call("CHECK").error(11)
            assert time.monotonic() - started < 2


def test_input_that_never_ends(tmp_path: Path, impatient: Path) -> None:
    cni = Installation(tmp_path, impatient)
    process = subprocess.Popen(
        [cni.bin / "spiderpool"], env=cni.environment("DEL"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(CONFIG).encode())
        process.stdin.flush()
        assert process.wait(5) == 1
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["code"] == 5
    finally:
        process.kill()
        process.communicate()


def test_signals_interrupt_nothing(cni: Installation) -> None:
    """SIGCONT after SIGSTOP makes poll() return EINTR."""

    def behave(connection: socket.socket) -> None:
        read_request(connection)
        time.sleep(0.5)
        connection.sendall(reply(DONE, RESULT))

    with server(cni, behave):
        process = cni.start("ADD")
        for _ in range(5):
            time.sleep(0.05)
            process.send_signal(19)
            process.send_signal(18)
        assert collect(process).stdout == RESULT
