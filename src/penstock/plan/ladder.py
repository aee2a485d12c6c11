"""A decode ladder: measured TPOT by batch size, and the batch and throughput that a TPOT target allows.

Nothing is extrapolated: a target outside the measured range is an error that says which batches to measure.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from penstock.core.errors import PenstockError
from penstock.perf.lookup import unknown_name
from penstock.report.columns import number, seconds
from penstock.workload.trace import F64

FITS = ("quadratic", "linear")
"""How throughput at a TPOT target is read off: ``quadratic`` is the degree-2 least-squares fit of throughput against
TPOT of arXiv 2603.04716's demo script, ``linear`` interpolates the batch between two rungs."""
COLUMNS = ("batch", "tpot_s")


@dataclass(frozen=True)
class Ladder:
    """TPOT in seconds at ascending batch sizes, both ascending; at least two rungs."""

    batch: tuple[float, ...]
    tpot_s: tuple[float, ...]
    source: str = "the ladder"

    def __post_init__(self) -> None:
        if len(self.batch) != len(self.tpot_s) or len(self.batch) < 2:
            raise PenstockError(f"{self.source} has {len(self.batch)} rungs", "give two or more rows of batch, tpot_s")
        if not all(0 < x < float("inf") for x in (*self.batch, *self.tpot_s)):
            raise PenstockError(f"{self.source} has a batch or TPOT that is not above 0", "give positive numbers")
        for i in range(1, len(self.batch)):
            if self.batch[i] <= self.batch[i - 1]:
                raise PenstockError(f"{self.source} has batch {self.batch[i]:g} twice", "give each batch once")
            if self.tpot_s[i] <= self.tpot_s[i - 1]:
                raise PenstockError(
                    f"{self.source}: TPOT does not rise from batch {self.batch[i - 1]:g} to {self.batch[i]:g}",
                    "measure longer, or leave one of the two out",
                )

    @property
    def throughput(self) -> F64:
        """Output tokens/s at each rung, float64[n]."""
        found: F64 = np.array(self.batch) / np.array(self.tpot_s)
        return found

    def check_range(self, tpot_s: float) -> None:
        """Raises PenstockError for a TPOT below the lowest or above the highest rung."""
        low, high = self.tpot_s[0], self.tpot_s[-1]
        if tpot_s < low * (1 - 1e-12):
            raise PenstockError(
                f"TPOT {seconds(tpot_s)} is below the lowest of {self.source} ({seconds(low)} at batch "
                f"{self.batch[0]:g})",
                f"raise --tpot to ≥ {low:.6g}, or measure smaller batches",
            )
        if tpot_s > high * (1 + 1e-12):
            raise PenstockError(
                f"TPOT {seconds(tpot_s)} is above the highest of {self.source} ({seconds(high)} at batch "
                f"{self.batch[-1]:g})",
                f"measure larger batches, or plan with --tpot {high:.6g}",
            )

    def batch_at(self, tpot_s: float) -> float:
        """Batch at a TPOT, linear between rungs. Raises PenstockError outside the measured range."""
        self.check_range(tpot_s)
        return float(np.interp(tpot_s, self.tpot_s, self.batch))

    def tpot_at(self, batch: float) -> float | None:
        """TPOT at a batch, linear between rungs; None outside the measured range."""
        if not self.batch[0] <= batch <= self.batch[-1]:
            return None
        return float(np.interp(batch, self.batch, self.tpot_s))

    def throughput_at(self, tpot_s: float, fit: str) -> float:
        """Output tokens/s of one instance at a TPOT target, by one of ``FITS``.

        Raises PenstockError outside the measured range and for an unknown fit.
        """
        self.check_range(tpot_s)
        if fit == "linear":
            return self.batch_at(tpot_s) / tpot_s
        if fit != "quadratic":
            raise unknown_name("ladder fit", fit, list(FITS))
        return float(np.polyval(self.quadratic, 1e3 * tpot_s))

    @cached_property
    def quadratic(self) -> F64:
        """Coefficients of the degree-2 fit of throughput against TPOT in MILLISECONDS, highest power first."""
        if len(self.batch) < 3:
            raise PenstockError(f"{self.source} has two rungs", "a quadratic fit needs three: give --ladder-fit linear")
        fitted: F64 = np.polyfit(1e3 * np.array(self.tpot_s), self.throughput, 2)
        return fitted

    def fit_error(self, fit: str) -> float:
        """Mean relative error of the fit at the rungs; ``linear`` predicts each inner rung from its neighbours."""
        truth = self.throughput
        if fit == "quadratic":
            return float(np.mean(np.abs(np.polyval(self.quadratic, 1e3 * np.array(self.tpot_s)) / truth - 1)))
        if len(self.batch) < 3:
            return 0.0
        errors = []
        for i in range(1, len(self.batch) - 1):
            left = tuple(x for j, x in enumerate(self.batch) if j != i)
            right = tuple(x for j, x in enumerate(self.tpot_s) if j != i)
            errors.append(abs(float(np.interp(self.tpot_s[i], right, left)) / self.batch[i] - 1))
        return float(np.mean(errors))

    def slower(self, factor: float) -> Ladder:
        """The same with every TPOT times ``factor``."""
        return Ladder(self.batch, tuple(factor * x for x in self.tpot_s), self.source)

    def described(self) -> str:
        """``6 rungs, batch 10 to 60, TPOT 12.8 ms to 26.2 ms``."""
        return (
            f"{len(self.batch)} rungs, batch {number(self.batch[0])} to {number(self.batch[-1])}, TPOT "
            f"{seconds(self.tpot_s[0])} to {seconds(self.tpot_s[-1])}"
        )


def read_ladder(path: str) -> Ladder:
    """A ladder from a CSV file with the columns ``batch`` and ``tpot_s`` (seconds), in any order of rows.

    Raises PenstockError naming the file, the line and what is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise PenstockError(f"cannot read {path} ({reason})", "give a CSV with the columns batch,tpot_s") from None
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
    if missing:
        raise PenstockError(f"{path} has no column {missing[0]!r}", "head it batch,tpot_s (TPOT in seconds)")
    found: list[tuple[float, float]] = []
    for line, row in enumerate(rows, start=2):
        try:
            found.append((float(row["batch"]), float(row["tpot_s"])))
        except (TypeError, ValueError):
            raise PenstockError(
                f"{path}:{line}: {row['batch']!r}, {row['tpot_s']!r} are not two numbers", "give batch and seconds"
            ) from None
    found.sort()
    return Ladder(tuple(b for b, _ in found), tuple(t for _, t in found), path)
