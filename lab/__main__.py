"""`spiderpool-lab up|check|exec|down|demo`: Spiderpool on one machine, and the proof that it works."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from functools import partial

from lab import checks, lifecycle, nodes, pods
from lab.layout import BACKENDS, DEFAULT_NAME, NODES, VIP, Lab, LabError
from lab.state import State
from lab.table import Paper, Row, as_json


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
    ctl = partial(nodes.command_line, lab, program="spiderpoolctl")
    ask = f"exec 3<>/dev/tcp/{VIP.v4}/80; echo hello >&3; head -1 <&3"
    paper.heading("The lab stays up. Look around:")
    for text in (
        nodes.command_line(lab, f"exec client bash -c '{ask}'"),
        f"ip netns exec {lab.netns(NODES[0].name)} tcpdump -ni eth0 host {address}   # and once more the line above",
        f"ip netns exec {lab.netns('client')} ip route show table all",
        ctl(f"get spiderippools --store {lab.store}"),
        ctl(f"get spideripclaims --store {lab.store}"),
        f"tail {lab.log(nodes.agent(NODES[0].name))}",
    ):
        paper.line(f"  {text}")
    paper.line(f"And remove it without a trace:\n  {nodes.command_line(lab, 'down')}")


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _execute(arguments: argparse.Namespace, lab: Lab, paper: Paper) -> int:
    match arguments.command:
        case "up":
            _up(lab, paper)
            _how_to_poke(lab, paper)
        case "check":
            return _check(lab, paper, quiet=arguments.json)
        case "exec":
            state = State.load(lab)
            if not state.complete:
                raise lifecycle.not_up(lab)
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
    return 0


def main() -> int:
    """Run the command; 0 if it succeeded, 1 if a check failed, 2 if it could not be done."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        lab = Lab(arguments.name)
        if os.geteuid():
            raise LabError("must run as root: the lab makes network namespaces, cgroups and eBPF programs")
        try:
            return _execute(arguments, lab, Paper())
        except KeyboardInterrupt as interrupt:
            print(f"spiderpool-lab: stopped by {interrupt.args[0] if interrupt.args else 'Ctrl-C'}", file=sys.stderr)
            if lifecycle.exists(lab):
                print(f"The lab stays: `{nodes.command_line(lab, 'down')}` removes it", file=sys.stderr)
            return 130
    except LabError as error:
        print(f"spiderpool-lab: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
