"""A trace: requests as columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.core.types import Slo

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class PrefixHashes:
    """Hashes of leading prompt blocks, ragged: request ``i`` owns ``values[offsets[i]:offsets[i + 1]]``.

    One hash stands for ``block_tokens`` tokens; equal hashes at equal positions mean equal leading text.
    """

    values: I64
    offsets: I64
    block_tokens: int

    def of(self, i: int) -> tuple[int, ...]:
        """Hashes of request ``i``."""
        return tuple(self.values[self.offsets[i] : self.offsets[i + 1]].tolist())

    def take(self, rows: I64) -> PrefixHashes:
        """The same for the given rows, in the given order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Position of each kept hash: its place within its request, plus where that request started.
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return PrefixHashes(self.values[source], offsets, self.block_tokens)


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes
    ----------
    arrival_s : float64[n]
        Seconds since the start of the trace, ascending, from 0.
    prompt_tokens, output_tokens : int64[n]
        At least 1 each.
    slo_class : int16[n]
        Index into ``class_names``.
    class_slos : dict of class name to Slo
        Targets that the source gives some of its classes; who runs the trace may give others.
    prefixes : PrefixHashes or None
        Where the source has prefix hashes.
    prompts : tuple of str, or None
        The prompts' texts, where the source has them.
    source : str
        Where it came from: a path, or a synthetic description.
    notes : tuple of str
        What the reader changed (rows sorted, zero outputs skipped and how many): nothing is dropped silently.
    """

    arrival_s: F64
    prompt_tokens: I64
    output_tokens: I64
    slo_class: NDArray[np.int16]
    class_names: tuple[str, ...] = ("default",)
    prefixes: PrefixHashes | None = None
    prompts: tuple[str, ...] | None = None
    source: str = ""
    notes: tuple[str, ...] = field(default=())
    class_slos: dict[str, Slo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        if not (len(self.prompt_tokens) == len(self.output_tokens) == len(self.slo_class) == n):
            raise ValueError("trace columns differ in length")
        if self.prompts is not None and len(self.prompts) != n:
            raise ValueError("not every request has a prompt")
        if n == 0:
            raise PenstockError(f"trace {self.source or '(synthetic)'} holds no request", "give a trace with rows")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ValueError("prompt and output lengths must be at least one token")
        if np.any(np.diff(self.arrival_s) < 0):
            raise ValueError("arrivals must ascend")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate, requests per second (0 for a single instant)."""
        return (len(self) - 1) / self.duration_s if self.duration_s > 0 else 0.0

    def rescaled(self, rate_rps: float) -> Trace:
        """The same requests in the same pattern, with timestamps multiplied so that the mean rate is ``rate_rps``.

        This is how Arrow and others sweep the rate of a recorded trace (Arrow v2, section 6).
        """
        if rate_rps <= 0:
            raise PenstockError(f"rate {rate_rps:g} requests/s is not positive", "give a rate above 0")
        if self.duration_s == 0:
            raise PenstockError("all requests of the trace arrive at once", "give a trace that spans some time")
        return replace(self, arrival_s=self.arrival_s * (self.rate_rps / rate_rps))

    def select(self, rows: I64) -> Trace:
        """The given rows (ascending), with arrivals shifted to start at 0."""
        if len(rows) == 0:
            raise PenstockError(f"the slice of {self.source or 'the trace'} holds no request", "widen the slice")
        arrival = self.arrival_s[rows]
        return replace(
            self,
            arrival_s=arrival - arrival[0],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            slo_class=self.slo_class[rows],
            prefixes=self.prefixes.take(rows) if self.prefixes is not None else None,
            prompts=tuple(self.prompts[row] for row in rows.tolist()) if self.prompts is not None else None,
        )

    def head(self, n: int) -> Trace:
        """The first ``n`` requests."""
        return self.select(np.arange(min(n, len(self)), dtype=np.int64))

    def between(self, start_s: float, stop_s: float) -> Trace:
        """Requests with ``start_s <= arrival < stop_s``."""
        return self.select(np.flatnonzero((self.arrival_s >= start_s) & (self.arrival_s < stop_s)))
