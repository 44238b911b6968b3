"""What a store may refuse; the tree follows the reasons of metav1.Status."""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything a store raises on purpose."""


class NotFoundError(StoreError):
    """There is no such object (404)."""


class AlreadyExistsError(StoreError):
    """An object of that name exists (409, AlreadyExists)."""


class ConflictError(StoreError):
    """The object is not the one, or no longer in the version, that the caller named (409, Conflict)."""


class InvalidError(StoreError):
    """The object breaks the store's rules for names, labels or metadata, or a validator's (422)."""


class ForbiddenError(StoreError):
    """The store's authority does not allow this caller to do that; the text says which permission is missing (403)."""


class ExpiredError(StoreError):
    """The resourceVersion to watch from is too old: list again (410)."""


class UnavailableError(StoreError):
    """The store cannot be reached or is overloaded; nothing was written."""


class NotServedError(UnavailableError):
    """The store's authority does not know the kind, or not yet: who installs its definition makes it work (404)."""


class UncertainError(StoreError):
    """The answer was lost: the write may or may not have happened. Read back before deciding."""
