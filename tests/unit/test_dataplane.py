"""The dataplane's decisions: what services ask for, which slots, which writes in which order, which bytes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.dataplane import headers, pack
from agent.dataplane.desired import Backend, Desired, Frontend, Owner, pack_address, translate
from agent.dataplane.errors import HeadersMissingError
from agent.dataplane.load import SOURCES, read_source
from agent.dataplane.pack import Contents, Programmed
from agent.dataplane.plan import ServiceIds, difference, place, read_services
from agent.dataplane.settings import DataplaneSettings
from api.meta import decode
from api.service import EndpointSlice, Service


def address(text: str) -> bytes:
    packed = pack_address(text)
    assert packed is not None
    return packed


def tcp(text: str, port: int) -> Frontend:
    return Frontend(address(text), port, 6)


def udp(text: str, port: int) -> Frontend:
    return Frontend(address(text), port, 17)


def at(*texts: str, port: int) -> tuple[Backend, ...]:
    return tuple(sorted(Backend(address(text), port) for text in texts))


def service(spec: dict[str, Any], name: str = "web", created: str = "2026-01-01T00:00:00Z") -> Service:
    metadata = {"name": name, "namespace": "default", "creationTimestamp": created}
    return decode(Service, json.dumps({"metadata": metadata, "spec": spec}).encode())


def part(*endpoints: dict[str, Any], ports: list[dict[str, Any]] | None = None, family: str = "IPv4") -> EndpointSlice:
    text = {
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": "http", "port": 8080}] if ports is None else ports,
    }
    return decode(EndpointSlice, json.dumps(text).encode())


HTTP = {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}


class TestTranslate:
    def test_both_families_have_their_own_slices(self) -> None:
        spec = {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"], "ports": HTTP["ports"]}
        slices = [part({"addresses": ["10.0.0.1"]}), part({"addresses": ["fd01::1"]}, family="IPv6")]
        assert translate(service(spec), slices) == {
            tcp("10.96.0.1", 80): at("10.0.0.1", port=8080),
            tcp("fd00::1", 80): at("fd01::1", port=8080),
        }

    def test_mapped_addresses_are_ipv4(self) -> None:
        """Else the maps would tell of another frontend than was written, and drift would be seen for ever."""
        spec = {"clusterIP": "::ffff:10.96.0.1", "ports": HTTP["ports"]}
        wanted = {tcp("10.96.0.1", 80): at("10.0.0.1", port=8080)}
        assert translate(service(spec), [part({"addresses": ["::ffff:10.0.0.1"]})]) == wanted
        for where in wanted:
            assert pack.unpack_frontend(pack.pack_frontend(where)) == where

    @pytest.mark.parametrize(
        "spec",
        [
            {"clusterIP": "None", "ports": HTTP["ports"]},
            {"clusterIPs": ["None"], "ports": HTTP["ports"]},
            {"type": "ExternalName", "clusterIP": "10.96.0.1", "ports": HTTP["ports"]},
            {"clusterIP": "", "ports": HTTP["ports"]},
            {"ports": HTTP["ports"]},
            {"clusterIP": "10.96.0.1"},
            {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "protocol": "SCTP"}]},
        ],
    )
    def test_what_has_no_frontend(self, spec: dict[str, Any]) -> None:
        assert translate(service(spec), [part({"addresses": ["10.0.0.1"]})]) == {}

    def test_a_service_of_another_proxy_is_left_to_it(self) -> None:
        metadata = {"name": "web", "namespace": "default", "labels": {"service.kubernetes.io/service-proxy-name": "x"}}
        foreign = decode(Service, json.dumps({"metadata": metadata, "spec": HTTP}).encode())
        assert translate(foreign, [part({"addresses": ["10.0.0.1"]})]) == {}

    @pytest.mark.parametrize(
        ("conditions", "counts"),
        [
            (None, True),
            ({}, True),
            ({"ready": None}, True),
            ({"ready": True}, True),
            ({"ready": False}, False),
            ({"ready": False, "serving": True, "terminating": True}, False),
        ],
    )
    def test_readiness(self, conditions: dict[str, Any] | None, counts: bool) -> None:
        slices = [part({"addresses": ["10.0.0.1"], "conditions": conditions})]
        assert translate(service(HTTP), slices) == {tcp("10.96.0.1", 80): at("10.0.0.1", port=8080) if counts else ()}

    def test_ports_match_by_name_and_protocol_and_numbers_differ_by_slice(self) -> None:
        spec = {
            "clusterIP": "10.96.0.1",
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                {"name": "gone", "port": 99},
            ],
        }
        ports = [{"name": "dns", "port": 5353, "protocol": "UDP"}, {"name": "dns-tcp", "port": 5354}]
        other: list[dict[str, Any]] = [
            {"name": "dns", "port": 6353, "protocol": "UDP"},
            {"name": "dns", "port": 1},
            {"name": "gone"},
        ]
        slices = [part({"addresses": ["10.0.0.1"]}, ports=ports), part({"addresses": ["10.0.0.2"]}, ports=other)]
        assert translate(service(spec), slices) == {
            udp("10.96.0.1", 53): (*at("10.0.0.1", port=5353), *at("10.0.0.2", port=6353)),
            tcp("10.96.0.1", 53): at("10.0.0.1", port=5354),
            tcp("10.96.0.1", 99): (),
        }

    def test_an_endpoint_is_its_first_address_and_counts_once(self) -> None:
        slices = [part({"addresses": ["10.0.0.1", "10.0.0.2"]}), part({"addresses": ["10.0.0.1"]})]
        assert translate(service(HTTP), slices)[tcp("10.96.0.1", 80)] == at("10.0.0.1", port=8080)

    def test_what_is_no_address_of_the_family_is_left_out(self) -> None:
        slices = [
            part({"addresses": ["web.example"]}, family="FQDN"),
            part({"addresses": ["fd01::1"]}, {"addresses": ["no\0t"]}, {"addresses": []}, {"addresses": ["10.0.0.9"]}),
        ]
        assert translate(service(HTTP), slices)[tcp("10.96.0.1", 80)] == at("10.0.0.9", port=8080)

    def test_null_lists_are_empty_lists(self) -> None:
        text = b'{"metadata":{"name":"p"},"addressType":"IPv4","endpoints":null,"ports":null}'
        assert translate(service(HTTP), [decode(EndpointSlice, text)]) == {tcp("10.96.0.1", 80): ()}


class TestDesired:
    OLD, NEW = Owner("default", "z-old"), Owner("default", "a-new")

    def test_older_service_wins_whatever_comes_first(self) -> None:
        where = tcp("10.96.0.1", 80)
        old = service(HTTP, "z-old", "2026-01-01T00:00:00Z"), [part({"addresses": ["10.0.0.1"]})]
        new = service(HTTP, "a-new", "2026-01-01T00:00:01Z"), [part({"addresses": ["10.0.0.2"]})]
        for order in ((self.OLD, self.NEW), (self.NEW, self.OLD)):
            desired = Desired()
            for owner in order:
                desired.put(owner, *(old if owner == self.OLD else new))
            assert desired.frontends == {where: at("10.0.0.1", port=8080)}
            assert desired.conflicts() == {where: (self.OLD, self.NEW)}
            assert desired.put(self.OLD, None, []) == {where}
            assert desired.frontends == {where: at("10.0.0.2", port=8080)}
            assert desired.owner(where) == self.NEW
            assert desired.put(self.NEW, None, []) == {where}
            assert (desired.frontends, desired.conflicts(), desired.owner(where)) == ({}, {}, None)

    def test_only_what_changed_is_named(self) -> None:
        spec = {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}, {"name": "x", "port": 81}]}
        desired = Desired()
        endpoint = {"addresses": ["10.0.0.1"]}
        assert desired.put(self.OLD, service(spec), []) == {tcp("10.96.0.1", 80), tcp("10.96.0.1", 81)}
        assert desired.put(self.OLD, service(spec), []) == set()
        assert desired.put(self.OLD, service(spec), [part(endpoint)]) == {tcp("10.96.0.1", 80)}
        assert desired.put(self.NEW, None, []) == set()

    def test_a_twin_that_changes_does_not_disturb(self) -> None:
        desired = Desired()
        desired.put(self.OLD, service(HTTP, created="2026-01-01T00:00:00Z"), [part({"addresses": ["10.0.0.1"]})])
        twin = service(HTTP, created="2026-01-02T00:00:00Z")
        assert desired.put(self.NEW, twin, []) == set()
        assert desired.put(self.NEW, twin, [part({"addresses": ["10.0.0.2"]})]) == set()


POOL = [Backend(bytes([10, 0, 0, n]), 80) for n in range(12)]
some = st.lists(st.sampled_from(POOL), unique=True, max_size=12).map(lambda found: tuple(sorted(found)))


class TestPlan:
    @given(old=st.lists(st.sampled_from([*POOL, None]), max_size=14), new=some)
    def test_slots_hold_the_backends_and_move_as_few_as_possible(
        self, old: list[Backend | None], new: tuple[Backend, ...]
    ) -> None:
        slots = place(old, new)
        assert sorted(slots) == list(new)
        stays = [index for index, backend in enumerate(old[: len(new)]) if backend in new]
        distinct = {old[index]: index for index in reversed(stays)}
        assert all(slots[index] == backend for backend, index in distinct.items())

    @given(before=st.lists(some, max_size=4), after=st.lists(some, max_size=4))
    def test_lookups_between_any_two_writes_are_right(
        self, before: list[tuple[Backend, ...]], after: list[tuple[Backend, ...]]
    ) -> None:
        """Between any two writes a service's slots hold backends of its own, and new members come before slots."""
        have, want = Contents(), Contents()
        allowed: dict[int, set[bytes]] = {}
        for index in range(4):
            old = before[index] if index < len(before) else None
            new = after[index] if index < len(after) else None
            frontend = Frontend(bytes([10, 96, 0, index]), 80, 6)
            if old is not None:
                have.add(frontend, Programmed(index + 1, place((), old)))
            if new is not None:
                want.add(frontend, Programmed(index + 1, place(old or (), new)))
            allowed[index + 1] = {pack.pack_backend(backend) for backend in (*(old or ()), *(new or ()))}
        maps = {"services": dict(have.services), "slots": dict(have.slots), "members": dict(have.members)}
        plan = difference(have, want)
        steps: list[tuple[str, bytes, bytes | None]] = []
        for field in ("put_members", "put_slots", "put_services"):
            steps += [(field[4:], key, value) for key, value in getattr(plan, field)]
        for field in ("drop_services", "drop_slots", "drop_members"):
            steps += [(field[5:], key, None) for key in getattr(plan, field)]
        for name, key, value in steps:
            if value is None:
                del maps[name][key]
            else:
                maps[name][key] = value
            for service_value in maps["services"].values():
                number, count = pack.SERVICE.unpack(service_value)
                for index in range(count):
                    backend = maps["slots"][pack.SLOT.pack(number, index)]
                    assert backend in allowed[number]
                    assert pack.MEMBER.pack(number, backend) in maps["members"]
        assert (maps["services"], maps["slots"], maps["members"]) == (want.services, want.slots, want.members)

    def test_numbers_are_not_used_again(self) -> None:
        ids = ServiceIds()
        ids.skip({3, 7})
        assert [ids.next(()) for _ in range(3)] == [8, 9, 10]
        ids.skip({2})
        assert ids.next(()) == 11
        ids.skip({2**32 - 1})
        assert ids.next({1, 2}) == 3

    def test_reading_back_names_what_is_missing(self) -> None:
        contents = Contents()
        frontend = tcp("10.96.0.1", 80)
        contents.add(frontend, Programmed(5, tuple(POOL[:3])))
        del contents.slots[pack.SLOT.pack(5, 1)]
        assert read_services(contents) == {frontend: (5, [POOL[0], None, POOL[2]])}

    def test_a_number_used_twice_is_given_to_one(self) -> None:
        contents = Contents()
        contents.add(tcp("10.96.0.1", 80), Programmed(5, ()))
        contents.add(tcp("10.96.0.2", 80), Programmed(5, ()))
        assert len(read_services(contents)) == 1


