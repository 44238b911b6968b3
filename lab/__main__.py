"""`spiderpool-lab up|check|exec|down|demo`: Spiderpool on one machine, and the proof that it works."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from lab import checks, lifecycle, nodes, pods
from lab.layout import BACKENDS, NODES, SOURCES, VIP, Lab, LabError
from lab.state import State
from lab.table import Paper, Row, as_json

DEFAULT_NAME = "spl"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="spiderpool-lab",
        description="Two nodes, a router and pods as network namespaces on this machine; needs root and no cluster.",
    )
    parser.add_argument("--name", default=DEFAULT_NAME, help="the lab's name, for several at once; begins with spl")
    commands = parser.add_subparsers(dest="command", required=True, metavar="up|check|exec|down|demo")
    commands.add_parser("up", help="bring the lab up, with some pods running")
    check = commands.add_parser("check", help="prove that it works, row by row")
    check.add_argument("--json", action="store_true", help="print the rows as JSON")
    commands.add_parser("down", help="remove everything, also what a killed `up` left")
    commands.add_parser("demo", help="down if it is up, then up and check")
    inside = commands.add_parser("exec", help="run a command inside a pod, a node or the host outside")
    inside.add_argument("place", help="client, web-1, node1, outside, …")
    inside.add_argument("argv", nargs=argparse.REMAINDER, metavar="command")
    return parser.parse_args()


def _up(lab: Lab, paper: Paper) -> None:
    begin = time.monotonic()
    paper.heading(f"Lab {lab.name} comes up")
    lifecycle.up(lab, paper)
    paper.line(f"  {paper.mark(True)} up after {time.monotonic() - begin:.1f} s")


def _check(lab: Lab, paper: Paper, *, quiet: bool) -> int:
    begin = time.monotonic()
    rows: list[Row] = []
    for row in checks.run(lab):
        if not (rows or quiet):
            paper.heading("What it proves")
        rows.append(row)
        if not quiet:
            paper.row(row)
    if quiet:
        paper.line(as_json(rows))
    else:
        paper.verdict(rows, time.monotonic() - begin)
    return 0 if all(row.ok for row in rows) else 1


def _how_to_poke(lab: Lab, paper: Paper) -> None:
    attachments = State.load(lab).attachments
    address = attachments[BACKENDS[0]].addresses()[0]
    # Short from within the checkout, right from everywhere else.
    programs = os.path.relpath(nodes.BIN) if os.getcwd() == SOURCES else nodes.BIN
    me = f"{programs}/spiderpool-lab" + ("" if lab.name == DEFAULT_NAME else f" --name {lab.name}")
    ask = f"exec 3<>/dev/tcp/{VIP.v4}/80; echo hello >&3; head -1 <&3"
    paper.heading("The lab stays up. Look around:")
    for text in (
        f"{me} exec client bash -c '{ask}'",
        f"ip netns exec {lab.netns('client')} ip route show table all",
        f"ip netns exec {lab.netns(NODES[0].name)} tcpdump -ni eth0 host {address}",
        f"{programs}/spiderpoolctl get spiderippools --store {lab.store}",
        f"{programs}/spiderpoolctl get spideripclaims --store {lab.store}",
        f"tail {lab.log(nodes.agent(NODES[0].name))}",
    ):
        paper.line(f"  {text}")
    paper.line(f"And remove it without a trace:\n  {me} down")


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the command; 0 if it succeeded, 1 if a check failed, 2 if it could not be done."""
    arguments = _arguments()
    paper = Paper()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        lab = Lab(arguments.name)
        match arguments.command:
            case "up":
                _up(lab, paper)
                _how_to_poke(lab, paper)
            case "check":
                return _check(lab, paper, quiet=arguments.json)
            case "exec":
                state = State.load(lab)
                if not state.complete:
                    raise LabError(f"lab {lab.name!r} is not up")
                argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
                pods.become(state, arguments.place, argv or ["bash"])
            case "down":
                paper.line(f"lab {lab.name} is {'down' if lifecycle.down(lab) else 'not up: nothing to do'}")
            case "demo":
                lifecycle.down(lab)
                _up(lab, paper)
                status = _check(lab, paper, quiet=False)
                _how_to_poke(lab, paper)
                return status
    except LabError as error:
        print(f"spiderpool-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"spiderpool-lab: stopped by {interrupt.args[0] if interrupt.args else 'Ctrl-C'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
