"""What a subnet's addresses are given to: the text of `status.controlledIPPools`.

It is upstream's, `{"<pool>":{"ips":["a-b",…],"application":"…"}}`, with one more member. `releasing` are addresses of
`ips` that the pool gives back: it loses them before they leave `ips`, for an address that two pools have may be used
through either of them. So a pool never has an address that its record has not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from api.ranges import Family, Interval, IPSet, parse_range


@dataclass(frozen=True, slots=True)
class Grant:
    """What one pool has of its subnet."""

    ips: IPSet
    """All addresses that nobody else can have."""
    releasing: IPSet
    """Those of them that the pool is to lose, or has lost while a pod still had one."""
    application: str = ""
    """Whom an automatic pool is for, as upstream writes it: `apps_v1_Deployment_shop_web`; empty: made by hand."""

    @property
    def pool(self) -> IPSet:
        """The addresses that the pool is to have."""
        return self.ips - self.releasing


Ledger = Mapping[str, Grant]
"""Pool's name to what it has."""


def parse(text: str | None, family: Family) -> dict[str, Grant]:
    """The ledger; what is malformed counts as absent, for anybody may have written it."""
    try:
        document = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    found = {}
    for name, record in document.items() if isinstance(document, dict) else ():
        grant = _grant(record, family)
        if grant is not None:
            found[str(name)] = grant
    return found


def _grant(record: Any, family: Family) -> Grant | None:
    if not isinstance(record, dict):
        return None
    ips = _addresses(record.get("ips"), family)
    application = record.get("application")
    releasing = _addresses(record.get("releasing"), family) & ips
    return Grant(ips, releasing, application if isinstance(application, str) else "") if ips else None


def _addresses(value: Any, family: Family) -> IPSet:
    found: list[Interval] = []
    for text in value if isinstance(value, list) else ():
        with suppress(ValueError):
            found.append(parse_range(str(text), family))
    return IPSet(family, found)


def dump(ledger: Ledger) -> str | None:
    """The text, pools in order; None if no pool has any address."""
    records = {}
    for name in sorted(ledger):
        grant = ledger[name]
        if grant.ips:
            records[name] = {
                "ips": grant.ips.to_ranges(),
                **({"application": grant.application} if grant.application else {}),
                **({"releasing": grant.releasing.to_ranges()} if grant.releasing else {}),
            }
    return json.dumps(records, separators=(",", ":")) if records else None


def union(family: Family, sets: Iterable[IPSet]) -> IPSet:
    """All addresses of the sets."""
    return IPSet(family, (part for each in sets for part in each.intervals))


def granted(ledger: Ledger, family: Family) -> IPSet:
    """Every address that some pool has."""
    return union(family, (grant.ips for grant in ledger.values()))
