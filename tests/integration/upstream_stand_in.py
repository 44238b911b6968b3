"""A client of upstream's HTTP API, for requests that its executables do not send by themselves, or never would.

It speaks as they do: HTTP/1.1 over the Unix socket, bodies chunked (go-openapi encodes them into a pipe and so knows no
length), also with GET; the health check first; refusal of an answer that lacks a required member.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
from dataclasses import dataclass
from typing import Any

MAC = re.compile(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")


class RefusedError(Exception):
    """What the executable would print as its error."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=100)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(100)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class StandIn:
    """One pod's NIC and the socket."""

    socket: str
    container: str
    ifname: str
    netns: str
    pod: str
    uid: str
    namespace: str = "ns"

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body; None for none."""
        connection = _Connection(self.socket)
        try:
            headers = {"Accept": "application/json", "User-Agent": "Go-http-client/1.1"}
            if body is None:
                connection.request(method, f"/v1{path}", headers=headers)
            else:
                headers["Content-Type"] = "application/json"
                text = json.dumps(body).encode() + b"\n"
                connection.request(method, f"/v1{path}", iter([text]), headers, encode_chunked=True)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if content else None
        finally:
            connection.close()

    def add(self, **members: Any) -> dict[str, Any]:
        """The CNI result's ips and routes, as the executable takes them out of the answer. Raises RefusedError."""
        self._check_health()
        status, answer = self.request("POST", "/ipam/ip", self.names() | {"netNamespace": self.netns} | members)
        if status != 200:
            raise RefusedError(f"spiderpool IP allocation error: [{status}] {answer}")
        for ip in answer["ips"]:
            if not {"version", "address", "nic"} <= ip.keys() or ip["version"] not in (4, 6):
                raise RefusedError(f"invalid reply: {ip}")
            if "mac" in ip and not MAC.fullmatch(ip["mac"]):
                raise RefusedError(f"invalid MAC: {ip}")
            if ip["enableIPConflictDetection"] or ip["enableGatewayDetection"]:
                raise RefusedError("it would probe a second time")
        ips = [ip for ip in answer["ips"] if ip["nic"] == self.ifname]
        if not ips:
            raise RefusedError(f"no Interface {self.ifname} IP allocation found")
        routes = [route for route in answer.get("routes") or () if route["ifName"] == self.ifname]
        return {"ips": ips, "routes": [{"dst": route["dst"], "gw": route["gw"]} for route in routes]}

    def delete(self) -> tuple[int, Any]:
        """What the agent answers; the executable only logs a refusal. Raises RefusedError."""
        self._check_health()
        return self.request("DELETE", "/ipam/ip", self.names())

    def release(self, **members: Any) -> tuple[int, Any]:
        """What the executable sends when it has found a conflict by itself."""
        names = self.names()
        del names["ifName"]
        return self.request("DELETE", "/ipam/ips", names | members)

    def names(self) -> dict[str, Any]:
        """The members that every request has."""
        return {
            "containerID": self.container,
            "ifName": self.ifname,
            "podNamespace": self.namespace,
            "podName": self.pod,
            "podUID": self.uid,
        }

    def _check_health(self) -> None:
        if self.request("GET", "/ipam/healthy")[0] != 200:
            raise RefusedError("unhealthy spiderpool-agent backend")
