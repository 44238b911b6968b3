"""Values of settings that make no sense are refused where they are read."""

from __future__ import annotations

import math


def at_least(limit: float, **values: float) -> None:
    """Raise ValueError for the first of the settings that is below `limit`, infinite or not a number."""
    for name, value in values.items():
        if not (value >= limit and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be at least {limit}")
