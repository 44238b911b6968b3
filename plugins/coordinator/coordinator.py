"""The plugin: what the agent calls, and the bounds within which the kernel is asked."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn, TypeVar
from weakref import WeakValueDictionary

from plugins.cni import Call, Plugin, Result, decode_prev_result, valid_attachments
from plugins.coordinator.add import Attached, attach
from plugins.coordinator.attachment import Attachment
from plugins.coordinator.check import differences
from plugins.coordinator.config import (
    CoordinatorConfig,
    parse_config,
    parse_default_nic,
    parse_mode,
)
from plugins.coordinator.delete import collect, detach_first, detach_further
from plugins.coordinator.host import Host, find_link
from plugins.coordinator.probe import Prober, ProbeUnknownError
from plugins.coordinator.settings import CoordinatorSettings
from plugins.coordinator.source import NodeSource, Source
from plugins.coordinator.steps import Task
from plugins.errors import (
    CheckFailedError,
    InvalidConfigError,
    IOFailureError,
    NotAvailableError,
    TryAgainLaterError,
    WiringError,
)
from plugins.net import nft
from plugins.net.netlink import NETLINK_NETFILTER, BatchError, Netlink, NetlinkTimeoutError
from plugins.net.netns import in_netns, run_in_thread
from store.errors import StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")

_DELETIONS = 1024
"""How many deletions are remembered. What else a chain's DEL does follows at once, and then the pod goes."""


