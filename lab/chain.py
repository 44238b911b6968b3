"""Runs a chain of CNI plugins as a container runtime does, by executing them.

Source: CNI specification 1.0.0, section "Executing plugins"; libcni's `api.go` for what a runtime passes.
"""

from __future__ import annotations

import json
import os
import string
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lab.layout import NAMESPACE, SOURCES, STANDARD_CNI, Lab, LabError
from lab.process import in_netns, which
from lab.state import Attachment

TIMEOUT = 60
"""Seconds that one plugin may take."""

POOLS: Mapping[str, tuple[list[str], list[str]]] = {
    "underlay": (["demo-v4"], ["demo-v6"]),
    "tiny": (["tiny-v4"], ["tiny-v6"]),
    "contested": (["contested-v4", "demo-v4"], ["contested-v6", "demo-v6"]),
    "dead-gateway-v4": (["dead-gateway-v4"], []),
    "dead-gateway-v6": ([], ["dead-gateway-v6"]),
}
"""The lab's networks: one chain, different pools to take addresses from (IPv4, IPv6), in order of preference."""


class ChainError(LabError):
    """A plugin refused; carries the CNI error object."""

    def __init__(self, plugin: str, error: Mapping[str, Any]) -> None:
        self.plugin = plugin
        self.code = int(error.get("code", 999))
        self.text = ": ".join(str(error[key]) for key in ("msg", "details") if error.get(key))
        super().__init__(f"{plugin} refused with code {self.code}: {self.text}")


def network(name: str) -> dict[str, Any]:
    """The network's configuration list, as it would lie in /etc/cni/net.d."""
    with open(f"{SOURCES}/lab/manifests/underlay.conflist") as file:
        template = string.Template(file.read())
    v4, v6 = POOLS[name]
    configuration: dict[str, Any] = json.loads(
        template.substitute(name=name, ipv4_pools=json.dumps(v4), ipv6_pools=json.dumps(v6))
    )
    return configuration


def _execute(
    lab: Lab, attachment: Attachment, command: str, plugin: str, configuration: Mapping[str, Any]
) -> dict[str, Any]:
    folders = [lab.cni_bin(attachment.node), STANDARD_CNI]
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": NAMESPACE,
        "K8S_POD_NAME": attachment.pod,
        "K8S_POD_INFRA_CONTAINER_ID": attachment.container_id,
        "K8S_POD_UID": attachment.uid,
    }
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns,
        "CNI_IFNAME": attachment.ifname,
        "CNI_PATH": os.pathsep.join(folders),
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in arguments.items()),
    }
    argv = [which(plugin, folders)]
    try:
        result = in_netns(
            lab.netns_path(attachment.node),
            lambda: subprocess.run(
                argv,
                input=json.dumps(configuration).encode(),
                env=environment,
                capture_output=True,
                timeout=TIMEOUT,
                check=False,
            ),
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"{plugin} {command} took longer than {TIMEOUT} s") from None
    try:
        body: dict[str, Any] = json.loads(result.stdout) if result.stdout.strip() else {}
    except ValueError:
        raise LabError(f"{plugin} {command} printed no JSON: {result.stdout[:400]!r}") from None
    if result.returncode:
        raise ChainError(plugin, body or {"msg": result.stderr.decode(errors="replace").strip()})
    return body


def _run(lab: Lab, attachment: Attachment, command: str, result: dict[str, Any]) -> dict[str, Any]:
    configuration = network(attachment.network)
    plugins = configuration["plugins"]
    for plugin in reversed(plugins) if command == "DEL" else plugins:
        stdin = {**plugin, "name": configuration["name"], "cniVersion": configuration["cniVersion"]}
        if result:
            stdin["prevResult"] = result
        body = _execute(lab, attachment, command, plugin["type"], stdin)
        if command == "ADD":
            result = body
    return result


def add(lab: Lab, attachment: Attachment) -> Attachment:
    """ADD through the chain; each plugin gets its predecessor's result. Raises ChainError, LabError."""
    return replace(attachment, result=_run(lab, attachment, "ADD", {}))


def delete(lab: Lab, attachment: Attachment) -> None:
    """DEL in reverse order, with the chain's final result, as libcni keeps it. Raises ChainError, LabError."""
    _run(lab, attachment, "DEL", attachment.result)


def check(lab: Lab, attachment: Attachment) -> None:
    """CHECK in order, with the chain's final result. Raises ChainError, LabError."""
    _run(lab, attachment, "CHECK", attachment.result)
