"""Log lines: one JSON object each, with everything that was said."""

from __future__ import annotations

import json
import logging
from typing import Any

from daemon.logs import CALL, JsonFormatter


def line(message: str, *args: object, **extra: object) -> dict[str, Any]:
    record = logging.getLogger("room").makeRecord("room", logging.INFO, "f", 1, message, args, None, extra=extra)
    result = json.loads(JsonFormatter().format(record))
    assert isinstance(result, dict)
    return result


def test_a_line_has_what_the_log_call_and_the_cni_call_gave() -> None:
    token = CALL.set({"pod": "ns/a"})
    try:
        told = line("lost %s", "veth0", error="no such device", links=["a", "b"])
    finally:
        CALL.reset(token)
    del told["time"]
    assert told == {
        "level": "info",
        "logger": "room",
        "message": "lost veth0",
        "error": "no such device",
        "links": ["a", "b"],
        "pod": "ns/a",
    }


def test_what_is_no_text_is_written_all_the_same() -> None:
    assert line("moved %s", "\udcff.call", error=OSError("gone"))["message"] == "moved \\udcff.call"
    assert line("moved", error=OSError("gone"))["error"] == "OSError('gone')"
