"""Which pools may serve a NIC, in which order, and why the others may not. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from api.pool import Pool, PoolSpec, Route
from api.ranges import Address, Family, IPSet, Network, parse_network
from plugins.errors import InvalidConfigError, NoPoolError
from plugins.ipam.config import IpamConfig

_WILDCARDS = frozenset("*?[")


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

    def cidr(self, address: Address | str) -> str:
        """`address` with the subnet's prefix length."""
        return f"{address}/{self.network.prefixlen}"


def pool_facts(pool: Pool) -> PoolFacts:
    """The facts of `pool`. A pool that was never validated may be wrong in any way, and then says so itself."""
    spec = pool.spec
    terminating = pool.metadata.deletion_timestamp is not None
    network, addresses, problem = parse_network("0.0.0.0/0"), IPSet(4), ""
    try:
        network = parse_network(spec.subnet)
        addresses = IPSet.parse(spec.ips or (), network.version)
        addresses -= IPSet.parse(spec.exclude_ips or (), network.version)
        if not addresses <= IPSet.of_network(str(network)):
            problem = f"its ranges leave its subnet {spec.subnet}"
    except ValueError as error:
        problem = str(error)
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
    )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pools of one family that may serve the NIC, best first, and those that may not."""

    family: Family
    pools: tuple[PoolFacts, ...]
    passed_over: tuple[str, ...]
    """One `name: reason` for each pool that was looked at and may not serve."""


def select(
    *,
    config: IpamConfig,
    namespace: str | None,
    node: str,
    families: Iterable[Family],
    pools: Mapping[str, PoolFacts],
    defaults: Iterable[PoolFacts],
) -> tuple[Candidates, ...]:
    """Candidates per family: of the configuration's lists, else of the cluster's default pools.

    With `namespace` None the pools' namespaces are not judged. A source that names pools of one family gives that
    family only. A family for which pools are named of which none may serve fails the NIC, even if the other family
    could be served: a pod that gets one address where two were meant is broken later, and where it is harder to see.
    Raises NoPoolError, InvalidConfigError.
    """
    enabled = frozenset(families)
    listed: dict[Family, tuple[str, ...]] = {4: config.ipv4_pools, 6: config.ipv6_pools}
    if not any(listed.values()):
        by_name = sorted(defaults, key=lambda pool: pool.name)
        listed = {
            4: tuple(p.name for p in by_name if p.family == 4),
            6: tuple(p.name for p in by_name if p.family == 6),
        }
        if not any(listed.values()):
            raise NoPoolError(
                "no pool is selected", "the network configuration names none and no pool has spec.default: true"
            )
    wanted = [family for family in (4, 6) if listed[family] and family in enabled]
    if not wanted:
        raise NoPoolError(
            "no pool is available", "; ".join(f"IPv{f} is disabled on this node" for f in (4, 6) if listed[f])
        )
    results = tuple(_filter(family, listed[family], namespace, node, pools) for family in wanted)
    empty = [result for result in results if not result.pools]
    if empty:
        raise NoPoolError(
            "no pool is available", "; ".join(f"IPv{r.family}: {', '.join(r.passed_over) or 'none'}" for r in empty)
        )
    return results


def _filter(
    family: Family, listed: tuple[str, ...], namespace: str | None, node: str, pools: Mapping[str, PoolFacts]
) -> Candidates:
    passed: list[str] = []
    names: list[str] = []
    for name in listed:
        if _WILDCARDS.isdisjoint(name):
            names.append(name)
        else:
            matches = sorted(p.name for p in pools.values() if p.family == family and fnmatchcase(p.name, name))
            names += matches
            if not matches:
                passed.append(f"{name}: matches no IPv{family} pool")
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InvalidConfigError(
            "a pool is listed twice", f"ipam.default_ipv{family}_ippool: {twice!r} comes up twice in {list(listed)}"
        )
    fit: list[PoolFacts] = []
    for name in names:
        pool = pools.get(name)
        reason = "there is no such pool" if pool is None else refusal(pool, family, namespace, node)
        if pool is None or reason:
            passed.append(f"{name}: {reason}")
        else:
            fit.append(pool)
    return Candidates(family, tuple(sorted(fit, key=_specificity)), tuple(passed))


def refusal(pool: PoolFacts, family: Family, namespace: str | None, node: str) -> str:
    """Why `pool` may not serve this pod on this node; empty if it may."""
    for rule in _RULES:
        reason = rule(pool, family, namespace, node)
        if reason:
            return reason
    return ""


def _state(pool: PoolFacts, family: Family, namespace: str | None, node: str) -> str:  # noqa: ARG001
    if pool.terminating:
        return "it is being deleted"
    if pool.spec.disable:
        return "it is disabled"
    if pool.problem:
        return f"it is invalid: {pool.problem}"
    return "" if pool.family == family else f"it is of IPv{pool.family}"


def _node(pool: PoolFacts, family: Family, namespace: str | None, node: str) -> str:  # noqa: ARG001
    spec = pool.spec
    if spec.node_name:
        return "" if node in spec.node_name else f"nodeName does not list node {node}"
    return "nodeAffinity cannot be judged, no node labels are known here" if spec.node_affinity else ""


def _namespace(pool: PoolFacts, family: Family, namespace: str | None, node: str) -> str:  # noqa: ARG001
    spec = pool.spec
    if namespace is None:
        return ""
    if spec.namespace_name:
        return "" if namespace in spec.namespace_name else f"namespaceName does not list namespace {namespace!r}"
    return "namespaceAffinity cannot be judged, no namespace labels are known here" if spec.namespace_affinity else ""


def _workload(pool: PoolFacts, family: Family, namespace: str | None, node: str) -> str:  # noqa: ARG001
    if pool.spec.pod_affinity:
        return "podAffinity cannot be judged, no pod labels are known here"
    if pool.spec.multus_name:
        return "multusName cannot be judged, the NIC's NetworkAttachmentDefinition is not known here"
    return ""


_RULES: tuple[Callable[[PoolFacts, Family, str | None, str], str], ...] = (_state, _node, _namespace, _workload)
"""In upstream's order, which decides what a person reads first."""


def _specificity(pool: PoolFacts) -> tuple[bool, ...]:
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
