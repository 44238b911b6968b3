"""Which pools may serve a NIC, in which order, and why the others may not. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from api.annotations import PoolNames
from api.autopools import Application, application_of
from api.pool import LabelSelector, Pool, PoolSpec, Route
from api.ranges import Address, Family, IPSet, Network, parse_network
from api.selectors import keys, matches
from api.subnet import is_automatic
from api.validate.network import network_of
from api.views import spec_problem
from plugins.errors import InvalidConfigError, NoPoolError

NO_POOL = "no IPPool available"
"""Upstream's sentence for a NIC that no pool may serve."""

_TOLD = 50
"""How many pools that were passed over are told of; a pattern may mean thousands."""

_WILDCARDS = frozenset("*?[")

Look = tuple[str, str]
"""What a pool looks at: `pod`, `namespace` or `node` and a label's key; or `application` or `network`, and nothing."""


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What allocation needs of a pool, computed once per version of its spec."""

    name: str
    family: Family
    network: Network
    addresses: IPSet
    """`ips` without `excludeIPs`; addresses of reserved IPs are still in."""
    gateway: str
    routes: tuple[Route, ...]
    spec: PoolSpec
    terminating: bool
    problem: str = ""
    """Why the pool cannot be used at all, if its spec is wrong."""
    foreign: bool = False
    """Another Spiderpool's records of the pool are the truth, and claims are not yet."""
    marked: bool = True
    """Claims are the truth; else nobody has said so yet, and they are if no other Spiderpool runs here."""
    automatic: bool = False
    """Made by the controller for one application, which podAffinity names instead of pods' labels."""
    application: Application | None = None
    """Of an automatic pool: the application; None if that cannot be read."""
    labels: Mapping[str, str] | None = None
    """Of an automatic pool alone: what it is found by."""
    looks_at: frozenset[Look] = frozenset()
    """What of the pod, its namespace and the node decides whether the pool may serve it."""

    def cidr(self, address: Address | str) -> str:
        """`address` with the subnet's prefix length."""
        return f"{address}/{self.network.prefixlen}"


def pool_facts(pool: Pool) -> PoolFacts:
    """The facts of `pool`. A pool that was never validated may be wrong in any way, and then says so itself."""
    spec = pool.spec
    terminating = pool.metadata.deletion_timestamp is not None
    network = network_of(spec.subnet) or parse_network("0.0.0.0/0")
    addresses, problem = IPSet(network.version), spec_problem(spec)
    if not problem:
        addresses = IPSet.parse(spec.ips or (), network.version) - IPSet.parse(spec.exclude_ips or (), network.version)
    automatic = is_automatic(pool)
    return PoolFacts(
        name=pool.metadata.name,
        family=network.version,
        network=network,
        addresses=addresses,
        gateway=spec.gateway or "",
        routes=tuple(spec.routes or ()),
        spec=spec,
        terminating=terminating,
        problem=problem,
        automatic=automatic,
        application=application_of(pool),
        labels=pool.metadata.labels if automatic else None,
        looks_at=_looks_at(spec, automatic=automatic),
    )


def _selectors(spec: PoolSpec) -> dict[str, LabelSelector]:
    """The selectors that count, by what they are about; names go before affinities."""
    found = {
        "pod": spec.pod_affinity,
        "namespace": None if spec.namespace_name else spec.namespace_affinity,
        "node": None if spec.node_name else spec.node_affinity,
    }
    return {name: selector for name, selector in found.items() if selector is not None}


def _looks_at(spec: PoolSpec, *, automatic: bool) -> frozenset[Look]:
    looks: set[Look] = set()
    for name, selector in _selectors(spec).items():
        if name == "pod" and automatic:
            looks.add(("application", ""))
        else:
            looks |= {(name, key) for key in keys(selector)}
    if spec.multus_name:
        looks.add(("network", ""))
    return frozenset(looks)


