"""When the frames of one question are sent and when silence counts; what settings are refused."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

import pytest

from plugins.coordinator.probe.session import Question
from plugins.coordinator.probe.settings import ProbeSettings


def times(frames: int, wait: float, delays: list[float]) -> list[float]:
    """When each frame is sent, and when the question ends, if step n happens `delays[n]` late."""

    async def steps() -> list[float]:
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        question = Question(IPv4Address("192.0.2.7"), frames, wait, 10.0, True, answer)
        now = 10.0
        result = []
        for delay in [*delays, *[0.0] * (frames + 1 - len(delays))]:
            now += delay
            result.append(round(now - 10.0, 6))
            if question.sent == frames:
                break
            question.sent += 1
            now = question.next_step(now)
        return result

    return asyncio.run(steps())


def test_frames_fill_the_first_half_and_the_wait_is_exact() -> None:
    assert times(3, 0.1, []) == [0, 0.025, 0.05, 0.1]
    assert times(1, 0.1, []) == [0, 0.1]
    assert times(5, 0.4, []) == [0, 0.05, 0.1, 0.15, 0.2, 0.4]


def test_a_late_frame_does_not_delay_the_end_within_reason() -> None:
    assert times(3, 0.1, [0.03]) == [0.03, 0.0425, 0.055, 0.1]
    assert times(3, 0.1, [0.0, 0.0, 0.02]) == [0, 0.025, 0.07, 0.1]


def test_a_very_late_frame_is_listened_after_all_the_same() -> None:
    assert times(3, 0.1, [0.2]) == [0.2, 0.2125, 0.225, 0.25]
    assert times(3, 0.1, [0.0, 0.0, 0.1]) == [0, 0.025, 0.15, 0.175]
    assert times(1, 0.1, [0.5]) == [0.5, 0.55]


@pytest.mark.parametrize("field", ["wait", "gateway_wait", "up_wait", "frames", "gateway_frames", "nics"])
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_make_no_sense(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value}"):
        ProbeSettings(**{field: value})
