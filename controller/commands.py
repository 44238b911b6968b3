"""What `spiderpool-controller` does besides being the controller: sub-commands that do one thing and end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

from controller.adoption.hand_back import HandBackError, hand_back
from controller.clean import clean
from controller.settings import SOURCES, Settings
from daemon.logs import configure
from daemon.sources import SettingsError
from store.errors import StoreError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Store

_log = logging.getLogger(__name__)


def run_clean(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`clean --validate NAME --mutating NAME`; the exit status."""
    parser = argparse.ArgumentParser("spiderpool-controller clean", allow_abbrev=False)
    parser.add_argument("--validate", required=True, metavar="NAME", help="ValidatingWebhookConfiguration to delete")
    parser.add_argument("--mutating", required=True, metavar="NAME", help="MutatingWebhookConfiguration to delete")
    arguments, rest = parser.parse_known_args(argv)

    async def work(store: Store, settings: Settings) -> int:
        problems = await clean(
            store,
            validating=arguments.validate,
            mutating=arguments.mutating,
            lease=settings.leader.lease,
            namespace=settings.pod.namespace,
            job=environ.get("SPIDERPOOL_INIT_NAME", "").strip(),
        )
        for problem in problems:
            _log.error("not removed: %s", problem)
        return 1 if problems else 0

    return _with_store("clean", rest, environ, work)


def run_hand_back(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`hand-back`: make all addresses upstream's again; the exit status."""
    parser = argparse.ArgumentParser("spiderpool-controller hand-back", allow_abbrev=False)
    _, rest = parser.parse_known_args(argv)

    async def work(store: Store, settings: Settings) -> int:
        try:
            notes = await hand_back(store, [settings.webhook.configuration])
        except HandBackError as error:
            _log.error("%s", error)
            return 1
        for note in notes:
            _log.warning("%s", note)
        return 0

    return _with_store("hand-back", rest, environ, work)


COMMANDS: Mapping[str, Callable[[Sequence[str], Mapping[str, str]], int]] = {
    "clean": run_clean,
    "hand-back": run_hand_back,
}
"""First word of the command line to what does it; given the rest of it and the environment."""


def command_of(argv: Sequence[str]) -> Callable[[], int] | None:
    """What the command line asks for, if it is not the controller itself."""
    command = COMMANDS.get(argv[0]) if argv else None
    return (lambda: command(argv[1:], os.environ)) if command is not None else None


def _with_store(
    name: str, argv: Sequence[str], environ: Mapping[str, str], work: Callable[[Store, Settings], Awaitable[int]]
) -> int:
    """Run `work` on the cluster's store; flags of the settings tell which cluster."""
    try:
        settings, _ = SOURCES.load(argv, environ)
    except SettingsError as error:
        sys.stderr.write(f"spiderpool-controller {name}: {error}\n")
        return 2
    configure(settings.log.level)

    async def run() -> int:
        there = settings.kubernetes
        store = await KubeStore.open(KubeSettings(kubeconfig=there.kubeconfig, context=there.context))
        try:
            return await work(store, settings)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except StoreError as error:
        _log.critical("%s failed: %s", name, error)
        return 1
