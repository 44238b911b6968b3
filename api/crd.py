"""The CRD manifests in `api/crds`, made from the types: `python -m api.crd [--check]`.

Without an argument the files are written; with `--check` nothing is, and the exit status is 1, with a diff on
standard output, if a file is stale, missing or left over.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from typing import Any

import yaml

from api import kinds
from api.columns import COLUMNS, Column
from api.meta import Resource
from api.schema import Schema, schema_of

FOLDER = os.path.join(os.path.dirname(__file__), "crds")
CATEGORY = "spiderpool"

_HEAD = "# Generated from the types in api/ by `python -m api.crd`; do not edit.\n---\n"

_TYPE_META: Schema = {
    "apiVersion": {"type": "string", "description": "Group and version of the kind."},
    "kind": {"type": "string", "description": "Name of the kind."},
    "metadata": {"type": "object"},
}


def crd(kind: type[Resource]) -> dict[str, Any]:
    """The CustomResourceDefinition (apiextensions.k8s.io/v1) of one of our kinds."""
    called = kind.TYPE
    schema = schema_of(kind)
    body = {name: member for name, member in schema["properties"].items() if name != "metadata"}
    needed = [name for name in schema.get("required", ()) if name != "metadata"]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{called.plural}.{called.group}"},
        "spec": {
            "group": called.group,
            "scope": "Namespaced" if called.namespaced else "Cluster",
            "names": {
                "kind": called.kind,
                "listKind": f"{called.kind}List",
                "plural": called.plural,
                "singular": called.kind.lower(),
                "shortNames": [called.short],
                "categories": [CATEGORY],
            },
            "versions": [
                {
                    "name": called.version,
                    "served": True,
                    "storage": True,
                    **({"subresources": {"status": {}}} if called.status_subresource else {}),
                    "additionalPrinterColumns": [_column(column) for column in COLUMNS[called.kind]],
                    "schema": {
                        "openAPIV3Schema": {
                            "description": schema["description"],
                            "type": "object",
                            **({"required": needed} if needed else {}),
                            "properties": _TYPE_META | body,
                        }
                    },
                }
            ],
        },
    }


def _column(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "type": column.type,
        "jsonPath": column.json_path,
        "description": column.description,
        **({"priority": column.priority} if column.priority else {}),
    }


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: equal parts of two schemas are one Python object, which is of no interest to a reader."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class names it
        """Always."""
        return True


def manifests() -> dict[str, str]:
    """File name in `FOLDER` to its text."""
    return {
        f"{kind.TYPE.group}_{kind.TYPE.plural}.yaml": _HEAD
        + yaml.dump(crd(kind), Dumper=_Dumper, sort_keys=False, width=120)
        for kind in kinds.OWN
    }


def _on_disk(folder: str) -> dict[str, str]:
    texts = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            texts[name] = file.read()
    return texts


def stale(folder: str = FOLDER) -> str:
    """A unified diff from the files of `folder` to what they should be; empty if they are right."""
    found, wanted = _on_disk(folder), manifests()
    lines: list[str] = []
    for name in sorted(found.keys() | wanted.keys()):
        lines += difflib.unified_diff(
            found.get(name, "").splitlines(keepends=True),
            wanted.get(name, "").splitlines(keepends=True),
            f"{name} (checked in)",
            f"{name} (from the types)",
        )
    return "".join(lines)


def write(folder: str = FOLDER) -> None:
    """Make the files of `folder` right; files that belong to no kind go."""
    os.makedirs(folder, exist_ok=True)
    wanted = manifests()
    for name in _on_disk(folder).keys() - wanted.keys():
        os.unlink(os.path.join(folder, name))
    for name, text in wanted.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def main() -> int:
    """Entry point of `python -m api.crd`."""
    parser = argparse.ArgumentParser(prog="python -m api.crd", description="Write the CRD manifests in api/crds.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with a diff if a file is stale")
    if not parser.parse_args().check:
        write()
        return 0
    diff = stale()
    sys.stdout.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
