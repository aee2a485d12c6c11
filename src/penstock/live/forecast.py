"""What engines predict about a request, while it runs and once its true length is known."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from penstock.core.events import NO_PREDICTION
from penstock.live.histogram import Histogram

ERROR_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0)
GENERATED_FROM = (0, 32, 128, 512, 2048, 8192)
"""Errors are told apart by how many tokens had been generated: from so many on."""
KEPT = 512
"""Predictions remembered of one request."""


class Forecast:
    """The predictions about one request. ``rows`` are (tokens generated, quantiles of what remains)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, tuple[float, ...]]] = []
        self.levels: tuple[float, ...] = ()
        self.median = -1
        self._at = -1
        self._left = 0.0

    def take(self, at: int, remaining: tuple[float, ...], median: int, levels: tuple[float, ...]) -> None:
        """A prediction made when the request had ``at`` output tokens; ``median`` is the place of that quantile."""
        if at < self._at or median < 0:
            return
        if levels != self.levels:  # another engine with another predictor
            self.rows.clear()
            self.levels, self.median = levels, median
        self._at, self._left = at, remaining[median]
        if len(self.rows) < KEPT:
            self.rows.append((at, remaining))

    def remaining(self, generated: int, limit: int) -> float:
        """The latest prediction less what has come since, at least a token, at most up to ``limit`` output tokens;
        NO_PREDICTION where there is none.
        """
        if self._at < 0:
            return NO_PREDICTION
        left = max(self._left - (generated - self._at), 1.0)
        return min(left, max(float(limit - generated), 1.0))


class Forecasts:
    """How good the predictions about finished requests were.

    Kept apart by how a request ended: ``stop`` is its own end, which predictors predict; ``length`` is a limit, of
    which a predictor of natural ends knows nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self.errors: dict[tuple[str, int], Histogram] = {}
        self.covered: Counter[tuple[str, float]] = Counter()
        self.judged: Counter[tuple[str, float]] = Counter()

    def finished(self, forecast: Forecast, generated: int, finish: str) -> None:
        """A request has ended by ``finish`` with ``generated`` output tokens."""
        for at, remaining in forecast.rows:
            true = generated - at
            if true < 0:
                continue
            start = GENERATED_FROM[bisect_right(GENERATED_FROM, at) - 1]
            histogram = self.errors.setdefault((finish, start), Histogram(ERROR_BOUNDS))
            histogram.add(abs(remaining[forecast.median] - true))
            for level, value in zip(forecast.levels, remaining, strict=True):
                self.judged[finish, level] += 1
                self.covered[finish, level] += true <= value

    def coverage(self, finish: str) -> dict[float, float]:
        """By quantile level: the share of predictions that the truth did not exceed."""
        return {k[1]: self.covered[k] / n for k, n in sorted(self.judged.items()) if k[0] == finish}

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        yield CounterMetricFamily(
            "penstock:predictions", "Predictions of remaining length received", value=self.received
        )
        error = HistogramMetricFamily(
            "penstock:prediction_error_tokens",
            "Predicted median against true remaining tokens, of finished requests, by tokens generated so far",
            labels=["finish", "generated_from"],
        )
        for (finish, start), histogram in self.errors.items():
            error.add_metric([finish, str(start)], histogram.buckets(), histogram.total)
        yield error
        labels = ["finish", "quantile"]
        judged = CounterMetricFamily("penstock:predictions_judged", "Predictions whose truth is known", labels=labels)
        covered = CounterMetricFamily(
            "penstock:predictions_covered", "Those whose truth was not above the quantile", labels=labels
        )
        for (finish, level), count in self.judged.items():
            judged.add_metric([finish, repr(level)], count)
            covered.add_metric([finish, repr(level)], self.covered[finish, level])
        yield judged
        yield covered
