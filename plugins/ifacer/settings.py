"""What an operator may set about ifacer."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.limits import at_least


@dataclass(frozen=True)
class IfacerSettings:
    """How masters are made and, if at all, removed. Times are in seconds."""

    one_link_per_vlan_id: bool = True
    """Refuse a VLAN id that another VLAN link of the node has, as upstream does, also if that one is on another
    parent. Turn it off where the same id is used on several physical networks; two links for one id of the same parent
    the kernel itself refuses."""
    remove_unused_after: float = 0.0
    """How long a VLAN or bond that ifacer made may go without being used until it is removed; 0: it stays for good, as
    with upstream. In use is what a pod has asked for that was not deleted, and what has links or addresses. Longer than
    an ADD may take."""
    record: str = "/var/run/spidernet/ifacer"
    """Folder that remembers which pods use which master. It may be lost when the node restarts, as the links are."""
    kernel_timeout: float = 10.0
    """How long to wait for the kernel's answer to one batch. Setting up a physical NIC may take seconds."""

    def __post_init__(self) -> None:
        at_least(0, remove_unused_after=self.remove_unused_after)
        at_least(0.01, kernel_timeout=self.kernel_timeout)
