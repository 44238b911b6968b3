"""Structured logs: one JSON object a line on standard error, with the running CNI call's names on each line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final

import msgspec

CALL: ContextVar[Mapping[str, str]] = ContextVar("CALL", default={})  # noqa: B039 (never changed in place)
"""Members that each log line of the running call gets: pod, container, command and so on."""

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}
"""Names of levels, upstream's among them."""

_encoder = msgspec.json.Encoder(enc_hook=repr)
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
"""Attributes that every record has; what a log call gives as `extra` is beside them."""


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, what the log call gave as `extra`, the CNI call's members, and a trace."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in record.__dict__.items() if name not in _STANDARD},
            **CALL.get(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        try:
            return _encoder.encode(line).decode()
        except UnicodeEncodeError:  # a file's name, for one, need not be UTF-8
            plain = {key: str(value).encode(errors="backslashreplace").decode() for key, value in line.items()}
            return _encoder.encode(plain).decode()


def configure(level: str) -> None:
    """Send everything of at least `level` (a name of `LEVELS`, in any case) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=LEVELS[level.lower()], handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
