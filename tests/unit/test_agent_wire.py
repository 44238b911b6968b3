"""Frames of the protocol between executable and agent."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.wire import (
    HEADER,
    MAX_ENV,
    MAX_STDIN,
    FrameError,
    Request,
    Status,
    decode_env,
    decode_frame,
    encode_frame,
    encode_reply,
)
from plugins.errors import InvalidEnvironmentError

names = st.text(st.characters(exclude_characters="=\0", codec="utf-8"), min_size=1, max_size=20)
texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=50)


@given(env=st.dictionaries(names, texts, max_size=5), stdin=st.binary(max_size=200))
def test_what_is_encoded_is_decoded(env: dict[str, str], stdin: bytes) -> None:
    request = decode_frame(encode_frame(env, stdin))
    assert (decode_env(request.env), request.stdin) == (env, stdin)


@given(frame=st.binary(max_size=100))
def test_any_bytes_decode_or_are_refused(frame: bytes) -> None:
    try:
        request = decode_frame(frame)
    except FrameError:
        return
    assert len(frame) == HEADER.size + len(request.env) + len(request.stdin)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"SPD1" + bytes(7),
        b"SPD2" + bytes(8),
        b"SPD1" + struct.pack("!II", MAX_ENV + 1, 0) + bytes(MAX_ENV + 1),
        b"SPD1" + struct.pack("!II", 0, MAX_STDIN + 1) + bytes(MAX_STDIN + 1),
        b"SPD1" + struct.pack("!II", 1, 1) + b"x",
        b"SPD1" + struct.pack("!II", 1, 1) + b"xyz",
    ],
)
def test_frames_that_are_not_whole_or_too_large(frame: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(frame)


def test_the_largest_frame() -> None:
    frame = HEADER.pack(b"SPD1", MAX_ENV, MAX_STDIN) + bytes(MAX_ENV + MAX_STDIN)
    assert decode_frame(frame) == Request(bytes(MAX_ENV), bytes(MAX_STDIN))


def test_values_may_hold_the_separator() -> None:
    assert decode_env(b"CNI_ARGS=a=b;c=d\0X=\0nonsense\0") == {"CNI_ARGS": "a=b;c=d", "X": ""}


def test_a_variable_that_is_not_text_is_named() -> None:
    with pytest.raises(InvalidEnvironmentError, match="CNI_ARGS is not UTF-8"):
        decode_env(b"CNI_COMMAND=ADD\0CNI_ARGS=\xff\0")


def test_replies() -> None:
    assert encode_reply(Status.STOPPING, b"body") == b"SPD1\0\0\0\x4c\0\0\0\x04body"
