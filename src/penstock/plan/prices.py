"""Rental prices of accelerators, where a source was at hand; any other is given by the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from penstock.core.errors import PenstockError
from penstock.perf.hardware import hardware_spec

SOURCE = "middle of the on-demand range of specialised clouds, May 2026 (mercatus-ai.com, cloud GPU pricing)"
USD_PER_GPU_HOUR: Mapping[str, float] = {"a100-80g": 1.30, "h100": 3.00, "h200": 4.00}
"""US dollars an hour and GPU, on demand. Prices of one GPU differ by a factor of 2.5 and more between clouds
(``SOURCE``); others have no default."""


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """``["h100=2.5", "3"]`` as US dollars a GPU-hour by hardware; a bare number is for all (under the name ``*``).

    Raises PenstockError for another form, an unknown hardware, or a price that is not above 0.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, equals, price = text.rpartition("=")
        try:
            value = float(price)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise PenstockError(f"price {text!r} cannot be read", "write --price h100=2.5, in US dollars a GPU-hour")
        found[hardware_spec(name).name if equals else "*"] = value
    return found


def price_of(hardware: str | None, given: Mapping[str, float]) -> float | None:
    """US dollars an hour of one GPU: as given, else the default, else None. ``hardware`` None: a benchmark's own."""
    if hardware is not None and hardware in given:
        return given[hardware]
    if "*" in given:
        return given["*"]
    return USD_PER_GPU_HOUR.get(hardware) if hardware is not None else None
