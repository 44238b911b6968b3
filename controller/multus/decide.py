"""What is to be done about one NetworkAttachmentDefinition. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from api.apps import controller_of
from api.meta import OwnerReference
from api.multusconfig import MultusConfig
from api.nad import NetworkAttachmentDefinition
from api.netconf import network_of
from api.validate.fields import FieldError
from api.validate.multusconfig import spec_problems
from api.validate.multusdefaults import default_multus_config


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write, and whom to tell what."""

    config: MultusConfig | None = None
    """Whose definition it is; None if nobody wants it."""
    write: NetworkAttachmentDefinition | None = None
    """What is to be created (no uid) or updated; None if it is right as it is, or cannot be made right now."""
    problems: tuple[FieldError, ...] = ()
    """Why `config` cannot be made into a definition."""
    losers: tuple[MultusConfig, ...] = ()
    """Who wants it too, and does not get it."""


def decide(wanting: Iterable[MultusConfig], existing: NetworkAttachmentDefinition | None) -> Decision:
    """What to do about a definition that the configurations `wanting` name; `existing` is what there is of it.

    Who owns it already keeps it, else the oldest gets it, so that two that want the same do not take it from each
    other. One that is going away is waited for: its successor is created when it is gone. A terminating configuration
    wants nothing: the garbage collector removes its definition.
    """
    alive = [each for each in wanting if each.metadata.deletion_timestamp is None]
    if not alive:
        return Decision()
    owner = controller_of(existing.metadata) if existing is not None else None
    ranked = sorted(alive, key=lambda each: (not _owns(each, owner), *_age(each)))
    chosen, losers = ranked[0], tuple(ranked[1:])
    config = default_multus_config(chosen)
    problems = tuple(spec_problems(config))
    if problems:
        return Decision(chosen, None, problems, losers)
    wanted = network_of(config)
    if existing is None:
        return Decision(chosen, wanted, (), losers)
    if existing.metadata.deletion_timestamp is not None:
        return Decision(chosen, None, (), losers)
    metadata = replace(
        existing.metadata,
        annotations=wanted.metadata.annotations,
        owner_references=wanted.metadata.owner_references,
    )
    repaired = replace(existing, metadata=metadata, spec=wanted.spec)
    return Decision(chosen, None if repaired == existing else repaired, (), losers)


def _owns(config: MultusConfig, owner: OwnerReference | None) -> bool:
    return owner is not None and owner.uid == config.metadata.uid


def _age(config: MultusConfig) -> tuple[float, str]:
    created = config.metadata.creation_timestamp
    return created.timestamp() if created else 0.0, config.metadata.uid
