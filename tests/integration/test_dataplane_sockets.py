"""What applications see of a service: real sockets, one network namespace, all three backends on its loopback."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.dataplane.tables import ServiceTables
from tests.integration.dataplane_node import FOUR, PORT, SIX, VIP4, VIP6, Node, backends, frontend

TCP = """
s = socket.socket(socket.AF_INET6 if ":" in A["to"] else socket.AF_INET)
code = s.connect_ex((A["to"], A["port"]))
if code:
    print(json.dumps({"errno": code}))
else:
    s.send(b"?")
    print(json.dumps({"answer": s.recv(100).decode(), "peer": s.getpeername()[:2]}))
"""

CONNECTED_UDP = TCP.replace("s = socket.socket(", "s = socket.socket(type=socket.SOCK_DGRAM, family=")
CONNECTED_UDP = CONNECTED_UDP.replace(
    's.recv(100).decode(), "peer"', '(d := s.recvfrom(100))[0].decode(), "from": d[1][:2], "peer"'
)

UDP = """
s = socket.socket(socket.AF_INET6 if ":" in A["to"] else socket.AF_INET, socket.SOCK_DGRAM)
answers = []
for _ in range(A.get("times", 1)):
    try:
        s.sendto(b"?", (A["to"], A["port"]))
    except OSError as error:
        answers.append(error.errno)
        break
    data, peer = s.recvfrom(100)
    answers.append([data.decode(), *peer[:2]])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(str(tmp_path_factory.mktemp("node"))) as node:
        node.serve(*FOUR, *SIX)
        assert node.load()["attached"] is True
        yield node


@pytest.fixture
def tables(node: Node) -> Iterator[ServiceTables]:
    with node.tables() as tables:
        yield tables


@pytest.mark.parametrize(
    ("vip", "to", "behind"),
    [(VIP4, VIP4, FOUR), (VIP6, VIP6, SIX), (VIP4, f"::ffff:{VIP4}", FOUR)],
    ids=["ipv4", "ipv6", "mapped"],
)
@pytest.mark.parametrize(("protocol", "code"), [("TCP", TCP), ("UDP", CONNECTED_UDP)])
def test_connect_reaches_a_backend_and_the_peer_is_the_service(
    node: Node, tables: ServiceTables, vip: str, to: str, behind: tuple[str, ...], protocol: str, code: str
) -> None:
    tables.program({frontend(vip, 80, protocol): backends(*behind)})
    seen = node.ask(code, to=to, port=80)
    assert seen["answer"] in behind
    assert seen["peer"] == [to, 80]
    if protocol == "UDP":
        assert seen["from"] == [to, 80]


@pytest.mark.parametrize("to", [VIP4, VIP6, f"::ffff:{VIP4}"])
def test_fast_open_connects_by_sending(node: Node, tables: ServiceTables, to: str) -> None:
    code = """
seen = []
for _ in range(2):  # the second has the cookie
    s = socket.socket(socket.AF_INET6 if ":" in A["to"] else socket.AF_INET)
    s.settimeout(None)
    s.sendto(b"?", socket.MSG_FASTOPEN, (A["to"], 80))
    seen.append([s.recv(100).decode(), *s.getpeername()[:2]])
print(json.dumps(seen))
"""
    behind = SIX[0] if to == VIP6 else FOUR[0]
    tables.program({frontend(VIP6 if to == VIP6 else VIP4, 80): backends(behind)})
    assert node.ask(code, to=to) == [[behind, to, 80]] * 2


def test_an_ipv4_address_given_to_an_ipv6_socket(node: Node, tables: ServiceTables) -> None:
    """Python cannot, C programs do; the kernel then runs the hooks of IPv4 one way and those of IPv6 the other."""
    code = """
libc = ctypes.CDLL(None, use_errno=True)
to = socket.AF_INET.to_bytes(2, "little") + (53).to_bytes(2, "big") + socket.inet_aton(A["to"]) + bytes(8)
seen = []
for connect in (False, True):
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    if connect:
        assert libc.connect(s.fileno(), to, 16) == 0
        seen.append(s.getpeername()[:2])
        s.send(b"?")
    else:
        assert libc.sendto(s.fileno(), b"?", 1, 0, to, 16) == 1
    data, peer = s.recvfrom(100)
    seen.append([data.decode(), *peer[:2]])
print(json.dumps(seen))
"""
    tables.program({frontend(VIP4, 53, "UDP"): backends(FOUR[0])})
    service = f"::ffff:{VIP4}"
    assert node.ask(code, to=VIP4) == [[FOUR[0], service, 53], [service, 53], [FOUR[0], service, 53]]


