"""The dataplane's programs on this kernel: compiled without its headers, accepted by its verifier, at work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.dataplane import bpf
from agent.dataplane.hooks import HOOKS
from tests.integration.dataplane_node import FOUR, SIX, VIP4, VIP6, Node, backends, frontend

COMPILING = 240
"""Seconds; on a real processor it is one."""
CONNECT = """
answers = {}
for vip in A["vips"]:
    s = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET)
    s.connect((vip, 80))
    s.send(b"x")
    answers[vip] = [s.recv(100).decode(), s.getpeername()[0]]
print(json.dumps(answers))
"""


@pytest.mark.timeout(COMPILING + 60)
def test_all_programs_are_attached_and_reach_backends(tmp_path: Path) -> None:
    with Node(str(tmp_path)) as node:
        node.serve(FOUR[0], SIX[0])
        told = node.load(timeout=COMPILING)
        assert (told["programs"], told["attached"]) == ("loaded", True), told
        cgroup = os.open(node.cgroup, os.O_RDONLY)
        try:
            for hook in HOOKS:
                assert len(bpf.query(cgroup, hook.attach_type).programs) == 1, hook.name
        finally:
            os.close(cgroup)
        with node.tables() as tables:
            tables.program({frontend(VIP4, 80): backends(FOUR[0]), frontend(VIP6, 80): backends(SIX[0])})
            assert node.ask(CONNECT, vips=[VIP4, VIP6]) == {VIP4: [FOUR[0], VIP4], VIP6: [SIX[0], VIP6]}
