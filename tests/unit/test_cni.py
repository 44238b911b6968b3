"""What chained plugins are told, and by which names its faults are called."""

from __future__ import annotations

from typing import Any

import pytest

from plugins.cni import ResultInterface, ResultIP, ResultRoute, decode_prev_result
from plugins.errors import InvalidConfigError


def test_what_of_prev_result_is_read() -> None:
    raw = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/a", "mtu": 1500}],
        "ips": [{"address": "10.6.0.10/16", "gateway": "10.6.0.1", "interface": 0}, {"address": "fd06::10/64"}],
        "routes": [{"dst": "0.0.0.0/0", "gw": None, "priority": 7}],
        "dns": None,
    }
    result = decode_prev_result({"prevResult": raw})
    assert result is not None
    assert result.ips == (ResultIP("10.6.0.10/16", "10.6.0.1", 0), ResultIP("fd06::10/64"))
    assert result.routes == (ResultRoute("0.0.0.0/0"),)
    assert result.interfaces == (ResultInterface("eth0", "02:00:00:00:00:01", "/run/netns/a"),)
    assert result.dns == {}
    assert decode_prev_result({}) is decode_prev_result({"prevResult": None}) is None


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([], "prevResult: Expected `object`, got `array`"),
        ({"ips": "x"}, "prevResult.ips: Expected `array | null`, got `str`"),
        ({"ips": [1]}, "prevResult.ips[0]: Expected `object`, got `int`"),
        ({"ips": [{}]}, "prevResult.ips[0]: Object missing required field `address`"),
        ({"ips": [{"address": "10.6.0.10/33"}]}, "prevResult.ips[0].address: '10.6.0.10/33', allowed: ADDRESS/LENGTH"),
        ({"ips": [{"address": "10.6.0.10/16", "interface": "0"}]}, "prevResult.ips[0].interface: Expected `int"),
        ({"routes": [{"gw": "10.6.0.1"}]}, "prevResult.routes[0]: Object missing required field `dst`"),
    ],
)
def test_a_malformed_prev_result_names_the_member(raw: Any, told: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        decode_prev_result({"prevResult": raw})
    assert caught.value.details.startswith(told)
