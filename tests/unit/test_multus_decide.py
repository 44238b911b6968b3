"""Which SpiderMultusConfig a NetworkAttachmentDefinition is made of, and when it is written."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from api.meta import ObjectMeta
from api.multusconfig import MultusConfig
from api.nad import NetworkAttachmentDefinition
from api.netconf import network_of
from controller.multus.decide import Decision, decide
from tests.unit.test_api_multusconfig import OK, stored


def config(name: str, *, age: int = 0, spec: dict[str, Any] | None = None, **annotations: str) -> MultusConfig:
    made = stored(OK if spec is None else spec, {"multus.spidernet.io/cr-name": "net", **annotations})
    times = msgspec.convert({"creationTimestamp": f"2030-01-01T00:00:{age:02d}Z"}, ObjectMeta)
    metadata = replace(
        made.metadata, name=name, uid=f"uid-{name}", creation_timestamp=times.creation_timestamp, resource_version="1"
    )
    return replace(made, metadata=metadata)


def gone(resource: Any) -> Any:
    times = msgspec.convert({"deletionTimestamp": "2030-01-01T00:00:00Z"}, ObjectMeta)
    return replace(resource, metadata=replace(resource.metadata, deletion_timestamp=times.deletion_timestamp))


def present(of: MultusConfig, **metadata: Any) -> NetworkAttachmentDefinition:
    made = network_of(of)
    return replace(made, metadata=replace(made.metadata, uid="n", resource_version="9", **metadata))


ONE, TWO = config("one", age=1), config("two", age=2)


def test_nobody_wants_it() -> None:
    assert decide([], present(ONE)) == Decision()
    assert decide([gone(ONE)], present(ONE)) == Decision(), "the garbage collector removes it"


def test_it_is_created_and_then_left_alone() -> None:
    assert decide([ONE], None).write == network_of(ONE)
    assert decide([ONE], present(ONE)).write is None
    bare = config("bare", spec={})
    assert decide([bare], present(bare)).write is None, "no configuration is equal to none"


def test_what_drifted_is_repaired_and_what_is_not_ours_stays() -> None:
    there = present(ONE, labels={"their": "label"}, finalizers=["their/finalizer"])
    assert decide([ONE], there).write is None
    edited = replace(there, spec=replace(there.spec, config="{}"))
    assert decide([ONE], edited).write == there
    annotated = replace(there, metadata=replace(there.metadata, annotations={"odd": "one"}))
    assert decide([ONE], annotated).write == there
    orphaned = replace(there, metadata=replace(there.metadata, owner_references=[]))
    assert decide([ONE], orphaned).write == there


def test_a_terminating_definition_is_waited_for() -> None:
    decision = decide([ONE], gone(present(TWO)))
    assert (decision.config, decision.write) == (ONE, None)


def test_the_owner_keeps_it_and_else_the_oldest_gets_it() -> None:
    assert decide([TWO, ONE], None) == Decision(ONE, network_of(ONE), (), (TWO,))
    assert decide([TWO, ONE], present(TWO)) == Decision(TWO, None, (), (ONE,))
    left = decide([ONE, gone(TWO)], present(TWO))
    assert (left.config, left.losers) == (ONE, ())
    assert left.write is not None
    assert [owner.uid for owner in left.write.metadata.owner_references] == ["uid-one"]
    assert (left.write.metadata.uid, left.write.metadata.resource_version) == ("n", "9")


def test_an_invalid_one_changes_nothing() -> None:
    broken = config("broken", spec={"cniType": "macvlan"})
    decision = decide([broken], None)
    assert decision.write is None
    assert [problem.path for problem in decision.problems] == ["spec.macvlanConfig"]


def test_what_no_webhook_has_seen_is_defaulted() -> None:
    raw = msgspec.convert(
        {"metadata": {"name": "raw", "namespace": "web"}, "spec": {"cniType": "ipvlan", "ipvlan": {"master": ["e"]}}},
        MultusConfig,
    )
    decision = decide([raw], None)
    assert decision.write is not None
    assert '"mtu":0,"ipam"' in (decision.write.spec.config or "")
    assert '"type":"coordinator"' in (decision.write.spec.config or "")
