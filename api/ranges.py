"""Sets of IP addresses as intervals of integers. Nothing here enumerates: a /48 of IPv6 costs what a /28 costs."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from random import Random
from typing import Literal

Family = Literal[4, 6]
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interval = tuple[int, int]
"""First and last address, both included."""


def to_address(family: Family, value: int) -> Address:
    """The address whose number is `value`."""
    return IPv4Address(value) if family == 4 else IPv6Address(value)


def parse_network(text: str) -> Network:
    """The network of a CIDR `address/length`; bits behind the length may be set. Raises ValueError.

    Netmasks, zones and addresses without a length, which `ipaddress` takes too, are not CIDRs.
    """
    address, _, length = text.partition("/")
    if length.isascii() and length.isdigit() and "%" not in address:
        try:
            return ip_network(text, strict=False)
        except ValueError:
            pass
    raise ValueError(f"{text!r} is not a CIDR 'address/length'")


def parse_address(text: str, family: Family) -> Address:
    """One address of `family`. Raises ValueError with a sentence that says why."""
    return to_address(family, _parse_address(text, text, family))


def parse_range(text: str, family: Family) -> Interval:
    """`a` or `a-b` with a <= b, both of `family`, no blanks. Raises ValueError with a sentence that says why."""
    first, dash, last = text.partition("-")
    low, high = _parse_address(first, text, family), _parse_address(last, text, family) if dash else None
    if high is None:
        return low, low
    if low > high:
        raise ValueError(f"IP range {text!r} is reversed, the first address must not be greater than the last")
    return low, high


def _parse_address(text: str, whole: str, family: Family) -> int:
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError(f"{whole!r} is not an IP address or a range 'first-last'") from None
    if address.version != family:
        raise ValueError(f"{whole!r} is not of family IPv{family}")
    if getattr(address, "scope_id", None):
        raise ValueError(f"{whole!r} has a zone, which addresses of a pool cannot have")
    return int(address)


class IPSet:
    """An immutable set of addresses of one family: sorted, disjoint, maximal intervals."""

    __slots__ = ("_starts", "count", "family", "intervals")

    def __init__(self, family: Family, intervals: Iterable[Interval] = ()) -> None:
        merged: list[Interval] = []
        for low, high in sorted(intervals):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], high))
            else:
                merged.append((low, high))
        self.family: Family = family
        self.intervals: tuple[Interval, ...] = tuple(merged)
        self._starts = [low for low, _ in merged]
        self.count = sum(high - low + 1 for low, high in merged)
        """How many addresses; may be as large as 2**128."""

    @classmethod
    def parse(cls, ranges: Iterable[str], family: Family) -> IPSet:
        """The union of textual ranges. Raises ValueError for the first that is malformed."""
        return cls(family, [parse_range(text, family) for text in ranges])

    @classmethod
    def of_network(cls, cidr: str) -> IPSet:
        """All addresses of a CIDR, network and broadcast address included. Raises ValueError."""
        network = ip_network(cidr, strict=False)
        return cls(network.version, [(int(network.network_address), int(network.broadcast_address))])

    def __contains__(self, value: object) -> bool:
        number = int(value) if isinstance(value, IPv4Address | IPv6Address) else value
        if not isinstance(number, int):
            return False
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number <= self.intervals[index][1]

    def __bool__(self) -> bool:
        return bool(self.intervals)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IPSet) and (self.family, self.intervals) == (other.family, other.intervals)

    def __hash__(self) -> int:
        return hash((self.family, self.intervals))

    def __repr__(self) -> str:
        return f"IPSet({self.family}, {self.to_ranges()})"

    def __or__(self, other: IPSet) -> IPSet:
        return IPSet(self.family, (*self.intervals, *other.intervals))

    def __sub__(self, other: IPSet) -> IPSet:
        return IPSet(self.family, _subtract(self.intervals, other.intervals))

    def __and__(self, other: IPSet) -> IPSet:
        return IPSet(self.family, _intersect(self.intervals, other.intervals))

    def __le__(self, other: IPSet) -> bool:
        return not _subtract(self.intervals, other.intervals)

    def to_ranges(self) -> list[str]:
        """Textual ranges, `a` for a single address, `a-b` for a run."""
        return [range_text(self.family, interval) for interval in self.intervals]


def range_text(family: Family, interval: Interval) -> str:
    """`a` or `a-b`."""
    low, high = interval
    first = str(to_address(family, low))
    return first if low == high else f"{first}-{to_address(family, high)}"


def _subtract(left: Iterable[Interval], right: Iterable[Interval]) -> list[Interval]:
    result: list[Interval] = []
    cuts = iter(right)
    cut = next(cuts, None)
    for first, high in left:
        low = first
        while cut is not None and cut[1] < low:
            cut = next(cuts, None)
        while cut is not None and cut[0] <= high:
            if cut[0] > low:
                result.append((low, cut[0] - 1))
            low = cut[1] + 1
            if cut[1] >= high:
                break
            cut = next(cuts, None)
        if low <= high:
            result.append((low, high))
    return result


def _intersect(left: tuple[Interval, ...], right: tuple[Interval, ...]) -> list[Interval]:
    result: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        low, high = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if low <= high:
            result.append((low, high))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return result


class FreeSet:
    """A mutable set of free addresses from which one is picked at random.

    Allocation picks at random since many agents pick from views that are slightly stale: with the lowest address
    first, all of them would want the same one. A pick chooses an interval, then an address in it, both uniformly:
    constant time whether the set is nearly full or nearly empty, and small fragments are used up first. Taking and
    putting back costs a bisection and one list insertion.
    """

    __slots__ = ("_intervals", "count", "family")

    def __init__(self, addresses: IPSet) -> None:
        self.family = addresses.family
        self._intervals: list[Interval] = list(addresses.intervals)
        self.count = addresses.count

    def __contains__(self, number: int) -> bool:
        index = self._find(number)
        return index >= 0 and number <= self._intervals[index][1]

    def __iter__(self) -> Iterator[Interval]:
        return iter(self._intervals)

    def pick(self, random: Random) -> int | None:
        """A random free address, which stays in the set; None if there is none."""
        if not self._intervals:
            return None
        low, high = self._intervals[random.randrange(len(self._intervals))]
        return random.randint(low, high)

    def scatter(self, random: Random) -> int | None:
        """A random free address, each as likely as any other; None if there is none. Costs a look at each interval."""
        if not self._intervals:
            return None
        ((low, high),) = random.choices(self._intervals, [high - low + 1 for low, high in self._intervals])
        return random.randint(low, high)

    def following(self, number: int) -> int | None:
        """The first free address from `number` on, or else the lowest of all; None if there is none."""
        if number in self:
            return number
        if not self._intervals:
            return None
        return self._intervals[(self._find(number) + 1) % len(self._intervals)][0]

    def take(self, number: int) -> bool:
        """Remove an address; False if it was not there."""
        index = self._find(number)
        if index < 0 or number > self._intervals[index][1]:
            return False
        low, high = self._intervals[index]
        self._intervals[index : index + 1] = [
            part for part in ((low, number - 1), (number + 1, high)) if part[0] <= part[1]
        ]
        self.count -= 1
        return True

    def put(self, number: int) -> bool:
        """Add an address; False if it was there already."""
        index = self._find(number)
        if index >= 0 and number <= self._intervals[index][1]:
            return False
        joins_left = index >= 0 and self._intervals[index][1] == number - 1
        joins_right = index + 1 < len(self._intervals) and self._intervals[index + 1][0] == number + 1
        if joins_left and joins_right:
            self._intervals[index : index + 2] = [(self._intervals[index][0], self._intervals[index + 1][1])]
        elif joins_left:
            self._intervals[index] = (self._intervals[index][0], number)
        elif joins_right:
            self._intervals[index + 1] = (number, self._intervals[index + 1][1])
        else:
            insort(self._intervals, (number, number))
        self.count += 1
        return True

    def _find(self, number: int) -> int:
        """Index of the last interval that starts at or below `number`, or -1."""
        return bisect_right(self._intervals, number, key=lambda interval: interval[0]) - 1
