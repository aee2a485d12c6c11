"""What an engine counts, and the text of ``/metrics``: vLLM's names, as far as anything reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0, 960.0)


class Histogram:
    """Counts by upper bound."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """Since the instance started. Times in real seconds."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.external_queries = 0
        self.external_hits = 0
        self.bytes_pulled = 0.0
        self.pulls = 0
        self.failed_pulls = 0
        self.expired = 0
        self.late_notifications = 0
        self.poisoned = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0}
        self.ttft_s = Histogram()
        self.tpot_s = Histogram()
        self.e2e_s = Histogram()


class Page:
    """Prometheus text format 0.0.4, every sample with the same labels first."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = ",".join(f'{k}="{v}"' for k, v in labels.items())
        self._lines: list[str] = []

    def add(self, name: str, kind: str, value: float, labels: str = "", suffix: str = "") -> None:
        """One sample; the type line comes before the first one of a name."""
        head = f"# TYPE {name} {kind}"
        if head not in self._lines:
            self._lines.append(head)
        extra = f",{labels}" if labels else ""
        self._lines.append(f"{name}{suffix}{{{self._labels}{extra}}} {float(value)!r}")

    def histogram(self, name: str, found: Histogram) -> None:
        """All samples of a histogram."""
        seen = 0
        for bound, count in zip([*found.bounds, float("inf")], found.counts, strict=True):
            seen += count
            edge = "+Inf" if bound == float("inf") else repr(bound)
            self.add(name, "histogram", seen, f'le="{edge}"', "_bucket")
        self.add(name, "histogram", seen, suffix="_count")
        self.add(name, "histogram", found.total, suffix="_sum")

    def text(self) -> bytes:
        """The page."""
        return ("\n".join(self._lines) + "\n").encode()
