"""YAML text to resources: what is tolerated, and how faults are named."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from api.manifest import Entry, parse
from api.meta import encode
from api.pool import Pool
from api.service import Service
from api.yamltext import YamlError, documents
from cli.output import as_yaml

HEAD = "apiVersion: spiderpool.spidernet.io/v2beta1\nkind: SpiderIPPool\n"


def texts(manifest: str | bytes) -> list[str]:
    data = manifest.encode() if isinstance(manifest, str) else manifest
    return [f"{entry.place}: {error}" for entry in parse(data) for error in entry.errors]


def only(manifest: str) -> Entry:
    (entry,) = parse(manifest.encode())
    assert entry.errors == ()
    return entry


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ("a: [1, 2", "document 1: not YAML: did not find expected ',' or ']', line "),
        (f"{HEAD}metadata: {{name: a}}\nspec: {{subnet: 10.0.0.0/8}}\n---\n\t- x", "document 2: not YAML"),
        (b"kind: \xff", "document 1: not YAML: not UTF-8: byte 6 is 0xff"),
        ("kind: \x01", "document 1: not YAML"),
        ("--- 5", "document 1: must be a mapping with apiVersion, kind and metadata"),
        ("---\n---\n- a", "document 2: must be a mapping"),
        ("{kind: X, metadata: {name: a}}", 'document 1: X "a": apiVersion: Required value: must be a string'),
        (f"{HEAD}kind: x", "document 1: not YAML: key 'kind' is there twice, line 3, column 1"),
        ("{apiVersion: v1, kind: Pod, metadata: {name: a}}", 'document 1: Pod "a": kind: Unsupported value: "Pod"'),
        (
            "{apiVersion: v1, kind: SpiderIPPool, metadata: {name: a}}",
            'apiVersion: Unsupported value: "v1": supported values: "spiderpool.spidernet.io/v2beta1"',
        ),
        (f"{HEAD}metadata: {{name: a}}", 'document 1: SpiderIPPool "a": spec: Required value'),
        (f"{HEAD}spec: {{subnet: 10.0.0.0/8}}", "document 1: SpiderIPPool: metadata: Required value"),
        (
            f"{HEAD}metadata: {{name: a, labels: {{on: 1}}}}\nspec: {{subnet: x}}",
            "metadata.labels[on]: Invalid value: 1: must be a string (quote it)",
        ),
        (
            f"{HEAD}metadata: {{name: a, labels: [b]}}\nspec: {{subnet: x}}",
            'metadata.labels: Invalid value: ["b"]: must be a mapping',
        ),
        (
            f"{HEAD}metadata: {{name: a, creationTimestamp: yesterday}}\nspec: {{subnet: x}}",
            "metadata.creationTimestamp: Invalid value",
        ),
        ("{apiVersion: v1, kind: List, items: 5}", "document 1: items: Invalid value: 5: must be a list"),
        (
            "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List}]",
            'document 1, items[0]: kind: Invalid value: "List": a List within a List is not allowed',
        ),
        ("a: *b", "document 1: not YAML: alias 'b' names no anchor above it"),
        ("a: !!python/object:os.system x", "not YAML: tag"),
        ("? [a]\n: b", "not YAML: a key must be a plain text"),
    ],
)
def test_faults_are_named(manifest: str | bytes, text: str) -> None:
    found = texts(manifest)
    assert len(found) == 1, found
    assert text in found[0]


def test_all_faults_of_all_documents_are_named() -> None:
    manifest = f"""
{HEAD}metadata: {{name: a}}
spec:
  ipVersion: 5
  ips: 10.0.0.1
  routes: [{{dst: 10.0.0.0/8}}, 7]
  default: "yes"
  excludeIPs: [1, 10.0]