def test_calls_without_an_address_are_left_alone(node: Node, tables: ServiceTables) -> None:
    code = """
seen = []
s = socket.socket(type=socket.SOCK_DGRAM)
for call in (lambda: s.send(b"?"), s.getpeername):
    try:
        call()
    except OSError as error:
        seen.append(error.errno)
s.connect((A["to"], 53))
s.sendmsg([b"?"])
seen.append(s.recvmsg(100)[3])
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
accepted = listener.accept()[0]
seen.append(accepted.getpeername() == client.getsockname())
print(json.dumps(seen))
"""
    tables.program({frontend(VIP4, 53, "UDP"): backends(FOUR[0])})
    assert node.ask(code, to=VIP4) == [errno.EDESTADDRREQ, errno.ENOTCONN, [VIP4, 53], True]


@pytest.mark.parametrize(
    ("vip", "to", "behind"),
    [(VIP4, VIP4, FOUR), (VIP6, VIP6, SIX), (VIP4, f"::ffff:{VIP4}", FOUR)],
    ids=["ipv4", "ipv6", "mapped"],
)
def test_unconnected_udp_keeps_its_backend_and_shows_the_service(
    node: Node, tables: ServiceTables, vip: str, to: str, behind: tuple[str, ...]
) -> None:
    tables.program({frontend(vip, 53, "UDP"): backends(*behind)})
    answers = node.ask(UDP, to=to, port=53, times=20)
    assert {tuple(answer[1:]) for answer in answers} == {(to, 53)}
    assert len({answer[0] for answer in answers}) == 1
    assert answers[0][0] in behind


def test_connects_spread_over_all_backends(node: Node, tables: ServiceTables) -> None:
    tables.program({frontend(VIP4, 80): backends(*FOUR)})
    many = "answers = []\nfor _ in range(100):\n" + "".join(
        f"    {line}\n" for line in ("s = socket.create_connection((A['to'], 80))", "s.send(b'?')",
                                     "answers.append(s.recv(100).decode())", "s.close()")
    ) + "print(json.dumps(answers))"  # fmt: skip
    answers = node.ask(many, to=VIP4)
    # Each of three comes up fewer than 10 times in 100 once in five million runs.
    assert all(answers.count(address) >= 10 for address in FOUR)
    assert tables.chosen()[tables.programmed[frontend(VIP4, 80)].id] == 100


def test_service_without_endpoints_refuses_at_once(node: Node, tables: ServiceTables) -> None:
    tables.program({frontend(VIP4, 80): (), frontend(VIP4, 53, "UDP"): (), frontend(VIP6, 80): ()})
    before = tables.errors()["no_backend"]
    assert node.ask(TCP, to=VIP4, port=80) == {"errno": errno.ECONNREFUSED}
    assert node.ask(TCP, to=VIP6, port=80) == {"errno": errno.ECONNREFUSED}
    assert node.ask(CONNECTED_UDP, to=VIP4, port=53) == {"errno": errno.ECONNREFUSED}
    assert node.ask(UDP, to=VIP4, port=53) == [errno.ECONNREFUSED]
    assert tables.errors()["no_backend"] == before + 4


def test_addresses_that_are_no_services_are_left_alone(node: Node, tables: ServiceTables) -> None:
    tables.program({frontend(VIP4, 80): backends(FOUR[0])})
    assert node.ask(TCP, to=FOUR[1], port=PORT) == {"answer": FOUR[1], "peer": [FOUR[1], PORT]}
    assert node.ask(UDP, to=SIX[1], port=PORT) == [[SIX[1], SIX[1], PORT]]
    assert node.ask(TCP, to=VIP4, port=81) == {"errno": errno.ENETUNREACH}  # another port of the same address
    assert node.ask(UDP, to=VIP4, port=80) == [errno.ENETUNREACH]  # another protocol


def test_processes_outside_of_the_cgroup_are_left_alone(node: Node, tables: ServiceTables) -> None:
    tables.program({frontend(VIP4, 80): backends(*FOUR)})
    assert node.ask(TCP, to=VIP4, port=80, inside=False) == {"errno": errno.ENETUNREACH}
    assert node.ask(TCP, to=VIP4, port=80)["answer"] in FOUR


def test_conversation_moves_when_its_backend_goes_and_only_then(node: Node, tables: ServiceTables) -> None:
    code = """
s = socket.socket(type=socket.SOCK_DGRAM)
for _ in sys.stdin:
    s.sendto(b"?", (A["to"], 53))
    data, peer = s.recvfrom(100)
    print(json.dumps([data.decode(), *peer]), flush=True)
"""
    where = frontend(VIP4, 53, "UDP")
    tables.program({where: backends(*FOUR)})
    client = node.start(code, to=VIP4)

    def turn() -> str:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write("\n")
        client.stdin.flush()
        answer, *peer = json.loads(client.stdout.readline())
        assert peer == [VIP4, 53]
        return str(answer)

    first = turn()
    others = [address for address in FOUR if address != first]
    tables.program({where: backends(first, others[0])})
    assert {turn() for _ in range(5)} == {first}
    tables.program({where: backends(first)})
    assert {turn() for _ in range(5)} == {first}
    tables.program({where: backends(*others)})
    second = turn()
    assert second in others
    tables.program({where: backends(*FOUR)})
    assert {turn() for _ in range(5)} == {second}


