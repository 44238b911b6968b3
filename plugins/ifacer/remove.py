"""The removal of masters that ifacer made and nobody uses any more. Nothing else is ever removed."""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Mapping, Sequence

from plugins.ifacer.act import in_use_below
from plugins.ifacer.plan import counts, is_ours, stands_on
from plugins.net import rtlink, rtmaster
from plugins.net.netlink import BatchError, Netlink
from plugins.net.rtmaster import MasterLink

log = logging.getLogger(__name__)


def idle(
    links: Sequence[MasterLink], addresses: Sequence[rtlink.LinkAddress], used: Collection[str]
) -> list[rtlink.Link]:
    """Links of ours that no attachment uses, that have no address and that nothing of the node's stands on.

    A bond with a VLAN is not idle; when the VLAN has gone, it is.
    """
    return [
        one.link
        for one in links
        if is_ours(one.link)
        and one.link.name not in used
        and not one.master
        and not any(own.ifindex == one.link.ifindex and counts(own.address) for own in addresses)
        and not any(stands_on(other, one.link) for other in links)
    ]


def remove_idle(
    netlink: Netlink, used: Collection[str], since: Mapping[str, float], now: float, patience: float
) -> dict[str, float]:
    """Remove the links that have been idle for `patience` seconds; the other idle ones, and since when they are.

    `since` is what the last call returned. Raises BatchError, OSError.
    """
    links = [rtmaster.parse_master(body) for body in netlink.dump(rtlink.link_dump())]
    addresses = rtlink.parse_addresses(netlink.dump(rtlink.address_dump()))
    waiting: dict[str, float] = {}
    for link in idle(links, addresses, used):
        first = since.get(link.name, now)
        if now - first < patience:
            waiting[link.name] = first
        elif not in_use_below(netlink, link):
            failures = netlink.exchange((rtlink.link_delete(link.ifindex, link.name),)).failures
            if any(failure.code != errno.ENODEV for failure in failures):
                raise BatchError(failures)
            log.info("removed a master that nothing uses", extra={"link": link.name})
    return waiting