def expand(names: PoolNames, pools: Mapping[str, PoolFacts]) -> dict[Family, tuple[str, ...]]:
    """The pools that `names` mean, patterns expanded in place; of none at all, the cluster's default pools.

    A pattern that matches nothing stays, so that it can be told of.
    """
    if names == PoolNames():
        ordered = sorted(pool.name for pool in pools.values() if pool.spec.default)
        return {family: tuple(name for name in ordered if pools[name].family == family) for family in (4, 6)}
    found: dict[Family, tuple[str, ...]] = {}
    lists: dict[Family, tuple[str, ...]] = {4: names.ipv4, 6: names.ipv6}
    for family, listed in lists.items():
        expanded: list[str] = []
        for name in listed:
            expanded += (_matching(name, family, pools) if _is_pattern(name) else []) or [name]
        found[family] = tuple(expanded)
    return found


def _is_pattern(name: str) -> bool:
    return not _WILDCARDS.isdisjoint(name)


def _matching(pattern: str, family: Family, pools: Mapping[str, PoolFacts]) -> list[str]:
    """Shell patterns; `[^…]` is Go's way to write `[!…]`."""
    shell = pattern.replace("[^", "[!")
    return sorted(pool.name for pool in pools.values() if pool.family == family and fnmatchcase(pool.name, shell))


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, as far as pools look at it; None: it is not known here."""

    node: str
    namespace: str | None = None
    pod_labels: Mapping[str, str] | None = None
    namespace_labels: Mapping[str, str] | None = None
    node_labels: Mapping[str, str] | None = None
    application: Application | None = None
    """The pod's top controller."""
    network: str | None = None
    """`namespace/name` of the NIC's NetworkAttachmentDefinition; empty: `network_problem` tells why it is not known."""
    network_problem: str = ""
    installation: str = ""
    """Namespace of NetworkAttachmentDefinitions that pools name without one."""
    masters: frozenset[Address] | None = None
    """Addresses of the NIC's physical function, of which the pool's subnet must have one; None: it need not."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pools of one family that may serve the NIC, best first, and those that may not."""

    family: Family
    pools: tuple[PoolFacts, ...]
    passed_over: tuple[str, ...]
    """One `name: reason` for each pool that was looked at and may not serve, up to a number."""


def select(
    *,
    named: Mapping[Family, tuple[str, ...]],
    source: str,
    nic: str,
    asker: Asker,
    families: Iterable[Family],
    pools: Mapping[str, PoolFacts],
    conflicts: Mapping[str, str],
) -> tuple[Candidates, ...]:
    """Candidates per family, of the pools `named` (patterns are expanded) by `source`, and not of those in `conflicts`.

    A family of which none is named is not given. A family for which pools are named of which none may serve fails
    the NIC, even if the other family could be served: a pod that gets one address where two were meant is broken
    later, and where it is harder to see. Raises NoPoolError, InvalidConfigError.
    """
    enabled = frozenset(families)
    for names in named.values():
        if len(set(names)) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InvalidConfigError("wrong input", f"duplicate IPPool {twice} specified for NIC {nic} by {source}")
    if not any(named.values()):
        raise NoPoolError(
            NO_POOL,
            "no pool selection rules of any type are specified: no pool is named by the pod, its namespace or the"
            " network configuration, and no pool has spec.default: true",
        )
    wanted = [family for family in (4, 6) if named.get(family) and family in enabled]
    if not wanted:
        raise NoPoolError(NO_POOL, "; ".join(f"IPv{f} is disabled on this node" for f in (4, 6) if named.get(f)))
    results = tuple(_filter(family, named[family], asker, pools, conflicts) for family in wanted)
    empty = [result for result in results if not result.pools]
    if empty:
        whose = f" of {nic}" if nic else ""
        told = (
            f"all IPv{r.family} IPPools{whose}, named by {source}, filtered out: {', '.join(r.passed_over)}"
            for r in empty
        )
        raise NoPoolError(NO_POOL, "; ".join(told))
    return results


