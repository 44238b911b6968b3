"""The CRDs: what the types say is what the files say, and what an API server would make of them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from api import crd, kinds
from api.columns import COLUMNS, select
from api.schema import schema_of


def version(name: str) -> dict[str, Any]:
    with open(os.path.join(crd.FOLDER, f"spiderpool.spidernet.io_{name}.yaml"), encoding="utf-8") as file:
        (found,) = yaml.safe_load(file)["spec"]["versions"]
    assert isinstance(found, dict)
    return found


def schema(name: str) -> Any:
    return version(name)["schema"]["openAPIV3Schema"]["properties"]


def test_the_files_are_fresh() -> None:
    assert crd.stale() == ""


def test_check_tells_stale_files(tmp_path: Any) -> None:
    folder = str(tmp_path)
    crd.write(folder)
    assert crd.stale(folder) == ""
    with open(os.path.join(folder, "left-over.yaml"), "w", encoding="utf-8") as file:
        file.write("kind: Gone\n")
    name = min(crd.manifests())
    with open(os.path.join(folder, name), "a", encoding="utf-8") as file:
        file.write("stale: true\n")
    assert "-kind: Gone" in crd.stale(folder)
    assert "-stale: true" in crd.stale(folder)
    crd.write(folder)
    assert crd.stale(folder) == ""


def test_the_command_agrees() -> None:
    done = subprocess.run([sys.executable, "-m", "api.crd", "--check"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


def test_names_and_scopes() -> None:
    found = {}
    for name, text in crd.manifests().items():
        document = yaml.safe_load(text)
        spec, names = document["spec"], document["spec"]["names"]
        assert name == f"{spec['group']}_{names['plural']}.yaml"
        assert document["metadata"]["name"] == f"{names['plural']}.{spec['group']}"
        assert names["listKind"] == f"{names['kind']}List"
        assert names["categories"] == ["spiderpool"]
        status = "subresources" in spec["versions"][0]
        found[names["plural"]] = (names["singular"], *names["shortNames"], spec["scope"], status)
    assert found == {
        "spiderippools": ("spiderippool", "sp", "Cluster", True),
        "spidersubnets": ("spidersubnet", "ss", "Cluster", True),
        "spiderreservedips": ("spiderreservedip", "sr", "Cluster", False),
        "spiderendpoints": ("spiderendpoint", "se", "Namespaced", False),
        "spideripclaims": ("spideripclaim", "sic", "Cluster", False),
        "spidercoordinators": ("spidercoordinator", "scc", "Cluster", True),
        "spidermultusconfigs": ("spidermultusconfig", "smc", "Namespaced", False),
    }


def test_the_pool_schema_has_upstreams_members() -> None:
    spec = schema("spiderippools")["spec"]
    assert spec["required"] == ["subnet"]
    assert set(spec["properties"]) == {
        *("ipVersion", "subnet", "ips", "excludeIPs", "gateway", "routes", "default", "disable"),
        *("podAffinity", "namespaceAffinity", "namespaceName", "nodeAffinity", "nodeName", "multusName"),
        *("detectIPConflict", "detectGateway"),  # ours
    }
    assert spec["properties"]["ipVersion"]["enum"] == [4, 6]
    assert spec["properties"]["default"]["default"] is False
    assert spec["properties"]["disable"]["default"] is False
    assert spec["properties"]["routes"]["items"]["required"] == ["dst", "gw"]
    status = schema("spiderippools")["status"]["properties"]
    assert status["totalIPCount"]["minimum"] == status["allocatedIPCount"]["minimum"] == 0
    assert status["allocatedIPs"]["type"] == "string"


def test_the_endpoint_schema_has_upstreams_members() -> None:
    status = schema("spiderendpoints")["status"]
    assert status["required"] == ["current", "ownerControllerName", "ownerControllerType"]
    assert status["properties"]["current"]["required"] == ["ips", "node", "uid"]
    nic = status["properties"]["current"]["properties"]["ips"]["items"]
    assert nic["required"] == ["interface"]
    vlan = nic["properties"]["vlan"]
    assert (vlan["default"], vlan["minimum"], vlan["maximum"]) == (0, 0, 4094)


def test_every_member_is_described() -> None:
    def undescribed(part: Any, path: str) -> list[str]:
        missing = [] if "description" in part or "items" in path else [path]
        for name, member in part.get("properties", {}).items():
            missing += undescribed(member, f"{path}.{name}")
        return missing + (undescribed(part["items"], f"{path}.items") if "items" in part else [])

    for kind in kinds.OWN:
        members = schema_of(kind)["properties"]
        assert [p for name, part in members.items() if name != "metadata" for p in undescribed(part, name)] == []


def test_printer_columns() -> None:
    def columns(name: str) -> list[tuple[str, int]]:
        return [(column["name"], column.get("priority", 0)) for column in version(name)["additionalPrinterColumns"]]

    assert columns("spiderippools") == [
        ("VERSION", 0),
        ("SUBNET", 0),
        ("ALLOCATED-IP-COUNT", 0),
        ("TOTAL-IP-COUNT", 0),
        ("DEFAULT", 0),
        ("DISABLE", 10),
        ("NodeName", 10),
        ("MultusName", 10),
        ("APP-NAMESPACE", 10),
        ("READY", 10),
    ]
    assert [name for name, _ in columns("spiderendpoints")] == [
        "INTERFACE",
        "IPV4POOL",
        "IPV4",
        "IPV6POOL",
        "IPV6",
        "NODE",
    ]
    assert columns("spiderreservedips") == [("VERSION", 0)]


def test_every_column_leads_to_a_member_of_the_schema() -> None:
    for kind in kinds.ALL:
        for column in COLUMNS[kind.TYPE.kind]:
            if column.json_path.startswith(".metadata"):
                continue
            assert select(_sample(schema_of(kind)), column.json_path), (kind, column)


def _sample(part: Any) -> Any:
    """A document that has every member of a schema once."""
    if "additionalProperties" in part:
        return {"ipam.spidernet.io/app-namespace": "x"}
    if part.get("type") == "object":
        return {name: "Ready" if name == "type" else _sample(member) for name, member in part["properties"].items()}
    return [_sample(part["items"])] if part.get("type") == "array" else "x"


def test_json_paths() -> None:
    document = {"a": [{"b": 1}, {"b": 2}, {}], "l": {"x.y/z": "v"}}
    assert select(document, ".a[*].b") == [1, 2]
    assert select(document, ".a[1].b") == [2]
    assert select(document, r".l['x\.y/z']") == ["v"]
    assert select(document, ".a[9].b") == select(document, ".nope.b") == select(document, ".l['x\\.y/z'].v") == []
    kinds_of = {"c": [{"t": "x", "v": 1}, {"t": "y", "v": 2}, "z"]}
    assert select(kinds_of, '.c[?(@.t=="y")].v') == [2]
    assert select(kinds_of, '.c[?(@.t=="n")].v') == select(kinds_of, '.c[0][?(@.t=="x")]') == []
    with pytest.raises(ValueError, match="JSONPath"):
        select(document, ".a[?(@.b)]")
