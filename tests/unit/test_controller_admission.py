"""Patches that hold exactly what changed, and refusals as clients of Kubernetes know them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.core import Pod
from api.multusconfig import MultusConfig
from api.pool import Pool
from api.reservedip import ReservedIP
from api.validate.fields import forbidden, invalid, not_supported, required
from api.validate.verdict import Denial
from controller.admission.configurations import Address, mutating, validating
from controller.admission.patch import difference
from controller.admission.rules import Injection, Rules, mutate_path, validate_path
from controller.admission.status import refused
from controller.multus.admission import namespace_selector
from controller.multus.settings import InjectionSettings
from controller.settings import SOURCES
from daemon.sources import SettingsError

Json = dict[str, Any]
keys = st.sampled_from(["a", "b", "spec", "x/y", "x~y", ""])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(keys, values, max_size=4)


def applied(document: Json, operations: list[Json]) -> Json:
    """RFC 6902, as much of it as is used."""
    result = copy.deepcopy(document)
    for operation in operations:
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place: Any = result
        for part in way:
            place = place[part]
        if operation["op"] == "add":
            place[last] = operation["value"]
        else:
            assert last in place
            place.pop(last)
            if operation["op"] == "replace":
                place[last] = operation["value"]
    return result


@given(objects, objects)
def test_a_patch_makes_one_of_the_other(old: Json, new: Json) -> None:
    assert applied(old, difference(old, new)) == new
    assert difference(new, new) == []


@pytest.mark.parametrize(
    ("old", "new", "operations"),
    [
        ({"spec": {"a": 1}}, {"spec": {"a": 1, "b": 2}}, [{"op": "add", "path": "/spec/b", "value": 2}]),
        ({}, {"labels": {"x/y": "z"}}, [{"op": "add", "path": "/labels", "value": {"x/y": "z"}}]),
        ({"l": {"k": "v"}}, {"l": {"k": "v", "x/y~": "z"}}, [{"op": "add", "path": "/l/x~1y~0", "value": "z"}]),
        ({"ips": ["b", "a"]}, {"ips": ["a-b"]}, [{"op": "replace", "path": "/ips", "value": ["a-b"]}]),
        ({"a": 1, "b": 2}, {"b": 2}, [{"op": "remove", "path": "/a"}]),
        ({"a": 1}, {"a": True}, [{"op": "replace", "path": "/a", "value": True}]),
    ],
)
def test_nothing_but_the_change_is_in_a_patch(old: Json, new: Json, operations: list[Json]) -> None:
    assert difference(old, new) == operations


def test_invalid_names_every_cause() -> None:
    errors = [
        invalid("spec.gateway", "x", "is no address"),
        forbidden("spec.ips", "overlap"),
        required("spec.master", "missing"),
        not_supported("spec.mode", "z", ["a", "b"]),
    ]
    status = refused(Pool.TYPE, "p", "u", errors)
    assert status is not None
    assert (status["status"], status["code"], status["reason"]) == ("Failure", 422, "Invalid")
    assert status["message"] == (
        'SpiderIPPool.spiderpool.spidernet.io "p" is invalid: [spec.gateway: Invalid value: "x": is no address, '
        "spec.ips: Forbidden: overlap, spec.master: Required value: missing, "
        'spec.mode: Unsupported value: "z": supported values: "a", "b"]'
    )
    assert status["details"] == {
        "group": "spiderpool.spidernet.io",
        "kind": "SpiderIPPool",
        "name": "p",
        "uid": "u",
        "causes": [
            {"reason": "FieldValueInvalid", "message": 'Invalid value: "x": is no address', "field": "spec.gateway"},
            {"reason": "FieldValueForbidden", "message": "Forbidden: overlap", "field": "spec.ips"},
            {"reason": "FieldValueRequired", "message": "Required value: missing", "field": "spec.master"},
            {
                "reason": "FieldValueNotSupported",
                "message": 'Unsupported value: "z": supported values: "a", "b"',
                "field": "spec.mode",
            },
        ],
    }


@pytest.mark.parametrize(
    ("denial", "code", "message"),
    [
        (Denial("Forbidden", "why"), 403, 'spiderippools.spiderpool.spidernet.io "p" is forbidden: why'),
        (Denial("AlreadyExists", ""), 409, 'spiderippools.spiderpool.spidernet.io "p" already exists'),
    ],
)
def test_denials(denial: Denial, code: int, message: str) -> None:
    status = refused(Pool.TYPE, "p", "", denial)
    assert status is not None
    assert (status["code"], status["reason"], status["message"]) == (code, denial.reason, message)
    assert refused(Pool.TYPE, "p", "", []) is None


def test_paths_are_upstreams() -> None:
    assert mutate_path(Pool) == "/mutate-spiderpool-spidernet-io-v2beta1-spiderippool"
    assert validate_path(MultusConfig) == "/validate-spiderpool-spidernet-io-v2beta1-spidermultusconfig"
    assert mutate_path(Pod) == "/mutate--v1-pod"


async def _nothing(*_: Any) -> Any:
    raise AssertionError("not called")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (InjectionSettings(namespaces_exclude=()), [("NotIn", ["there"])]),
        (InjectionSettings(namespaces_exclude=("a", "there")), [("NotIn", ["a", "there"])]),
        (
            InjectionSettings(namespaces_exclude=("a",), namespaces_include=("b", "there")),
            [("NotIn", ["a", "there"]), ("In", ["b", "there"])],
        ),
    ],
)
def test_our_own_pods_never_wait_for_us(settings: InjectionSettings, expected: list[tuple[str, list[str]]]) -> None:
    found = namespace_selector(settings, "there")["matchExpressions"]
    assert [(each["operator"], each["values"]) for each in found] == expected
    assert {each["key"] for each in found} == {"kubernetes.io/metadata.name"}


def test_configurations_by_service_and_by_url() -> None:
    table = (
        Rules(Pool, _nothing, _nothing, _nothing),
        Rules(ReservedIP, _nothing, _nothing),
        Injection(Pod, _nothing, {"matchLabels": {"a": "b"}}),
    )
    service = Address("", "spiderpool-controller", "kube-system", 5722)
    filled, asked = mutating(table, service, b"CA"), validating(table, service, b"CA")
    assert [hook.name for hook in filled] == [
        "spiderippool.spiderpool.spidernet.io",
        "spiderreservedip.spiderpool.spidernet.io",
        "pods.spiderpool.spidernet.io",
    ]
    assert [hook.rules[0].operations for hook in filled] == [["CREATE", "UPDATE"], ["CREATE", "UPDATE"], ["CREATE"]]
    assert [hook.rules[0].operations for hook in asked] == [["CREATE", "UPDATE", "DELETE"], ["CREATE", "UPDATE"]]
    assert filled[2].namespace_selector == {"matchLabels": {"a": "b"}}
    reference = filled[0].client_config.service
    assert reference is not None
    assert (reference.name, reference.port, reference.path) == ("spiderpool-controller", 5722, mutate_path(Pool))
    assert "spiderpool-controller.kube-system.svc" in service.names()
    url = Address("https://[::1]:5722")
    assert validating(table, url, b"CA")[0].client_config.url == f"https://[::1]:5722{validate_path(Pool)}"
    assert url.names() == {"::1"}


def test_the_service_is_found_as_upstreams_chart_calls_it() -> None:
    environ = {"SPIDERPOOL_CONTROLLER_DEPLOYMENT_NAME": "mine", "SPIDERPOOL_WEBHOOK_PORT": "6000"}
    webhook = SOURCES.load([], environ)[0].webhook
    assert (webhook.configuration, webhook.port) == ("mine", 6000)
    address = webhook.address("there")
    assert (address.service, address.port) == ("mine", 6000)
    assert "mine.there.svc" in address.names()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--pod-namespace", "Not a name"], "pod: namespace is 'Not a name'"),
        (["--webhook-configuration", ""], "webhook: configuration is ''"),
        (["--webhook-service", "x/y"], "webhook: service is 'x/y'"),
        (["--tls-secret", ""], "tls: secret is ''"),
        (["--leader-lease", ""], "leader: lease is ''"),
        (["--tls-server-days", "99999999"], "tls: server_days is 99999999; it must be at most 36500"),
        (["--tls-authority-days", "1", "--tls-overlap", "14500"], "tls: overlap is 14500.0; twice as long must fit"),
        (["--leader-duration", "nan"], "leader: duration is nan"),
    ],
)
def test_settings_that_could_not_work(flags: list[str], text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SOURCES.load(flags, {})
    assert text in str(caught.value)
