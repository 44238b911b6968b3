"""`python -m lab.kube build|up|status|down|pin|pin-cni|pin-upstream`: a Kubernetes cluster on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from lab.kube import build, lifecycle
from lab.kube.cluster import Cluster
from lab.kube.components import ORDER
from lab.kube.pin import pin, pin_cni, pin_upstream
from lab.layout import Lab, LabError
from lab.table import Paper

DEFAULT_NAME = "splkube"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.kube", description=__doc__)
    parser.add_argument("--name", default=DEFAULT_NAME, help="the cluster's name, for several at once; begins with spl")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    building = commands.add_parser("build", help="build what is not built yet, from the Go modules that go.mod pins")
    building.add_argument("--node", action="store_true", help="also what a node that runs pods needs")
    building.add_argument("--upstream", action="store_true", help="also upstream's programs, for tests beside ours")
    starting = commands.add_parser("up", help="etcd, API server and controllers on loopback")
    starting.add_argument("--crds", action="store_true", help="apply our resource definitions")
    starting.add_argument("--node", action="store_true", help="also two nodes that run pods in our network")
    starting.add_argument(
        "--server-flag", action="append", default=[], metavar="--FLAG=VALUE", help="for kube-apiserver"
    )
    commands.add_parser("status", help="what runs; exit status 1 unless everything does")
    commands.add_parser("down", help="remove everything, also what a killed `up` left")
    pinning = commands.add_parser("pin", help="rewrite go.mod and go.sum for a release of Kubernetes")
    pinning.add_argument("release", help="as v1.35.4")
    pinning = commands.add_parser("pin-cni", help="rewrite cni/go.mod and cni/go.sum")
    pinning.add_argument("multus", help="release of Multus, as v4.2.2")
    pinning.add_argument("plugins", help="release of the standard CNI plugins, as v1.9.1")
    pinning = commands.add_parser("pin-upstream", help="rewrite upstream/go.mod and upstream/go.sum")
    pinning.add_argument("release", help="of upstream, as v1.2.0")
    return parser.parse_args()


def _build(paper: Paper, *, node: bool, upstream: bool) -> None:
    names = (*build.CONTROL_PLANE, *(build.NODE if node else ()), *(build.UPSTREAM.packages if upstream else ()))
    if build.missing(names):
        begin = time.monotonic()
        paper.heading(f"Kubernetes {build.release()} and what its nodes need into {os.path.relpath(build.CACHE)}")
        build.build(paper, names)
        paper.line(f"  {paper.mark(True)} built after {time.monotonic() - begin:.0f} s")


def _up(lab: Lab, paper: Paper, *, crds: bool, nodes: bool, server_flags: list[str]) -> None:
    begin = time.monotonic()
    paper.heading(f"Cluster {lab.name} comes up")
    there = lifecycle.up(lab, paper, crds=crds, nodes=nodes, server_flags=server_flags)
    paper.line(f"  {paper.mark(True)} up after {time.monotonic() - begin:.1f} s")
    name = "" if lab.name == DEFAULT_NAME else f" --name {lab.name}"
    paper.line(f"\n  export KUBECONFIG={there.admin} PATH={build.folder()}:$PATH")
    paper.line(f"  python -m lab.kube{name} down")


def _status(lab: Lab, paper: Paper) -> int:
    there = Cluster.load(lab)
    components = dict.fromkeys((*ORDER, *there.processes))
    for component in components:
        process = there.processes.get(component)
        what = f"pid {process.pid}" if process is not None and there.runs(component) else "not running"
        paper.line(f"  {paper.mark(there.runs(component))} {component:<24} {what}")
    paper.line(f"  {there.place.url}, {there.admin}" + ("" if there.complete else ": half-way up"))
    return 0 if there.complete and all(map(there.runs, components)) else 1


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the command; 0 if it succeeded, 1 if something does not run, 2 if it could not be done."""
    arguments = _arguments()
    paper = Paper()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        lab = Lab(arguments.name)
        match arguments.command:
            case "build":
                _build(paper, node=arguments.node, upstream=arguments.upstream)
            case "up":
                _up(lab, paper, crds=arguments.crds, nodes=arguments.node, server_flags=arguments.server_flag)
            case "status":
                return _status(lab, paper)
            case "down":
                paper.line(f"cluster {lab.name} is {'down' if lifecycle.down(lab) else 'not up: nothing to do'}")
            case "pin":
                paper.line(f"{pin(arguments.release)} modules pinned; `make kube` builds them")
            case "pin-cni":
                paper.line(f"{pin_cni(arguments.multus, arguments.plugins)} modules pinned; `make kube` builds them")
            case "pin-upstream":
                paper.line(f"{pin_upstream(arguments.release)} modules pinned; `make kube` builds them")
    except LabError as error:
        print(f"lab.kube: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"lab.kube: stopped by {interrupt.args[0] if interrupt.args else 'Ctrl-C'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