class TestPack:
    @given(
        packed=st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16),
        port=st.integers(0, 65535),
        protocol=st.sampled_from([6, 17]),
    )
    def test_round_trip(self, packed: bytes, port: int, protocol: int) -> None:
        if packed.startswith(bytes(10) + b"\xff\xff"):
            return  # a mapped address is read back as the IPv4 address it is
        frontend, backend = Frontend(packed, port, protocol), Backend(packed, port)
        assert pack.unpack_frontend(pack.pack_frontend(frontend)) == frontend
        assert pack.unpack_backend(pack.pack_backend(backend)) == backend

    def test_layouts_are_those_of_the_compiler(self, tmp_path: Path) -> None:
        """The C structures, compiled, have the sizes and offsets that the formats of pack.py have."""
        text = (Path(SOURCES) / "maps.h").read_text()
        structs = "\n".join(re.findall(r"^struct \w+ \{.*?^\};", text, re.MULTILINE | re.DOTALL))
        asked = [("address", "ip"), ("address", "port"), ("address", "tag"), ("service", "id"), ("service", "count"),
                 ("slot", "service"), ("slot", "index"), ("member", "service"), ("member", "backend"),
                 ("flow", "cookie"), ("flow", "end"), ("peer", "frontend"), ("peer", "backend"),
                 ("peer", "holds"), ("peer", "flows")]  # fmt: skip
        prints = [f'printf("%zu ", __builtin_offsetof(struct {name}, {field}));' for name, field in asked]
        prints += [f'printf("%zu ", sizeof(struct {name}));' for name in dict.fromkeys(name for name, _ in asked)]
        program = f"#include <linux/types.h>\n#include <stdio.h>\n{structs}\nint main(void) {{ {' '.join(prints)} }}\n"
        (tmp_path / "layout.c").write_text(program)
        subprocess.run(["gcc", "-o", tmp_path / "layout", tmp_path / "layout.c"], check=True)
        seen = list(map(int, subprocess.check_output([tmp_path / "layout"]).split()))
        offsets = [0, 16, 18, 0, 4, 0, 4, 0, 4, 0, 8, 0, 20, 40, 42]
        formats = (pack.ADDRESS, pack.SERVICE, pack.SLOT, pack.MEMBER, pack.FLOW, pack.PEER)
        assert seen == offsets + [form.size for form in formats]
        assert pack.pack_frontend(tcp("1.2.3.4", 258)) == bytes(10) + bytes.fromhex("ffff 01020304 0102 0600")

    def test_errors_are_in_the_order_of_the_header(self) -> None:
        text = (Path(SOURCES) / "consts.h").read_text()
        names = re.findall(r"^\tERROR_(\w+),", text, re.MULTILINE)
        assert tuple(name.lower() for name in names) == pack.ERRORS

    def test_another_size_is_another_layout(self) -> None:
        digests = {pack.layout_digest(DataplaneSettings(max_services=size)) for size in (1, 2, 2)}
        assert len(digests) == 2