class Coordinator(Plugin):
    """The `coordinator` CNI plugin of the node in whose network namespace the calling thread makes it and uses it."""

    def __init__(
        self, settings: CoordinatorSettings, prober: Prober | None = None, source: Source | None = None
    ) -> None:
        """With a `prober`, a NIC that gets a new MAC address tells its neighbours. A `source` goes before `settings`.

        Raises OSError.
        """
        self._settings = settings
        self._source = source or NodeSource(settings)
        self._prober = prober
        self._host = Host(settings.kernel_timeout)
        self._places = asyncio.Semaphore(settings.concurrency)
        self._removals = ThreadPoolExecutor(settings.workers, "coordinator-delete")
        self._pods: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """One NIC of a pod after the other: they share its tables."""
        self._busy: Counter[str] = Counter()
        self._collections: list[set[str]] = []
        self._deleted: dict[tuple[str, str], None] = {}
        """The last NICs that were deleted, (container id, name): not to be repaired if their pod still lives."""

    async def close(self) -> None:
        """Wait for what is under way (bounded by the kernel's time limit) and close the sockets."""
        await asyncio.to_thread(self._removals.shutdown)
        self._host.close()

    async def add(self, call: Call) -> Mapping[str, Any]:
        """Wire the pod's NIC; returns prevResult as it came but for the MAC that `podMACPrefix` gave the NIC."""
        _require_previous(call)
        result = pass_on(call.config["prevResult"], call.cni_version)
        config, awaited = await self._config(call)
        if config.mode == "disable":
            return result
        task = Task(_attachment(call), config, _require_fd(call), self._settings.kernel_timeout, awaited)
        async with self._pod(call.container_id), self._in_progress(task.attachment.host_link):
            self._deleted.pop((call.container_id, call.ifname), None)
            attached = await self._attach(call, task)
        if not config.pod_mac_prefix:
            return result
        return with_mac(result, call.ifname, attached.new_mac or attached.pod.nic.mac)

    async def delete(self, call: Call) -> None:
        """Unwire; only the members of the configuration that it needs are looked at."""
        if parse_mode(call.config, self._settings) == "disable":
            return
        first = call.ifname == parse_default_nic(call.config, self._settings)
        work = detach_first if first else detach_further
        default_nic, timeout = parse_default_nic(call.config, self._settings), self._settings.kernel_timeout
        async with self._pod(call.container_id):
            await self._remove(lambda: work(self._host, _attachment(call), call.netns_fd, default_nic, timeout))
            self._deleted[call.container_id, call.ifname] = None
            if len(self._deleted) > _DELETIONS:
                del self._deleted[next(iter(self._deleted))]

    async def check(self, call: Call) -> None:
        """Compare the pod and the node with what ADD makes."""
        previous = _require_previous(call)
        config, awaited = await self._config(call)
        if config.mode == "disable":
            return
        task = Task(_attachment(call), config, _require_fd(call), self._settings.kernel_timeout, awaited)
        async with self._pod(call.container_id), self._places:
            found = await _settled(run_in_thread(lambda: differences(self._host, task, previous)))
        if found:
            raise CheckFailedError("the attachment is not as ADD left it", "; ".join(found))

    async def status(self, call: Call) -> None:
        """Whether the configuration is sound and the kernel has what an ADD needs."""
        try:
            config = parse_config(call.config, await self._source.settings())
        except TryAgainLaterError as error:
            raise NotAvailableError("no pod can be attached", str(error)) from None
        if config.mode == "disable":
            return
        await self._remove(self._ready)

    async def gc(self, call: Call) -> None:
        """Remove the pairs of this network whose attachment is not listed."""
        valid = valid_attachments(call.config)
        network = str(call.config.get("name", ""))
        protected = set(self._busy)
        self._collections.append(protected)
        try:
            removed = await self._remove(lambda: collect(self._host, network, valid, lambda: frozenset(protected)))
        finally:
            self._collections.remove(protected)
        if removed:
            log.info("removed links of attachments that are no longer valid", extra={"links": removed})

    async def _config(self, call: Call) -> tuple[CoordinatorConfig, frozenset[str]]:
        """The configuration of a call, and the NICs that its pod is still to get.

        A configuration that says `disable` needs no SpiderCoordinator. Only a further NIC asks what its pod wants.
        Raises CniError.
        """
        if parse_mode(call.config, self._settings) == "disable" and call.config.get("mode"):
            return parse_config(call.config, self._settings), frozenset()
        settings = await self._source.settings()
        config = parse_config(call.config, settings)
        if config.mode == "disable" or call.ifname == config.pod_default_cni_nic or not config.tune_pod_routes:
            return config, frozenset()
        try:
            wishes = await self._source.wishes(call.pod_namespace, call.pod_name, call.pod_uid)
        except StoreError as error:
            raise TryAgainLaterError("the pod cannot be read", str(error)) from error
        if wishes.default_route_nic:
            config = parse_config(call.config, replace(settings, pod_default_route_nic=wishes.default_route_nic))
        return config, wishes.networks

    # Repair

    @property
    def is_busy(self) -> bool:
        """Whether NICs are being attached now."""
        return bool(self._busy)

    async def defaults(self) -> CoordinatorSettings:
        """What a call's configuration is filled up from. Raises TryAgainLaterError if there is nothing to go by now."""
        return await self._source.settings()

    async def on_node(self, work: Callable[[Host], T]) -> T:
        """The result of `work`, which blocks. Raises CniError."""
        return await self._remove(lambda: work(self._host))

    async def undisturbed(self, container_id: str, work: Callable[[Host, frozenset[str]], T]) -> T | None:
        """The result of `work` in a thread of its own while nothing else is done to the pod; None if something is.

        `work` gets the pod's NICs that were deleted of late. Raises CniError.
        """
        lock = self._pod(container_id)
        if lock.locked():
            return None
        async with lock:
            gone = frozenset(nic for owner, nic in self._deleted if owner == container_id)
            return await _settled(run_in_thread(lambda: work(self._host, gone)))

    def _pod(self, container_id: str) -> asyncio.Lock:
        lock = self._pods.get(container_id)
        if lock is None:
            lock = self._pods[container_id] = asyncio.Lock()
        return lock

    async def _attach(self, call: Call, task: Task) -> Attached:
        async with self._places:
            attached = await self._wire(task)
        try:
            await self._announce(call, attached)
        except BaseException:
            await _finish(run_in_thread(attached.undo.run))
            raise
        return attached

    async def _wire(self, task: Task) -> Attached:
        given_up = False
        work = asyncio.ensure_future(run_in_thread(lambda: attach(self._host, task, lambda: given_up)))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            given_up = True
            await _wait_for(work)
            if not work.cancelled() and work.exception() is None:
                await _finish(run_in_thread(work.result().undo.run))
            raise
        except (OSError, BatchError) as error:
            _raise_mapped(error)

    async def _announce(self, call: Call, attached: Attached) -> None:
        """Tell the network the new MAC. A failure costs the neighbours a moment, and the pod nothing."""
        if self._prober is None or attached.new_mac is None:
            return
        try:
            probe = await self._prober.open(_require_fd(call), call.ifname)
            async with probe:
                for address in attached.pod.nic.addresses:
                    await probe.announce(address)
        except (ProbeUnknownError, OSError) as error:
            log.warning("cannot announce the pod's new MAC address: %s", error)

    async def _remove(self, work: Callable[[], T]) -> T:
        """Run `work` where it holds up no ADD; errors of the kernel as CniError."""
        loop = asyncio.get_running_loop()
        return await _settled(loop.run_in_executor(self._removals, work))

    def _ready(self) -> None:
        with self._host.socket() as node:
            find_link(node, "lo")

        def has_nftables() -> bool:
            with Netlink(NETLINK_NETFILTER, self._settings.kernel_timeout) as filters:
                return nft.available(filters)

        if not in_netns(self._host.netns_fd, has_nftables):
            raise NotAvailableError("no pod can be attached", "the kernel has no nf_tables (CONFIG_NF_TABLES, NFT_CT)")

    @asynccontextmanager
    async def _in_progress(self, name: str) -> AsyncIterator[None]:
        self._busy[name] += 1
        for protected in self._collections:
            protected.add(name)
        try:
            yield
        finally:
            self._busy[name] -= 1
            if not self._busy[name]:
                del self._busy[name]


