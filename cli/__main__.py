"""The command line: `spiderpoolctl apply|get|delete|ip`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address

from api.claim import Address, Claim, claim_name
from api.pool import Pool
from api.validate.pool import pool_addresses
from cli import manifests
from cli.apply import apply
from cli.delete import delete
from cli.naming import KIND_LIST, CliError, find_kind
from cli.output import FORMATS, render
from store.errors import NotFoundError, StoreError
from store.port import Query, Store
from store.sqlite import SqliteStore

DEFAULT_STORE = "/var/lib/spidernet/store.db"
STORE_VARIABLE = "SPIDERPOOL_STORE_PATH"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 if the command failed, 2 if it was misspelt."""
    arguments = _parser().parse_args(argv)
    try:
        asyncio.run(arguments.run(arguments))
        return 0
    except CliError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
    except StoreError as error:
        print(f"error: store {arguments.store}: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has seen enough; keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 1


async def _apply(arguments: argparse.Namespace) -> None:
    try:
        objects = manifests.load(arguments.file, arguments.namespace)
    except CliError as error:
        raise CliError(*error.lines, "nothing was changed") from None
    async with _store(arguments.store, create=True) as store:
        await apply(store, objects, print)


async def _get(arguments: argparse.Namespace) -> None:
    kind = find_kind(arguments.kind)
    if arguments.all_namespaces and arguments.name:
        raise CliError("a name and --all-namespaces exclude each other")
    namespace = arguments.namespace if kind.TYPE.namespaced and not arguments.all_namespaces else ""
    async with _store(arguments.store) as store:
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
    async with _store(arguments.store) as store:
        await delete(store, targets, print, missing_ok=arguments.ignore_not_found)


async def _ip_show(arguments: argparse.Namespace) -> None:
    address: Address = arguments.ip
    async with _store(arguments.store) as store:
        try:
            claim = await store.get(Claim, claim_name(address))
        except NotFoundError:
            raise CliError(f"nobody has {address}: {await _where_it_lies(store, address)}") from None
    print(render(Claim, [claim], arguments.output, single=True, namespaces=False), end="", flush=True)


async def _where_it_lies(store: Store, address: Address) -> str:
    pools = [
        pool.metadata.name
        for pool in (await store.list(Pool)).items
        if pool.spec.ip_version == address.version and address in pool_addresses(pool.spec)
    ]
    return f"it is an unclaimed address of pool {', '.join(pools)}" if pools else "it is in no pool"


@asynccontextmanager
async def _store(path: str, *, create: bool = False) -> AsyncIterator[Store]:
    if create:
        _make_folder(path)
    else:
        _require(path)
    store = await SqliteStore.open(path)
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
    """Reading must not create an empty store where the user only mistyped a path."""
    try:
        os.stat(path)
    except PermissionError:
        raise CliError(f"no permission for the store {path}: it belongs to root") from None
    except OSError:
        raise CliError(
            f"there is no store at {path} yet: the agent or `spiderpoolctl apply -f FILE` creates it; "
            f"another one is named by --store or {STORE_VARIABLE}"
        ) from None
    if not os.access(path, os.R_OK | os.W_OK):  # reading, too, writes: SQLite's shared memory is a file beside it
        raise CliError(f"no permission for the store {path}: it belongs to root")


def _address(text: str) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        metavar="PATH",
        default=os.environ.get(STORE_VARIABLE) or DEFAULT_STORE,
        help=f"SQLite store (default: ${STORE_VARIABLE}, or else {DEFAULT_STORE})",
    )
    scoped = argparse.ArgumentParser(add_help=False)
    scoped.add_argument("-n", "--namespace", metavar="NS", default="default", help="namespace (default: default)")
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("-o", "--output", choices=FORMATS, default="", help="format (default: a table)")

    parser = argparse.ArgumentParser(
        prog="spiderpoolctl",
        description="Show and change the pools, services and endpoints of one machine.",
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

    addresses = commands.add_parser("ip", help="questions about one address").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = addresses.add_parser("show", parents=[common, shown], help="which pod has an address")
    command.add_argument("--ip", metavar="ADDRESS", required=True, type=_address)
    command.set_defaults(run=_ip_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
