"""`spiderpool-controller`: the cluster controller's entry point."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from controller import daemon
from controller.commands import command_of
from controller.settings import SOURCES
from daemon.logs import configure
from daemon.sources import SettingsError, to_yaml
from store.errors import StoreError

_log = logging.getLogger(__name__)


def main() -> int:
    """Run the controller, or a sub-command. Exit status: 0 stopped, 1 died or cannot start, 2 wrong settings."""
    if command := command_of(sys.argv[1:]):
        return command()
    try:
        settings, only_print = SOURCES.load(sys.argv[1:], os.environ)
    except SettingsError as error:
        sys.stderr.write(f"spiderpool-controller: {error}\n")
        return 2
    if only_print:
        sys.stdout.write(to_yaml(settings))
        return 0
    configure(settings.log.level)
    try:
        return asyncio.run(daemon.run(settings))
    except (StoreError, OSError) as error:
        _log.critical("cannot start: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
