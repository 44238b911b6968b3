"""Whose is it: the names, marks and numbers by which what we put on a node is told as ours, and as whose."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

PROTOCOL: Final = 83
"""The origin (rtm_protocol, FRA_PROTOCOL) of every route and rule of ours: `ip route show proto 83 table all` lists
them. Above RTPROT_STATIC the kernel gives these numbers no meaning; 83 is nobody else's in iproute2's list."""
LINK_GROUP: Final = 0x53504944
"""The group in which the node's ends of our pairs are created. A pair's alias can only be set once it exists; the
group is there from the first moment on, so an agent killed in between leaves nothing that cannot be told as ours."""

_ALIAS_PART = 120
_HEX_ID = re.compile(r"[0-9a-f]{11,}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Attachment:
    """Whose NIC it is: what a link's alias and a route's metric tell, and what GC compares."""

    container_id: str
    ifname: str
    network: str

    @property
    def host_link(self) -> str:
        """Name of the node's end of the pair: `veth` and 11 characters, the most that fits.

        The container id's first 11 where they tell containers apart, as in runtimes' hexadecimal ids; for a longer id
        of other making (`web-frontend-1`, `web-frontend-2`) they would not, and its digest's first 11 are taken.
        """
        container_id = self.container_id
        if len(container_id) > 11 and not _HEX_ID.match(container_id):
            container_id = hashlib.sha256(container_id.encode()).hexdigest()
        return f"veth{container_id[:11]}"

    @property
    def alias(self) -> str:
        """The node's end's IFLA_IFALIAS (at most 255 bytes): marks the link as ours and says whose it is."""
        return ":".join(("spiderpool", _bounded(self.container_id), self.ifname, _bounded(self.network)))

    @property
    def tag(self) -> int:
        """The metric of the node's routes to this NIC.

        Below our rule nothing competes for a pod's address, so the metric is free to say which NIC a route was made
        for. With it DEL needs neither the namespace nor prevResult, also where the route hangs on a link that is not
        ours and outlives the NIC (the first NIC of an overlay).
        """
        digest = hashlib.sha256(f"{self.container_id}:{self.ifname}".encode()).digest()
        return int.from_bytes(digest[:4], "big") or 1

    def owns_alias(self, alias: str) -> bool:
        """Whether a link with this alias is the node's end of the pair of this container, whatever the NIC."""
        return alias_parts(alias)[0] == _bounded(self.container_id)


def _bounded(text: str) -> str:
    return text if len(text) <= _ALIAS_PART else hashlib.sha256(text.encode()).hexdigest()


def is_our_alias(alias: str) -> bool:
    """Whether a link with this alias was made by a coordinator."""
    return alias.startswith("spiderpool:") and alias.count(":") == 3


def alias_parts(alias: str) -> tuple[str, str, str]:
    """(container id, ifname, network) of an alias of ours, else empty strings."""
    if not is_our_alias(alias):
        return "", "", ""
    _, container_id, ifname, network = alias.split(":")
    return container_id, ifname, network
