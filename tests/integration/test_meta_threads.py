"""Kinds are decoded in several threads from the start: SQLite's reader and writer are threads of their own."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.installation import ROOT

STARTS = 12
"""Each would crash in two of five cases."""
PROGRAM = """
import sys, threading
sys.setswitchinterval(1e-6)
from api import meta
from api.claim import Claim
from api.endpoint import Endpoint
from api.pool import Pool

together = threading.Barrier(4)
claim = b'{"metadata":{"name":"a"},"spec":{"address":"1","ipVersion":4,"pool":"p","workload":{"name":"x"}}}'

def work(kind, data):
    together.wait()
    meta.decode(kind, data)

pool, endpoint = b'{"metadata":{"name":"a"},"spec":{"subnet":"1"}}', b'{"metadata":{"name":"a"}}'
told = (Claim, claim), (Pool, pool), (Endpoint, endpoint), (Claim, claim)
threads = [threading.Thread(target=work, args=each) for each in told]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_the_first_objects_may_come_at_the_same_moment() -> None:
    starts = [subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT) for _ in range(STARTS)]
    assert [process.wait(60) for process in starts] == [0] * STARTS
