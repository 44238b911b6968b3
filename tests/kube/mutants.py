"""Mistakes that the code could have, and for each the shortest history that finds it.

A history check that has never failed proves nothing. So each mistake is made in a copy of the sources, which the
processes of `history_child` get in place of the real ones; the working tree is not touched. A mistake is a few exact
replacements of text: where the text is not there any more, somebody has to say what the mistake looks like by now.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from lab.layout import SOURCES

_FOLDERS = ("api", "controller", "daemon", "plugins", "store", "tests")
"""What the processes import from."""


class StaleError(Exception):
    """A mistake does not fit the sources; the text says which, and where."""


@dataclass(frozen=True)
class Edit:
    """One replacement of text that occurs once in a file."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    edits: tuple[Edit, ...]
    finds: str
    """Name of the history in `history_aimed` that finds it."""


_CLAIMS = "plugins/ipam/claims.py"
_TAKE_OVER = "plugins/ipam/takeover.py"
_RETAINED = "plugins/ipam/retained.py"
_HELD = "plugins/ipam/held.py"
_RECLAIM = "controller/reclaim/reclaim.py"
_RELEASES = "controller/reclaim/releases.py"
_STORE = "store/kube.py"

_DELETE = "self._store.delete(Claim, meta.name, uid=meta.uid, resource_version=meta.resource_version)"
_REPLACE = Edit(
    _TAKE_OVER, "from api.claim import Claim\n", "from msgspec.structs import replace\nfrom api.claim import Claim\n"
)
_WRITE = "return await self._writer.update(held)"

MUTANTS = (
    Mutant(
        "a DEL deletes whatever claim is on the address",
        (Edit(_CLAIMS, f"await {_DELETE}", "await self._store.delete(Claim, meta.name)"),),
        "overtaken-del",
    ),
    Mutant(
        "a DEL releases what the pod has for another sandbox",
        (
            Edit(
                _HELD,
                "claims = self._containers.get(container_id, {}).values()",
                "claims = [claim for those in self._containers.values() for claim in those.values()]",
            ),
            Edit(_HELD, "        and spec.container_id == container_id\n", ""),
        ),
        "del-of-an-earlier-sandbox",
    ),
    Mutant(
        "the reclaim deletes whatever claim is on the address",
        (Edit(_RELEASES, f"await {_DELETE}", "await self._store.delete(Claim, meta.name)"),),
        "overtaken-reclaim",
    ),
    Mutant(
        "the reclaim deletes a claim in whatever version it is",
        (Edit(_RELEASES, f"await {_DELETE}", "await self._store.delete(Claim, meta.name, uid=meta.uid)"),),
        "reclaim-overtaken-by-take-over",
    ),
    Mutant(
        "the reclaim condemns by its caches",
        (
            Edit(_RECLAIM, "        await fresh.read_pods(claims)\n", ""),
            Edit(
                _RECLAIM,
                "witness = await fresh.witness(claim, self._missing, static=static)",
                "witness = self._remembered.witness(claim, self._missing, datetime.now(UTC))",
            ),
        ),
        "unseen-pod",
    ),
    Mutant(
        "the reclaim frees what a StatefulSet's next pod is to have",
        (
            Edit(
                "api/reclaim.py",
                'return Verdict(Action.KEEP, "its workload will have the pod again")\n        # Addresses',
                "pass\n        # Addresses",
            ),
        ),
        "kept-while-others-want-it",
    ),
    Mutant(
        "a take-over writes over whatever version the claim is in",
        (
            _REPLACE,
            Edit(
                _TAKE_OVER,
                _WRITE,
                _WRITE.replace("held", 'replace(held, metadata=replace(held.metadata, resource_version=""))'),
            ),
        ),
        "overtaken-take-over",
    ),
    Mutant(
        "a take-over writes over whatever claim is on the address",
        (
            _REPLACE,
            Edit(
                _TAKE_OVER,
                _WRITE,
                _WRITE.replace("held", 'replace(held, metadata=replace(held.metadata, uid="", resource_version=""))'),
            ),
        ),
        "take-over-of-what-others-got",
    ),
    Mutant(
        "a take-over does not ask what became of the holder, and of the pod itself",
        (Edit(_TAKE_OVER, "        await self._retained.ensure_free(found, facts, migrates=attempt.quiet)\n", ""),),
        "late-take-over",
    ),
    Mutant(
        "what was kept for one pod of a StatefulSet is given to another",
        (
            Edit(
                _RETAINED, "self._store.list(Claim, Query(labels={LABEL_WORKLOAD: label}))", "self._store.list(Claim)"
            ),
            Edit(
                _RETAINED,
                "claim.metadata.labels.get(LABEL_WORKLOAD) == label",
                "LABEL_WORKLOAD in claim.metadata.labels",
            ),
        ),
        "other-name",
    ),
    Mutant(
        "a claim that is there already is written over",
        (
            Edit(
                _CLAIMS,
                """                found = await self._read_back(claim) if lost else None
                if found is None or found.spec != claim.spec:
                    raise
                return self.learn(found)
""",
                """                found = (await self._store.get(Claim, claim.metadata.name)).metadata
                meta = replace(claim.metadata, uid=found.uid, resource_version=found.resource_version)
                return self.learn(await self._store.update(replace(claim, metadata=meta)))
""",
            ),
        ),
        "one-address-for-two",
    ),
    Mutant(
        "a write whose answer was lost counts as failed",
        (
            Edit(
                _STORE,
                """                doubt = error
                log.info("%s: looking""",
                """                raise UnavailableError(f"{what}: {error}") from error
                log.info("%s: looking""",
            ),
        ),
        "creation-that-lands-late",
    ),
    Mutant(
        "a creation whose answer was lost counts as done",
        (
            Edit(
                _STORE,
                """                return None
            if marker in""",
                """                done = replace(metadata, uid=marker, resource_version="1")
                return _Done(replace(resource, metadata=done))
            if marker in""",
            ),
        ),
        "creation-that-is-lost",
    ),
    Mutant(
        "the own claim, found after lost answers, counts as somebody else's",
        (Edit(_CLAIMS, "found = await self._read_back(claim) if lost else None", "found = None"),),
        "creation-in-doubt-for-long",
    ),
    Mutant(
        "a creation that was given up is looked for once",
        (Edit("plugins/ipam/allocation.py", "if self._writer.in_doubt and (made", "if False and (made"),),
        "creation-that-lands-after-its-add",
    ),
)


def check(mutant: Mutant) -> None:
    """Raises StaleError if an edit does not fit the sources as they are."""
    for edit in mutant.edits:
        with open(f"{SOURCES}/{edit.path}", encoding="utf-8") as file:
            number = file.read().count(edit.old)
        if number != 1:
            raise StaleError(f"{mutant.name!r}: {edit.path} has {number} times, and not once: {edit.old}")


def copy(folder: str, mutant: Mutant | None) -> str:
    """Copy the sources to a new folder, and make the mistake there; the folder. Raises StaleError."""
    for name in _FOLDERS:
        shutil.copytree(f"{SOURCES}/{name}", f"{folder}/{name}")  # with what was compiled: that is known by its times
    for edit in mutant.edits if mutant is not None else ():
        path = os.path.join(folder, edit.path)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if text.count(edit.old) != 1:
            raise StaleError(f"{mutant and mutant.name}: {edit.path} has not once: {edit.old}")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text.replace(edit.old, edit.new))
    return folder