class TestSources:
    def test_own_headers_are_put_in_once(self) -> None:
        text = read_source("service.bpf.c")
        assert '#include "' not in text
        assert text.count("\nstruct service {") == 1
        assert "#include <uapi/linux/bpf.h>" in text


class TestHeaders:
    @staticmethod
    def installed(root: Path, asm: str) -> str:
        for name in (f"{asm}/types.h", "linux/bpf.h", "asm-generic/types.h"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("")
        return str(root)

    @pytest.mark.parametrize(
        ("machine", "asm", "arch"),
        [
            ("aarch64", "aarch64-linux-gnu/asm", "arm64"),
            ("x86_64", "x86_64-linux-gnu/asm", "x86"),
            ("aarch64", "asm", "arm64"),
        ],
    )
    def test_tree_for_each_architecture_and_distribution(
        self, tmp_path: Path, machine: str, asm: str, arch: str
    ) -> None:
        include = self.installed(tmp_path / "include", asm)
        tree = Path(headers.build(str(tmp_path / "cache"), include, machine))
        assert (tree / "include/uapi/asm/types.h").samefile(Path(include) / asm / "types.h")
        assert (tree / "include/uapi/linux/bpf.h").exists()
        assert (tree / f"arch/{arch}/include/uapi/linux/bpf.h").read_text() == "#include <bcc/bpf.h>\n"
        assert headers.build(str(tmp_path / "cache"), include, machine) == str(tree)
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_missing_headers_name_the_package(self, tmp_path: Path) -> None:
        include = self.installed(tmp_path / "include", "x86_64-linux-gnu/asm")
        with pytest.raises(HeadersMissingError, match="linux-libc-dev"):
            headers.build(str(tmp_path / "cache"), include, "aarch64")
        with pytest.raises(HeadersMissingError, match="riscv64 is not supported"):
            headers.build(str(tmp_path / "cache"), include, "riscv64")
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "wrong", [{"max_services": 0}, {"max_backends": -1}, {"max_udp_flows": 1 << 27}, {"drift_period": 0.0},
              {"loader_deadline": float("nan")}]
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DataplaneSettings(**wrong)
