"""Which of pool, SpiderCoordinator and setting decides what the network is asked, and what pools inherit."""

from __future__ import annotations

import pytest

from api.coordinator import ClusterCoordinatorSpec, Coordinator, chosen_of
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec
from api.subnet import Subnet, SubnetSpec
from api.validate.subnet import inherited
from plugins.ipam.questions import Questions, questions
from plugins.ipam.settings import IpamSettings

SAYS = (None, True, False)


@pytest.mark.parametrize("pool", SAYS)
@pytest.mark.parametrize("cluster", SAYS)
@pytest.mark.parametrize("node", [True, False])
def test_the_nearest_that_says_anything_counts(pool: bool | None, cluster: bool | None, node: bool) -> None:
    wanted = next(each for each in (pool, cluster, node) if each is not None)
    found = questions(
        PoolSpec(subnet="10.6.0.0/16", detect_ip_conflict=pool),
        ClusterCoordinatorSpec(detect_ip_conflict=cluster),
        IpamSettings(enable_ip_conflict_detection=node),
    )
    assert found == Questions(conflict=wanted, gateway=False)
    found = questions(
        PoolSpec(subnet="10.6.0.0/16", detect_gateway=pool),
        ClusterCoordinatorSpec(detect_gateway=cluster),
        IpamSettings(enable_gateway_detection=node),
    )
    assert found == Questions(conflict=False, gateway=wanted)


def test_without_pool_and_cluster_the_setting_counts() -> None:
    assert questions(None, None, IpamSettings(enable_gateway_detection=True)) == Questions(False, True)


@pytest.mark.parametrize("pool", SAYS)
@pytest.mark.parametrize("subnet", SAYS)
def test_a_pool_that_does_not_say_inherits_of_its_subnet(pool: bool | None, subnet: bool | None) -> None:
    spec = PoolSpec(subnet="10.6.0.0/16", detect_ip_conflict=pool, detect_gateway=pool)
    above = SubnetSpec(subnet="10.6.0.0/16", detect_ip_conflict=subnet, detect_gateway=subnet)
    got = inherited(
        Pool(metadata=ObjectMeta(name="p"), spec=spec), [Subnet(metadata=ObjectMeta(name="s", uid="u"), spec=above)]
    ).spec
    wanted = subnet if pool is None else pool
    assert (got.detect_ip_conflict, got.detect_gateway) == (wanted, wanted)


def test_the_coordinator_that_counts() -> None:
    one, other = (Coordinator(metadata=ObjectMeta(name=name)) for name in ("a", "default"))
    assert chosen_of([one, other]) is other
    assert chosen_of([one]) is one
    assert chosen_of([]) is None
