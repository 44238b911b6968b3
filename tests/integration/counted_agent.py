"""The agent as it is shipped, which on SIGUSR1 also counts its objects.

OBJECTS=PATH python -m tests.integration.counted_agent …
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

from agent.__main__ import main


def count(*_: object) -> None:
    """Write down how many blocks Python's allocator has given out: exact, where resident memory is only roughly so."""
    gc.collect()
    path = Path(os.environ["OBJECTS"])
    unfinished = path.with_suffix(".new")
    unfinished.write_text(str(sys.getallocatedblocks()))
    unfinished.rename(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count)
    sys.exit(main())
