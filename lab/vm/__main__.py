"""`python -m lab.vm build|run`: run a command in a virtual machine with a kernel of the distribution's."""

from __future__ import annotations

import argparse
import signal
import sys

from lab.layout import LabError
from lab.table import Paper
from lab.vm.build import build
from lab.vm.run import run

MEMORY, CPUS, TIMEOUT = 1536, 1, 300.0
"""MiB, processors, seconds from the start of QEMU to its end."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.vm", description=__doc__)
    commands = parser.add_subparsers(dest="doing", required=True, metavar="COMMAND")
    commands.add_parser("build", help="unpack the kernel and make the initramfs; `run` does so too")
    running = commands.add_parser("run", help="exit status: the command's; 124 out of time, 125 the machine died")
    running.add_argument("--memory", type=int, default=MEMORY, metavar="MiB", help="default: %(default)s")
    running.add_argument("--cpus", type=int, default=CPUS, metavar="N", help="default: %(default)s")
    running.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="default: %(default)s")
    running.add_argument("--write", action="append", default=[], metavar="FOLDER", help="what is written there stays")
    running.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command")
    running.add_argument("command", nargs="+", metavar="-- COMMAND")
    return parser.parse_args()


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the command; the exit status that the help tells, or 2 if there can be no machine."""
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        image = build(Paper(sys.stderr))
        if arguments.doing == "build":
            print(f"kernel {image.release} is ready")
            return 0
        return run(
            image,
            arguments.command,
            memory=arguments.memory,
            cpus=arguments.cpus,
            timeout=arguments.timeout,
            write=arguments.write,
            environment=dict(_variable(text) for text in arguments.env),
        )
    except LabError as error:
        print(f"lab.vm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"lab.vm: stopped by {interrupt.args[0] if interrupt.args else 'Ctrl-C'}", file=sys.stderr)
        return 130


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise LabError(f"--env {text}: NAME=VALUE is wanted")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
