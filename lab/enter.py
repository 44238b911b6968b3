"""Enter a cgroup, then become another program: `python -I -S enter.py CGROUP_PROCS PROGRAM [ARGUMENT…]`.

A process must be in its cgroup before it does anything: what it opens or starts earlier belongs to the old one. Being
started in a cgroup also makes every process of a lab findable, whatever became of who started it.
"""

import os
import sys

with open(sys.argv[1], "w") as procs:
    procs.write("0")
os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - becoming the program is the point
