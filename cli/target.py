"""Which store a command works on: a machine's file, or a cluster's API.

The rules, first match counts (`docs/cli.md` has them for users):

1. `--store`, or `--kubeconfig` and `--context`: what they say; together they are refused
2. `SPIDERPOOL_STORE_KIND`, `_PATH`, `_KUBECONFIG`, `_CONTEXT`: the agent's own variables
3. in a pod (`KUBERNETES_SERVICE_HOST`), or with `KUBECONFIG`: that cluster
4. the machine's file at its default path

`~/.kube/config` alone does not count: a command meant for the machine must not land in whatever cluster that names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cli.naming import CliError
from store.open import StoreSettings, open_store
from store.port import Store

DEFAULT_STORE = "/var/lib/spidernet/store.db"
KIND_VARIABLE = "SPIDERPOOL_STORE_KIND"
STORE_VARIABLE = "SPIDERPOOL_STORE_PATH"
KUBECONFIG_VARIABLE = "SPIDERPOOL_STORE_KUBECONFIG"
CONTEXT_VARIABLE = "SPIDERPOOL_STORE_CONTEXT"
_IN_POD = "KUBERNETES_SERVICE_HOST"
_KUBECONFIG = "KUBECONFIG"


@dataclass(frozen=True, slots=True)
class Target:
    """A store that was chosen."""

    settings: StoreSettings

    @property
    def is_cluster(self) -> bool:
        """Whether there are pods, nodes and controllers beside our own objects."""
        return self.settings.kind == "kubernetes"

    def __str__(self) -> str:
        """For messages."""
        if not self.is_cluster:
            return f"store {self.settings.path}"
        named = (f"{self.settings.kubeconfig}", f"context {self.settings.context}" if self.settings.context else "")
        return " ".join(("cluster", *(f"({part})" for part in named if part)))


def choose(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Target:
    """The store that flags and variables name. Raises CliError if they contradict each other."""
    path, kubeconfig, context = arguments.store, arguments.kubeconfig, arguments.context
    if path and (kubeconfig or context):
        raise CliError("--store names a file of this machine, --kubeconfig and --context a cluster: give one of them")
    if path:
        return _machine(path)
    if kubeconfig or context:
        return _cluster(kubeconfig, context)
    kind, path = environ.get(KIND_VARIABLE, ""), environ.get(STORE_VARIABLE, "")
    kubeconfig, context = environ.get(KUBECONFIG_VARIABLE, ""), environ.get(CONTEXT_VARIABLE, "")
    if kind not in ("", "sqlite", "kubernetes"):
        raise CliError(f"{KIND_VARIABLE} is {kind!r}; it must be sqlite or kubernetes")
    if kind == "kubernetes" or (not kind and (kubeconfig or context)):
        return _cluster(kubeconfig, context)
    if not kind and not path and (environ.get(_IN_POD) or environ.get(_KUBECONFIG)):
        return _cluster("", "")
    return _machine(path or DEFAULT_STORE)


def _machine(path: str) -> Target:
    return Target(StoreSettings(kind="sqlite", path=path))


def _cluster(kubeconfig: str, context: str) -> Target:
    return Target(StoreSettings(kind="kubernetes", kubeconfig=kubeconfig, context=context))


@asynccontextmanager
async def opened(target: Target, *, create: bool = False) -> AsyncIterator[Store]:
    """The store while the context lasts; `create` makes a machine's file that is missing. Raises CliError, StoreError.

    Reading does not make one: where the user only mistyped a path, an empty answer would mislead.
    """
    if not target.is_cluster:
        (_make_folder if create else _require)(target.settings.path)
    store = await open_store(target.settings)
    try:
        yield store
    finally:
        await store.close()


def _make_folder(path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot create the folder of the store {path}: {error.strerror}") from None


def _require(path: str) -> None:
    try:
        os.stat(path)
    except PermissionError:
        raise CliError(f"no permission for the store {path}: it belongs to root") from None
    except OSError:
        raise CliError(
            f"there is no store at {path} yet: the agent or `spiderpoolctl apply -f FILE` creates it; "
            f"another one is named by --store or {STORE_VARIABLE}, a cluster by --kubeconfig or --context"
        ) from None
    if not os.access(path, os.R_OK | os.W_OK):  # reading, too, writes: SQLite's shared memory is a file beside it
        raise CliError(f"no permission for the store {path}: it belongs to root")
