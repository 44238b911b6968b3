"""The node's CNI configuration: which network its pods have in the first place."""

from __future__ import annotations

import os

import msgspec

from controller.coordinator.networks import NotReadyError

_SUFFIXES = (".conf", ".conflist")
_MULTUS = "00-multus"
"""Part of the name of Multus' own configuration, which stands before the cluster's."""
_MOST = 1 << 20
"""Bytes of a configuration that are read; real ones have a few thousand."""


class _Configuration(msgspec.Struct):
    name: str = ""


_decode = msgspec.json.Decoder(_Configuration).decode


def first_name(directory: str) -> str | None:
    """`name` of the first CNI configuration by file name, Multus' own apart; None if there is none.

    Raises NotReadyError if the directory or that file cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise NotReadyError(f"the CNI configurations in {directory} cannot be listed: {error.strerror}") from error
    chosen = next((each for each in names if each.endswith(_SUFFIXES) and _MULTUS not in each), None)
    if chosen is None:
        return None
    path = os.path.join(directory, chosen)
    try:
        with open(path, "rb") as file:
            return _decode(file.read(_MOST)).name
    except OSError as error:
        raise NotReadyError(f"the CNI configuration {path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise NotReadyError(f"the CNI configuration {path} is malformed: {error}") from error
