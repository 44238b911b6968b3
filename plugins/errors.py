"""All errors that a CNI caller can see: one tree, one sentence each, code on the class.

Codes 1-99 are the CNI specification's (section "Error"), 100 and up are ours. `http` is the status that the
agent's HTTP API gives for the same failure.
"""

from __future__ import annotations

from typing import ClassVar


class CniError(Exception):
    """A failure with a CNI error code. `msg` is one sentence, `details` tells what, where and what is allowed."""

    code: ClassVar[int] = 199
    http: ClassVar[int] = 500

    def __init__(self, msg: str, details: str = "") -> None:
        super().__init__(msg if not details else f"{msg}: {details}")
        self.msg = msg
        self.details = details


class IncompatibleVersionError(CniError):
    """The configuration's cniVersion is not one of ours."""

    code = 1


class UnsupportedFieldError(CniError):
    """A member of the network configuration has a value that is not supported."""

    code = 2


class UnknownContainerError(CniError):
    """The container is not known or does not exist; the runtime need not clean up."""

    code = 3


class InvalidEnvironmentError(CniError):
    """A CNI_* variable is missing or malformed; the message names it."""

    code = 4


class IOFailureError(CniError):
    """The kernel or the file system refused."""

    code = 5


class DecodeError(CniError):
    """Standard input is not the JSON it should be."""

    code = 6


class InvalidConfigError(CniError):
    """The network configuration is well-formed and wrong; details hold the field path."""

    code = 7


class TryAgainLaterError(CniError):
    """A transient condition: the runtime should retry."""

    code = 11


class NotAvailableError(CniError):
    """STATUS: an ADD would fail now."""

    code = 50


class NoPoolError(CniError):
    """No pool may serve this NIC; details name each candidate and why it was passed over."""

    code = 100


class ExhaustedError(CniError):
    """The candidate pools have no free address; details name each pool and its state."""

    code = 101


class AddressConflictError(CniError):
    """Somebody else on the network uses the address."""

    code = 102


class GatewayUnreachableError(CniError):
    """The pool's gateway does not answer."""

    code = 103


class WiringError(CniError):
    """The kernel refused a link, address, route, rule or neighbour."""

    code = 104


class CheckFailedError(CniError):
    """CHECK found that the attachment is not as ADD left it; details name the difference."""

    code = 105


class PodGoneError(CniError):
    """The pod that is to get addresses is not in the API, is another one of the same name, or has ended."""

    code = 106


class ProviderError(CniError):
    """The infrastructure provider cannot be asked, or refuses."""

    code = 107


class InternalError(CniError):
    """A fault of ours; the log has the trace."""

    code = 199
