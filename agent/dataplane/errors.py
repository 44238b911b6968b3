"""What can go wrong with the dataplane; none of it stops the agent, forwarding that is in place goes on."""

from __future__ import annotations


class DataplaneError(Exception):
    """Base: services are not (or no longer) kept up to date on this node."""


class HeadersMissingError(DataplaneError):
    """The kernel's UAPI headers are not installed."""


class HooksOwnedError(DataplaneError):
    """Somebody else's programs hold the socket hooks; two load balancers would translate each other's work."""


class BusyError(DataplaneError):
    """Another process is changing the same pins."""


class LoadError(DataplaneError):
    """The programs could not be compiled, loaded or attached."""


class MapFullError(DataplaneError):
    """A map has no room for a new entry."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the map {name!r} is full")
        self.name = name