---
apiVersion: v1
kind: List
items:
- {{apiVersion: spiderpool.spidernet.io/v2beta1, kind: SpiderReservedIP, metadata: {{name: b}}, spec: {{ips: [x, 5]}}}}
- {{apiVersion: v1, kind: Service, metadata: {{name: c}}, spec: {{ports: [{{port: http}}]}}}}
"""
    found = texts(manifest)
    first, second, third = (
        'document 1: SpiderIPPool "a"',
        'document 2, items[0]: SpiderReservedIP "b"',
        'document 2, items[1]: Service "c"',
    )
    assert sorted(found) == sorted(
        [
            f"{first}: spec.subnet: Required value",
            f'{first}: spec.ipVersion: Unsupported value: 5: supported values: "4", "6"',
            f'{first}: spec.ips: Invalid value: "10.0.0.1": must be a list',
            f"{first}: spec.routes[0].gw: Required value",
            f"{first}: spec.routes[1]: Invalid value: 7: must be a mapping",
            f'{first}: spec.default: Invalid value: "yes": must be true or false',
            f"{first}: spec.excludeIPs[0]: Invalid value: 1: must be a string (quote it)",
            f"{first}: spec.excludeIPs[1]: Invalid value: 10.0: must be a string (quote it)",
            f"{second}: spec.ips[1]: Invalid value: 5: must be a string (quote it)",
            f'{third}: spec.ports[0].port: Invalid value: "http": must be an integer',
        ]
    )


def test_unknown_members_and_nulls_are_dropped_and_defaults_filled() -> None:
    entry = only(
        f"{HEAD}metadata: {{name: a, labels: null, annotations: {{a: null, b: c}}, "
        "creationTimestamp: null, managedFields: [{x: 1}]}\n"
        "spec: {subnet: 10.0.0.0/8, gateway: null, vlan: 7, default: ~}\nstatus: {}\nextra: {a: b}"
    )
    resource = entry.resource
    assert isinstance(resource, Pool)
    assert (resource.spec.default, resource.spec.disable) == (False, False)
    assert resource.metadata.labels == {}
    assert resource.metadata.annotations == {"b": "c"}
    assert b"vlan" not in encode(resource)


def test_lists_json_and_empty_documents() -> None:
    item = '{"metadata": {"name": "%s"}, "spec": {"subnet": "10.0.0.0/8"}}'
    manifest = (
        "---\n# nothing\n---\n"
        + '{"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderIPPoolList", "items": [%s]}' % (item % "a")
        + "\n---\n...\n---\napiVersion: v1\nkind: List\nmetadata: {}\nitems:\n"
        + "- {apiVersion: v1, kind: Service, metadata: {name: s}, spec: {ports: [{port: 80, targetPort: http}]}}\n"
        + "---\n{apiVersion: v1, kind: List, items: null}\n"
    )
    entries = parse(manifest.encode())
    assert [entry.errors for entry in entries] == [(), ()]
    assert [type(entry.resource) for entry in entries] == [Pool, Service]
    assert entries[0].place == 'document 2, items[0]: SpiderIPPool "a"'
    assert parse(b"") == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10:20:30", "10:20:30"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("02:00:00:00:00:01", "02:00:00:00:00:01"),
        ("fd00::1", "fd00::1"),
        ("on", True),
        ("No", False),
        ("'on'", "on"),
        ("!!str 5", "5"),
        ("0x1F", 31),
        ("010", 8),
        ("089", 89.0),
        ("-7", -7),
        ("1_000", "1_000"),
        ("1.5e3", 1500.0),
        ("~", None),
        ("'~'", "~"),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("[&x {a: 1}, {<<: [*x, {a: 2, c: 3}]}]", [{"a": 1}, {"a": 1, "c": 3}]),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_scalars_are_those_of_kubernetes(text: str, value: object) -> None:
    assert list(documents(text.encode())) == [value]


def test_a_hostile_text_ends_with_an_error() -> None:
    # In a process of its own: PyYAML's C loader dies of this with a segmentation fault.
    code = "import sys; from api.manifest import parse; print(parse(sys.stdin.buffer.read())[0].errors[0])"
    for text in (b"[" * 200_000, b"- " * 50_000 + b"a", b"{a: " * 50_000):
        done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, timeout=30, check=True)
        assert b"nested more than" in done.stdout


def test_aliases_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(YamlError, match="aliases stand for more than"):
        list(documents("\n".join(lines).encode()))
    with pytest.raises(YamlError, match="names no anchor"):
        list(documents(b"&a [*a]"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
@example("1e5")  # a text, which PyYAML by itself would leave bare
@example({"0E0": "0o7"})
@example("\x85")  # a line break to YAML 1.1
def test_what_spiderpoolctl_writes_is_read_back(value: object) -> None:
    assert list(documents(as_yaml(value).encode())) == [value]


@given(st.binary(max_size=80))
def test_no_bytes_raise(data: bytes) -> None:
    parse(data)


@given(json_values)
def test_no_document_raises(value: object) -> None:
    document = {
        "apiVersion": "spiderpool.spidernet.io/v2beta1",
        "kind": "SpiderIPPool",
        "metadata": value,
        "spec": value,
    }
    parse(yaml.safe_dump(document).encode())
