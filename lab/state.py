"""What a lab has started, as a file; and the lock that lets one command at a time work on a lab."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from lab.layout import Lab, LabError
from lab.process import Started


@dataclass(frozen=True, slots=True)
class Attachment:
    """One pod on one network, as its runtime remembers it."""

    pod: str
    node: str
    network: str
    container_id: str
    uid: str
    netns: str
    """Path, as CNI_NETNS has it."""
    ifname: str = "eth0"
    result: dict[str, Any] = field(default_factory=dict)
    """The chain's result; empty while it is not attached."""

    def addresses(self) -> list[str]:
        """Its addresses without prefix length, IPv4 first."""
        found = [str(ip["address"]).partition("/")[0] for ip in self.result.get("ips", ())]
        return sorted(found, key=lambda address: ":" in address)


class State:
    """The record of one lab, written as a whole at each change, so that it is never half written."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.processes: dict[str, Started] = {}
        self.attachments: dict[str, Attachment] = {}
        self.complete = False
        """Whether `up` came to its end."""
        self._lock = threading.Lock()

    @property
    def _path(self) -> str:
        return f"{self.lab.state}/lab.json"

    @classmethod
    def load(cls, lab: Lab) -> State:
        """The record as it is; empty if there is none."""
        state = cls(lab)
        try:
            with open(state._path) as file:
                content = json.load(file)
        except FileNotFoundError:
            return state
        state.complete = content["complete"]
        state.processes = {name: Started(*process) for name, process in content["processes"].items()}
        state.attachments = {name: Attachment(**attachment) for name, attachment in content["attachments"].items()}
        return state

    def _save(self) -> None:
        content = {
            "complete": self.complete,
            "processes": self.processes,
            "attachments": {name: asdict(attachment) for name, attachment in self.attachments.items()},
        }
        with open(f"{self._path}.tmp", "w") as file:
            json.dump(content, file, indent=1)
        os.rename(f"{self._path}.tmp", self._path)

    def finish(self) -> None:
        """Write down that the lab is complete."""
        with self._lock:
            self.complete = True
            self._save()

    def add_process(self, name: str, process: Started) -> None:
        """Remember a process under its name, in place of one that had it before."""
        with self._lock:
            self.processes[name] = process
            self._save()

    def remove_process(self, name: str) -> None:
        """Forget a process that has ended."""
        with self._lock:
            self.processes.pop(name, None)
            self._save()

    def put(self, attachment: Attachment) -> None:
        """Remember an attachment as it is now."""
        with self._lock:
            self.attachments[attachment.pod] = attachment
            self._save()

    def drop(self, pod: str) -> None:
        """Forget a pod."""
        with self._lock:
            self.attachments.pop(pod, None)
            self._save()


@contextlib.contextmanager
def locked(lab: Lab) -> Iterator[None]:
    """Work alone on an existing lab. Raises LabError if somebody else does."""
    folder = os.open(lab.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(f"another spiderpool-lab command is at work on lab {lab.name!r}") from None
        yield
    finally:
        os.close(folder)