def _filter(
    family: Family,
    names: tuple[str, ...],
    asker: Asker,
    pools: Mapping[str, PoolFacts],
    conflicts: Mapping[str, str],
) -> Candidates:
    fit: list[PoolFacts] = []
    refused = 0
    passed: list[str] = []
    for name in names:
        pool = pools.get(name)
        reason = _absence(name, family) if pool is None else refusal(pool, family, asker) or conflicts.get(name, "")
        if pool is not None and not reason:
            fit.append(pool)
            continue
        refused += 1
        if refused <= _TOLD:
            passed.append(f"{name}: {reason}")
    if refused > _TOLD:
        passed.append(f"and {refused - _TOLD} others")
    return Candidates(family, tuple(sorted(fit, key=specificity)), tuple(passed))


def _absence(name: str, family: Family) -> str:
    return f"matches no IPv{family} pool" if _is_pattern(name) else "there is no such pool"


def refusal(pool: PoolFacts, family: Family, asker: Asker) -> str:
    """Why `pool` may not serve; empty if it may."""
    reason = _state(pool, family)
    for rule in _RULES:
        reason = reason or rule(pool, asker)
    return reason


def _state(pool: PoolFacts, family: Family) -> str:
    if pool.terminating:
        return "it is being deleted"
    if pool.spec.disable:
        return "it is disabled"
    if pool.problem:
        return f"it is invalid: {pool.problem}"
    if pool.foreign:
        return "it has records of another Spiderpool that are not adopted yet"
    return "" if pool.family == family else f"it is of IPv{pool.family}"


def _node(pool: PoolFacts, asker: Asker) -> str:
    spec = pool.spec
    if spec.node_name:
        return "" if asker.node in spec.node_name else f"nodeName does not list node {asker.node}"
    return _affinity("nodeAffinity", spec.node_affinity, asker.node_labels, f"node {asker.node}")


def _namespace(pool: PoolFacts, asker: Asker) -> str:
    spec = pool.spec
    if asker.namespace is None:
        return ""
    if spec.namespace_name:
        return (
            ""
            if asker.namespace in spec.namespace_name
            else f"namespaceName does not list namespace {asker.namespace!r}"
        )
    return _affinity(
        "namespaceAffinity", spec.namespace_affinity, asker.namespace_labels, f"namespace {asker.namespace!r}"
    )


def _pod(pool: PoolFacts, asker: Asker) -> str:
    affinity = pool.spec.pod_affinity
    if affinity is None or not pool.automatic or asker.application is None:
        return _affinity("podAffinity", affinity, asker.pod_labels, "the pod")
    if pool.application == asker.application:
        return ""
    return f"it was made for {pool.application}, and the pod is of {asker.application}"


def _multus(pool: PoolFacts, asker: Asker) -> str:
    names = pool.spec.multus_name
    if not names:
        return ""
    if asker.network is None:
        return "multusName cannot be judged, the NIC's NetworkAttachmentDefinition is not known here"
    if not asker.network:
        return f"multusName cannot be judged, {asker.network_problem}"
    full = [name if "/" in name else f"{asker.installation}/{name}" for name in names]
    return "" if asker.network in full else f"multusName does not list {asker.network}"


def _master(pool: PoolFacts, asker: Asker) -> str:
    if asker.masters is None or any(address in pool.network for address in asker.masters):
        return ""
    have = ", ".join(sorted(map(str, asker.masters))) or "none"
    return f"match_master_subnet: its subnet {pool.network} has none of the addresses of the NIC's master ({have})"


def _affinity(field: str, selector: LabelSelector | None, labels: Mapping[str, str] | None, whose: str) -> str:
    if selector is None:
        return ""
    if labels is None:
        return f"{field} cannot be judged, no {field.removesuffix('Affinity')} labels are known here"
    return "" if matches(selector, labels) else f"{field} does not match the labels of {whose}"


_RULES: tuple[Callable[[PoolFacts, Asker], str], ...] = (_node, _namespace, _pod, _multus, _master)
"""In upstream's order, which decides what a person reads first."""


def specificity(pool: PoolFacts) -> tuple[bool, ...]:
    """Sort key: the most specific pool first; the sort is stable, so that listed order decides the rest."""
    spec = pool.spec
    return tuple(
        not field
        for field in (
            spec.pod_affinity,
            spec.node_name,
            spec.node_affinity,
            spec.namespace_name,
            spec.namespace_affinity,
            spec.multus_name,
        )
    )
