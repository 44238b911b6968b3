"""The plugin: what the agent calls. All work with the kernel is done by one thread, one call after the other."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from plugins.cni import Call, Plugin, valid_attachments
from plugins.errors import (
    CheckFailedError,
    CniError,
    InvalidConfigError,
    IOFailureError,
    NotAvailableError,
    TryAgainLaterError,
    WiringError,
)
from plugins.ifacer.act import Terms, ensure, look
from plugins.ifacer.config import Wish, parse_config
from plugins.ifacer.record import Record, Use
from plugins.ifacer.remove import remove_idle
from plugins.ifacer.settings import IfacerSettings
from plugins.net.netlink import NETLINK_ROUTE, BatchError, Netlink, NetlinkTimeoutError

log = logging.getLogger(__name__)
T = TypeVar("T")
_LONGEST_PAUSE = 60.0
"""Seconds between two looks for masters that nobody uses."""


class Ifacer(Plugin):
    """The `ifacer` CNI plugin of the node in whose network namespace the process is."""

    def __init__(self, settings: IfacerSettings) -> None:
        self._settings = settings
        self._record = Record(settings.record)
        self._worker = ThreadPoolExecutor(1, "ifacer")
        self._netlink: Netlink | None = None
        self._idle_since: dict[str, float] = {}

    async def close(self) -> None:
        """Wait for what is under way (bounded by the kernel's time limit) and close the socket."""
        await asyncio.to_thread(self._worker.shutdown)
        if self._netlink is not None:
            self._netlink.close()

    async def add(self, call: Call) -> Mapping[str, Any]:
        """Make what is wanted; the result is empty, so that the next plugin finds itself the first of the chain."""
        wish = parse_config(call.config)
        for text in wish.ignored:
            log.warning("ignored: %s", text)
        if wish.made:
            use = Use(call.container_id, call.ifname, str(call.config.get("name", "")), wish.made)
            await self._work(lambda netlink, terms: self._ensure(netlink, wish, use, terms))
        return {"cniVersion": call.cni_version, "dns": {}}

    async def delete(self, call: Call) -> None:
        """Note that the attachment uses its masters no longer; they stay."""
        await self._work(lambda _netlink, _terms: self._record.remove(call.container_id, call.ifname))

    async def check(self, call: Call) -> None:
        """Compare what is there with what is wanted."""
        wish = parse_config(call.config)
        try:
            found = await self._work(lambda netlink, terms: look(netlink, wish, terms).missing())
        except (InvalidConfigError, WiringError) as error:
            raise CheckFailedError(error.msg, error.details) from None
        if found:
            raise CheckFailedError("the masters are not as ADD left them", "; ".join(found))

    async def status(self, call: Call) -> None:
        """Whether the configuration is sound and nothing is in the way."""
        wish = parse_config(call.config)
        try:
            await self._work(lambda netlink, terms: look(netlink, wish, terms))
        except CniError as error:
            raise NotAvailableError("no master can be made", str(error)) from None

    async def gc(self, call: Call) -> None:
        """Note which attachments of this network use their masters no longer."""
        network, valid = str(call.config.get("name", "")), valid_attachments(call.config)
        await self._work(lambda _netlink, _terms: self._record.prune(network, valid))

    async def run(self) -> None:
        """Remove masters of ours that nobody uses, if that is wanted, until cancelled."""
        patience = self._settings.remove_unused_after
        while patience:
            try:
                await self._work(lambda netlink, _terms: self._remove(netlink, patience))
            except CniError as error:
                log.warning("cannot look for masters that nobody uses: %s", error)
            await asyncio.sleep(min(patience / 2, _LONGEST_PAUSE))
        await asyncio.Event().wait()

    def _ensure(self, netlink: Netlink, wish: Wish, use: Use, terms: Terms) -> None:
        new = self._record.add(use)
        for name in use.links:
            self._idle_since.pop(name, None)
        try:
            ensure(netlink, wish, terms)
        except BaseException:
            if new:
                self._record.remove(use.container, use.ifname)
            raise

    def _remove(self, netlink: Netlink, patience: float) -> None:
        used = self._record.used()
        self._idle_since = remove_idle(netlink, used, self._idle_since, time.monotonic(), patience)

    async def _work(self, work: Callable[[Netlink, Terms], T]) -> T:
        """The result of `work`, done by the worker in its turn. Raises CniError.

        Of a cancelled caller the work ends as soon as it can, has taken back what it did, and is waited for.
        """
        given_up = threading.Event()
        terms = Terms(self._settings.one_link_per_vlan_id, self._settings.kernel_timeout, given_up.is_set)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._worker, lambda: self._with_socket(work, terms))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            given_up.set()
            while not future.done():
                try:
                    await asyncio.wait((future,))
                except asyncio.CancelledError:
                    continue
            future.exception()  # whatever it was, nobody waits for it
            raise
        except OSError as error:
            _raise_mapped(error)

    def _with_socket(self, work: Callable[[Netlink, Terms], T], terms: Terms) -> T:
        """In the worker: `work` with the kept-open socket; one that failed is closed and not used again."""
        netlink = self._netlink or Netlink(NETLINK_ROUTE, self._settings.kernel_timeout)
        self._netlink = None
        try:
            result = work(netlink, terms)
        except (BatchError, CniError):
            self._netlink = netlink
            raise
        except BaseException:
            netlink.close()
            raise
        self._netlink = netlink
        return result


def _raise_mapped(error: OSError) -> NoReturn:
    """The kernel's refusals as errors of the CNI tree."""
    if isinstance(error, NetlinkTimeoutError):
        raise TryAgainLaterError("the kernel does not answer", str(error)) from error
    if isinstance(error, BatchError):
        raise WiringError("the kernel refused to make the master", error.strerror or str(error)) from error
    raise IOFailureError("the master cannot be made", str(error)) from error