def test_membership_is_the_services_own(node: Node, tables: ServiceTables) -> None:
    """A backend that stays behind one service must not hold the conversations of another that it left."""
    code = UDP.replace("for _ in range", "for n in range").replace(
        "    try:\n", "    if n == 5: print('half', flush=True); sys.stdin.readline()\n    try:\n"
    )
    one, other = frontend(VIP4, 53, "UDP"), frontend(VIP4, 54, "UDP")
    tables.program({one: backends(FOUR[0]), other: backends(FOUR[0])})
    client = node.start(code, to=VIP4, port=53, times=10)
    assert client.stdout is not None
    assert client.stdout.readline() == "half\n"
    tables.program({one: backends(FOUR[1])})
    answers = json.loads(client.communicate("\n", timeout=10)[0])
    assert [answer[0] for answer in answers] == [FOUR[0]] * 5 + [FOUR[1]] * 5


def test_socket_reused_for_another_destination_forgets_the_service(node: Node, tables: ServiceTables) -> None:
    code = """
s = socket.socket(type=socket.SOCK_DGRAM)
peers = []
for to in A["to"]:
    s.connect(tuple(to))
    peers.append(s.getpeername())
print(json.dumps(peers))
"""
    tables.program({frontend(VIP4, 53, "UDP"): backends(FOUR[0])})
    to = [[VIP4, 53], [FOUR[0], PORT], [VIP4, 53], [FOUR[1], PORT]]
    assert node.ask(code, to=to) == to


def test_one_socket_talks_to_many_services(node: Node, tables: ServiceTables) -> None:
    code = """
s = socket.socket(type=socket.SOCK_DGRAM)
seen = []
for _ in range(3):
    for port in A["ports"]:
        s.sendto(b"?", (A["to"], port))
    seen.append(sorted(s.recvfrom(100)[1] for _ in A["ports"]))
print(json.dumps(seen))
"""
    ports = [53, 54, 55]
    tables.program({
        frontend(VIP4, port, "UDP"): backends(address) for port, address in zip(ports, FOUR, strict=True)
    })  # fmt: skip
    assert node.ask(code, to=VIP4, ports=ports) == [[[VIP4, port] for port in ports]] * 3


def test_sockets_of_one_service_need_no_room(tmp_path: Path) -> None:
    """However many there are on the node: what they remember is their own."""
    code = """
sockets = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(300)]
turns = []
for _ in range(2):
    for s in sockets:
        s.sendto(b"?", (A["to"], 53))
    turns.append([s.recvfrom(100) for s in sockets])
peers = {peer for turn in turns for _, peer in turn}
print(json.dumps([sorted(peers), [a for a, _ in turns[0]] == [a for a, _ in turns[1]]]))
"""
    with Node(str(tmp_path)) as node:
        node.serve(*FOUR)
        node.load("--max-udp-flows=50")
        with node.tables() as tables:
            tables.program({frontend(VIP4, 53, "UDP"): backends(*FOUR)})
            assert node.ask(code, to=VIP4) == [[[VIP4, 53]], True]


def test_a_backend_of_two_services_answers_for_the_one_asked_last(node: Node, tables: ServiceTables) -> None:
    code = """
s = socket.socket(type=socket.SOCK_DGRAM)
seen = []
for connect in (False, True):
    if connect:
        s.connect((A["to"], 53))
    for port in (53, 54, 54, 53, 54):
        s.sendto(b"?", (A["to"], port))
        seen.append(s.recvfrom(100)[1][1])
    if connect:
        seen.append(s.getpeername()[1])
print(json.dumps(seen))
"""
    tables.program({frontend(VIP4, port, "UDP"): backends(FOUR[0]) for port in (53, 54)})
    # What is connected hears one peer only, and that has one name.
    assert node.ask(code, to=VIP4) == [53, 54, 54, 53, 54, 53, 53, 53, 53, 53, 53]


def test_shrinking_under_fire_refuses_nobody(node: Node, tables: ServiceTables) -> None:
    """Connects go on while the service changes between one and three backends as fast as it can."""
    code = """
end, count, failures = time.monotonic() + 2, 0, []
while time.monotonic() < end:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
    code = s.connect_ex((A["to"], 80))
    count += 1
    if code:
        failures.append(code)
    s.close()
print(json.dumps([count, failures]))
"""
    where = frontend(VIP4, 80)
    tables.program({where: backends(*FOUR)})
    client = node.start(code, to=VIP4)
    changes = 0
    end = time.monotonic() + 10
    while client.poll() is None and time.monotonic() < end:
        tables.program({where: backends(FOUR[changes % 3])})
        tables.program({where: backends(*FOUR)})
        changes += 1
    count, failures = json.loads(client.communicate()[0])
    assert failures == []
    assert count > 1000
    assert changes > 1000
