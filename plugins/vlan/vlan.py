"""The plugin: what the agent calls. Order and undoing are decided here, the kernel's part is `act`'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from plugins.cni import Call, Plugin, decode_prev_result, encode_result
from plugins.errors import (
    CheckFailedError,
    CniError,
    IOFailureError,
    NotAvailableError,
    ProviderError,
    TryAgainLaterError,
    WiringError,
)
from plugins.ipam.concurrency import uninterrupted
from plugins.ipam.plugin import Ipam
from plugins.net.netlink import BatchError, NetlinkTimeoutError
from plugins.net.netns import run_in_thread
from plugins.vlan.act import configure, look, look_for_master, make, remove
from plugins.vlan.config import VlanConfig, parse_config, require_our_ipam
from plugins.vlan.plan import Wish, assigned, differences, result_of, temporary_name

log = logging.getLogger(__name__)
T = TypeVar("T")


class Vlan(Plugin):
    """The `vlan` CNI plugin of the node in whose network namespace the process is."""

    def __init__(self, ipam: Ipam, *, has_provider: bool, kernel_timeout: float, undo_deadline: float) -> None:
        """`has_provider`: whether IPAM has an infrastructure provider to ask.

        `kernel_timeout` is the kernel's for one batch, `undo_deadline` IPAM's for a failed ADD's addresses; in seconds.
        """
        self._ipam = ipam
        self._has_provider = has_provider
        self._timeout = kernel_timeout
        self._undo_deadline = undo_deadline

    async def add(self, call: Call) -> Mapping[str, Any]:
        """Make the NIC with its addresses. All or nothing; repeated, it is made anew with the same addresses.

        With `vlanId` the link comes first, so that IPAM can ask the network by it whether an address is free. Without,
        IPAM comes first: its claim has the provider's VLAN and MAC address.
        """
        config = parse_config(call.config)
        if config.vlan_id is None:
            self._require_provider()
        netns_fd, given = _require_fd(call), None
        try:
            if config.vlan_id is None:
                given = await self._ipam.attach(call)
                vlan_id, mac = assigned(given.claims)
                wish = _wish(call, config, vlan_id, mac)
                told = await self._work(lambda: make(wish, netns_fd, self._timeout))
            else:
                wish = _wish(call, config, config.vlan_id)
                told = await self._work(lambda: make(wish, netns_fd, self._timeout))
                given = await self._ipam.attach(call)
            result = result_of(given.result, call.ifname, told, call.netns, config.dns)
            await self._work(lambda: configure(call.ifname, result, netns_fd, self._timeout))
        except BaseException:
            await uninterrupted(self._undo(call, netns_fd, has_addresses=given is not None))
            raise
        log.info("made VLAN %d of %s with MAC address %s", wish.vlan_id, config.master, told)
        return encode_result(result, call.cni_version)

    async def delete(self, call: Call) -> None:
        """Remove the NIC, then release its addresses, so that none is free that is still in use."""
        require_our_ipam(call.config)
        if call.netns_fd is not None:
            await self._remove(call, call.netns_fd, only_ours=False)
        await self._ipam.delete(call)

    async def check(self, call: Call) -> None:
        """Compare claims, addresses, the link and the routes with prevResult and the configuration."""
        config = parse_config(call.config)
        previous = decode_prev_result(call.config)
        await self._ipam.check(call)
        assert previous is not None  # noqa: S101 (IPAM has refused it)
        if config.vlan_id is None:
            mine = (claim for claim in self._ipam.held() if claim.spec.container_id == call.container_id)
            wish = _wish(call, config, *assigned(claim for claim in mine if claim.spec.nic == call.ifname))
        else:
            wish = _wish(call, config, config.vlan_id)
        netns_fd = _require_fd(call)
        scene = await self._work(lambda: look(wish, netns_fd, self._timeout))
        found = differences(wish, previous, scene)
        if found:
            raise CheckFailedError("the NIC is not as ADD left it", "; ".join(found))

    async def status(self, call: Call) -> None:
        """Whether the configuration is sound, the master is there, and IPAM could serve."""
        config = parse_config(call.config)
        try:
            if config.vlan_id is None:
                self._require_provider()
            if not config.in_container:
                await self._work(lambda: look_for_master(config, self._timeout))
        except CniError as error:
            raise NotAvailableError("no VLAN can be made", str(error)) from None
        await self._ipam.status(call)

    async def gc(self, call: Call) -> None:
        """Release the addresses of attachments that are gone; their links went with their namespaces."""
        require_our_ipam(call.config)
        await self._ipam.gc(call)

    def _require_provider(self) -> None:
        if not self._has_provider:
            raise ProviderError(
                "nobody chooses the VLAN",
                "vlanId: is missing, and the agent has no infrastructure provider (provider.server_url)",
            )

    async def _undo(self, call: Call, netns_fd: int, *, has_addresses: bool) -> None:
        """Take back what an ADD did. What cannot be is logged: the runtime's DEL follows and tries again."""
        try:
            await self._remove(call, netns_fd, only_ours=True)
            if has_addresses:
                async with asyncio.timeout(self._undo_deadline):
                    await self._ipam.delete(replace(call, command="DEL"))
        except (CniError, TimeoutError) as error:
            log.error("cannot take back all of a failed ADD: %s", error)

    async def _remove(self, call: Call, netns_fd: int, *, only_ours: bool) -> None:
        temporary = temporary_name(call.container_id, call.ifname)
        await self._work(partial(remove, call.ifname, temporary, netns_fd, self._timeout, only_ours=only_ours))

    async def _work(self, work: Callable[[], T]) -> T:
        """The result of `work` in a thread of its own, whose end a cancelled caller waits for. Raises CniError."""
        try:
            return await uninterrupted(run_in_thread(work))
        except OSError as error:
            _raise_mapped(error)


def _wish(call: Call, config: VlanConfig, vlan_id: int, mac: bytes | None = None) -> Wish:
    return Wish(call.ifname, temporary_name(call.container_id, call.ifname), config, vlan_id, mac)


def _require_fd(call: Call) -> int:
    if call.netns_fd is None:
        raise IOFailureError("the pod's network namespace is not open", call.netns)
    return call.netns_fd


def _raise_mapped(error: OSError) -> NoReturn:
    """The kernel's refusals as errors of the CNI tree."""
    if isinstance(error, NetlinkTimeoutError):
        raise TryAgainLaterError("the kernel does not answer", str(error)) from error
    if isinstance(error, BatchError):
        raise WiringError("the kernel refused to make the NIC", error.strerror or str(error)) from error
    raise IOFailureError("the NIC cannot be made", str(error)) from error