def pass_on(previous: Mapping[str, Any], version: str) -> dict[str, Any]:
    """prevResult as the result in `version`: as it came, also what this program does not know of.

    libcni converts prevResult to the configuration's version; one that did not gets its addresses' `version` member,
    which ends with 1.0.0, put in or taken out.
    """
    result = {**previous, "cniVersion": version}
    had, has = (str(v) < "1.0.0" for v in (previous.get("cniVersion", version), version))
    if had and not has:
        result["ips"] = [{k: v for k, v in ip.items() if k != "version"} for ip in previous.get("ips") or ()]
    elif has and not had:
        result["ips"] = [{"version": "6" if ":" in ip["address"] else "4", **ip} for ip in previous.get("ips") or ()]
    return result


def with_mac(result: Mapping[str, Any], ifname: str, mac: bytes) -> dict[str, Any]:
    """`result` with the MAC address of the pod's NIC, which the plugins before us compare at their CHECK."""
    interfaces = [
        {**nic, "mac": mac.hex(":")} if nic.get("name") == ifname and nic.get("sandbox") else nic
        for nic in result.get("interfaces") or ()
    ]
    return {**result, "interfaces": interfaces} if interfaces else dict(result)


def _attachment(call: Call) -> Attachment:
    return Attachment(call.container_id, call.ifname, str(call.config.get("name", "")))


def _require_previous(call: Call) -> Result:
    previous = decode_prev_result(call.config)
    if previous is None:
        raise InvalidConfigError(
            "prevResult is missing",
            "prevResult: coordinator is a chained plugin, it follows the one that makes the NIC",
        )
    return previous


def _require_fd(call: Call) -> int:
    if call.netns_fd is None:
        raise IOFailureError("the pod's network namespace is not open", call.netns)
    return call.netns_fd


async def _settled(work: Awaitable[T]) -> T:
    """The result of blocking work that has nothing to take back. Raises CniError.

    A cancelled caller waits for its end first: it uses descriptors that the caller owns.
    """
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _wait_for(future)
        raise
    except (OSError, BatchError) as error:
        _raise_mapped(error)


async def _finish(work: Awaitable[Any]) -> None:
    """Wait for `work` to end, also while the caller is being cancelled again."""
    future = asyncio.ensure_future(work)
    await _wait_for(future)
    future.result()


async def _wait_for(future: asyncio.Future[Any]) -> None:
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            continue


def _raise_mapped(error: OSError) -> NoReturn:
    """The kernel's refusals as errors of the CNI tree."""
    if isinstance(error, NetlinkTimeoutError):
        raise TryAgainLaterError("the kernel does not answer", str(error)) from error
    if isinstance(error, BatchError):
        raise WiringError("the kernel refused to wire the pod", error.strerror or str(error)) from error
    raise IOFailureError("the kernel refused to wire the pod", str(error)) from error
