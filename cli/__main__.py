"""The command line: `spiderpoolctl apply|get|delete|ip|pool|gc`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from ipaddress import ip_address
from typing import Any

from api.claim import Address, Claim
from cli import address as addresses
from cli import manifests, scan
from cli.apply import apply, check_cluster
from cli.delete import delete
from cli.explain import explain
from cli.naming import KIND_LIST, CliError, find_kind
from cli.output import FORMATS, render
from cli.target import DEFAULT_STORE, STORE_VARIABLE, choose, opened
from store.errors import NotFoundError, StoreError
from store.port import Query, Store


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 if the command failed, 2 if it was misspelt."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.target = choose(arguments, os.environ)
        asyncio.run(arguments.run(arguments))
        return 0
    except CliError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
    except StoreError as error:
        print(f"error: {arguments.target}: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has seen enough; keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 1


async def _apply(arguments: argparse.Namespace) -> None:
    try:
        objects = manifests.load(arguments.file, arguments.namespace)
        if arguments.target.is_cluster:
            check_cluster(objects)
    except CliError as error:
        raise CliError(*error.lines, "nothing was changed") from None
    async with _opened(arguments, create=True) as store:
        await apply(store, objects, print)


async def _get(arguments: argparse.Namespace) -> None:
    kind = find_kind(arguments.kind)
    if arguments.all_namespaces and arguments.name:
        raise CliError("a name and --all-namespaces exclude each other")
    namespace = arguments.namespace if kind.TYPE.namespaced and not arguments.all_namespaces else ""
    async with _opened(arguments) as store:
        if arguments.name:
            try:
                found = [await store.get(kind, arguments.name, namespace)]
            except NotFoundError:
                where = f" in namespace {namespace}" if namespace else ""
                raise CliError(f'{kind.TYPE.plural} "{arguments.name}" not found{where}') from None
        else:
            found = (await store.list(kind, Query(namespace=namespace))).items
    if not found and arguments.output not in {"json", "yaml"}:
        print(f"No resources found{f' in {namespace} namespace' if namespace else ''}.", file=sys.stderr)
        return
    everywhere = arguments.all_namespaces and kind.TYPE.namespaced
    text = render(kind, found, arguments.output, single=bool(arguments.name), namespaces=everywhere)
    print(text, end="", flush=True)


async def _delete(arguments: argparse.Namespace) -> None:
    if bool(arguments.file) == bool(arguments.kind):
        raise CliError("delete takes either KIND NAME... or -f FILE")
    if arguments.file:
        objects = [given.resource for given in manifests.load(arguments.file, arguments.namespace)]
        targets = [(type(o), o.metadata.name, o.metadata.namespace) for o in reversed(objects)]
    else:
        kind = find_kind(arguments.kind)
        if not arguments.name:
            raise CliError(f"which of the {kind.TYPE.plural}? delete takes KIND NAME...")
        namespace = arguments.namespace if kind.TYPE.namespaced else ""
        targets = [(kind, name, namespace) for name in arguments.name]
    async with _opened(arguments) as store:
        await delete(store, targets, print, missing_ok=arguments.ignore_not_found)


async def _ip_show(arguments: argparse.Namespace) -> None:
    async with _opened(arguments) as store:
        claim = await addresses.find(store, _wanted(arguments))
        if not arguments.output:
            text = await addresses.describe(store, claim, cluster=arguments.target.is_cluster)
        else:
            text = render(Claim, [claim], arguments.output, single=True, namespaces=False)
    print(text, end="", flush=True)


async def _ip_release(arguments: argparse.Namespace) -> None:
    cluster = arguments.target.is_cluster
    async with _opened(arguments) as store:
        print(await addresses.release(store, _wanted(arguments), force=arguments.force, cluster=cluster))


async def _ip_set(arguments: argparse.Namespace) -> None:
    raise CliError(
        f"{arguments.ip} was not given to pod {arguments.namespace}/{arguments.pod}: addresses are given by the agent"
        " of the pod's node alone, which puts them on the NIC as well",
        "to have a pod get a certain address, name a pool that consists of it in annotation ipam.spidernet.io/ippool",
    )


async def _pool_explain(arguments: argparse.Namespace) -> None:
    _require_cluster(arguments, "pods say which pools they want only in a cluster")
    namespace, slash, name = arguments.pod.partition("/")
    namespace, name = (namespace, name) if slash else (arguments.namespace, arguments.pod)
    async with _opened(arguments) as store:
        print(await explain(store, namespace, name, arguments.default_network), end="", flush=True)


async def _gc(arguments: argparse.Namespace) -> None:
    _require_cluster(arguments, "on a machine of its own the agents collect all the time")
    async with _opened(arguments) as store:
        print(await scan.request(store))


def _require_cluster(arguments: argparse.Namespace, why: str) -> None:
    if not arguments.target.is_cluster:
        raise CliError(f"this command is for clusters (--kubeconfig or --context): {why}")


def _wanted(arguments: argparse.Namespace) -> Address:
    """The address, which may be given in either way. Raises CliError."""
    given = {address for address in (arguments.address, arguments.ip) if address is not None}
    if len(given) != 1:
        raise CliError("which address? give one, as ADDRESS or --ip ADDRESS")
    address: Address = given.pop()
    return address


def _opened(arguments: argparse.Namespace, *, create: bool = False) -> AbstractAsyncContextManager[Store]:
    return opened(arguments.target, create=create)


def _address(text: str) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_argument_group("where objects live", "A machine's file, or a cluster's API; see docs/cli.md.")
    where.add_argument("--store", metavar="PATH", help=f"SQLite store (default: ${STORE_VARIABLE} or {DEFAULT_STORE})")
    where.add_argument("--kubeconfig", metavar="PATH", help="kubeconfig file of the cluster")
    where.add_argument("--context", metavar="NAME", help="its context (default: the current one)")
    scoped = argparse.ArgumentParser(add_help=False)
    scoped.add_argument("-n", "--namespace", metavar="NS", default="default", help="namespace (default: default)")
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("-o", "--output", choices=FORMATS, default="", help="format (default: a table)")

    parser = argparse.ArgumentParser(
        prog="spiderpoolctl",
        description="Show and change the pools and addresses of a machine or a cluster.",
        epilog=f"Kinds: {KIND_LIST}. Each may be named by kind, plural, singular or short name.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "apply",
        parents=[common, scoped],
        help="create or update what a manifest says",
        description="Create or update the objects of YAML or JSON manifests. All are checked before any is written.",
    )
    command.add_argument(
        "-f", "--file", metavar="FILE", action="append", required=True, help="manifest, - for standard input"
    )
    command.set_defaults(run=_apply)

    command = commands.add_parser("get", parents=[common, scoped, shown], help="show objects", epilog=parser.epilog)
    command.add_argument("kind", metavar="KIND")
    command.add_argument("name", metavar="NAME", nargs="?", default="")
    command.add_argument("-A", "--all-namespaces", action="store_true", help="of all namespaces")
    command.set_defaults(run=_get)

    command = commands.add_parser("delete", parents=[common, scoped], help="delete objects", epilog=parser.epilog)
    command.add_argument("kind", metavar="KIND", nargs="?", default="")
    command.add_argument("name", metavar="NAME", nargs="*")
    command.add_argument("-f", "--file", metavar="FILE", action="append", help="delete what this manifest names")
    command.add_argument("--ignore-not-found", action="store_true", help="missing objects are no error")
    command.set_defaults(run=_delete)

    _add_ip(commands, common, shown)
    _add_pool(commands, common, scoped)
    command = commands.add_parser(
        "gc",
        parents=[common],
        help="take back addresses that nobody uses",
        description="Ask the leading controller to look at all claims now.",
    )
    command.set_defaults(run=_gc)
    return parser


Commands = Any  # argparse's type for what add_subparsers returns is private


def _add_ip(commands: Commands, common: argparse.ArgumentParser, shown: argparse.ArgumentParser) -> None:
    ip = commands.add_parser("ip", help="questions about one address").add_subparsers(metavar="COMMAND", required=True)
    wanted = argparse.ArgumentParser(add_help=False)
    wanted.add_argument("address", metavar="ADDRESS", nargs="?", type=_address)
    wanted.add_argument("--ip", metavar="ADDRESS", type=_address, help="the same, as upstream spells it")

    command = ip.add_parser("show", parents=[common, shown, wanted], help="who has an address")
    command.set_defaults(run=_ip_show)

    command = ip.add_parser("release", parents=[common, wanted], help="give an address back that nobody uses")
    command.add_argument(
        "-f", "--force", action="store_true", help="also if it is kept for somebody; never if it is in use"
    )
    command.set_defaults(run=_ip_release)

    command = ip.add_parser("set", parents=[common], help="refused: tells what to do instead")
    for flag in ("--ip", "--pod", "--namespace", "--containerid", "--node", "--interface"):
        command.add_argument(flag, default="", type=_address if flag == "--ip" else str)
    command.set_defaults(run=_ip_set)


def _add_pool(commands: Commands, common: argparse.ArgumentParser, scoped: argparse.ArgumentParser) -> None:
    pool = commands.add_parser("pool", help="questions about pools").add_subparsers(metavar="COMMAND", required=True)
    command = pool.add_parser(
        "explain",
        parents=[common, scoped],
        help="which pools a pod may use, and why not the others",
        description="Which pools each NIC of a pod may use, in which order, and why not the others.",
    )
    command.add_argument("pod", metavar="[NAMESPACE/]POD")
    command.add_argument(
        "--default-network",
        metavar="NAMESPACE/NAME",
        default=os.environ.get("MULTUS_CLUSTER_NETWORK", ""),
        help="NetworkAttachmentDefinition of pods' first NIC (default: $MULTUS_CLUSTER_NETWORK, as for agents)",
    )
    command.set_defaults(run=_pool_explain)


if __name__ == "__main__":
    sys.exit(main())
