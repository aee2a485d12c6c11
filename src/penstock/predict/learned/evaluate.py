"""How good predictions are: errors by progress and by length, coverage, size and speed, all on the same requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.head import Head
from penstock.predict.learned.noise import Noise, fit_noise
from penstock.predict.learned.samples import Part, Samples
from penstock.workload.trace import F64

SCHEMA: Final = "penstock.predictor-eval/1"
GENERATED_FROM: Final = (0, 1, 20, 100, 200, 500, 1000, 2000, 4000, 8000, 16000, 32000)
REMAINING_FROM: Final = (1, 20, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000, 32000)
"""Where classes of tokens generated and of tokens remaining begin; each ends where the next begins."""

LONGEST_SHARE: Final = 0.1
PAPER_PROGRESS: Final = 8.0 / 31.0
"""Share of their length at which STAR looks at its longest outputs again: 8K of 30K to 32K tokens."""

_CURVE_POINTS = 40
_DRAWS = 1000
_TIMED_S = 0.05


class Interval(msgspec.Struct, frozen=True):
    """A figure and its 95 % interval, by drawing requests anew (bootstrap)."""

    value: float
    low: float
    high: float


class Scores(msgspec.Struct, frozen=True):
    """One predictor. Errors are means of |predicted - true| in tokens, over predictions.

    ``first`` is the error before the first token, ``by_request`` the mean over requests of each one's mean.
    ``by_generated``, ``by_remaining`` and ``longest`` run along the classes and points of :class:`Evaluation`; None
    where there is no prediction. ``us_1`` and ``us_32`` are microseconds a prediction, alone and 32 at a time.
    """

    name: str
    reads: str
    parameters: int
    mae: Interval
    first: float
    by_request: float
    by_generated: list[float | None]
    by_remaining: list[float | None]
    longest: list[float | None]
    by_family: dict[str, float]
    us_1: float
    us_32: float


class Coverage(msgspec.Struct, frozen=True):
    """Share of the true values at or below a quantile of the head: over all predictions, over the first of each
    request, and along the classes of tokens generated.
    """

    level: float
    share: float
    first: float
    by_generated: list[float | None]


class Claim(msgspec.Struct, frozen=True):
    """A figure of the paper and ours."""

    what: str
    paper: str
    here: str


class Evaluation(msgspec.Struct, frozen=True):
    """``generated_from`` and ``remaining_from``: where classes begin, with the number of predictions in each.
    ``longest_at``: tokens generated at which ``Scores.longest`` looks, after the first the middles of stretches; it is
    of the ``longest_requests`` whose output has at least ``longest_from`` tokens, all of them at every point.
    ``noise``: the simulated predictor that errs as the first of ``scores`` does.
    """

    schema: str
    model: str
    serving_model: str
    requests: int
    predictions: int
    train_requests: int
    mean_tokens: float
    max_tokens: int
    generated_from: list[int]
    generated_count: list[int]
    remaining_from: list[int]
    remaining_count: list[int]
    longest_from: int
    longest_requests: int
    longest_at: list[int]
    scores: list[Scores]
    coverage: list[Coverage]
    noise: Noise
    claims: list[Claim]


def evaluate(
    samples: Samples, head: Head, methods: Sequence[Method], tell: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Judge predictors on the test requests.

    Parameters
    ----------
    samples : Samples
        All parts.
    head : Head
        Whose quantiles are judged.
    methods : sequence of Method
        The head's median first.
    tell : function, optional
        Called with the number of methods done and their number.

    Raises
    ------
    PenstockError
        There are no test requests.
    """
    test = samples.of(Part.TEST)
    if not len(test.request):
        raise PenstockError("there are no test requests among the samples", "collect more (--requests)")
    cut = _Cut(test)
    scores, sums = [], []
    for done, method in enumerate(methods):
        if tell is not None:
            tell(done, len(methods))
        mine, summed = _scores(method, test, cut)
        scores.append(mine)
        sums.append(summed)
    return Evaluation(
        schema=SCHEMA,
        model=samples.about.model,
        serving_model=samples.about.name,
        requests=len(test.output_tokens),
        predictions=len(test.request),
        train_requests=int((samples.part == Part.TRAIN).sum()),
        mean_tokens=float(test.output_tokens.mean()),
        max_tokens=int(test.output_tokens.max()),
        generated_from=cut.generated_from,
        generated_count=np.bincount(cut.by_generated, minlength=len(cut.generated_from)).tolist(),
        remaining_from=cut.remaining_from,
        remaining_count=np.bincount(cut.by_remaining, minlength=len(cut.remaining_from)).tolist(),
        longest_from=cut.longest_from,
        longest_requests=int(cut.is_long.sum()),
        longest_at=cut.points,
        scores=scores,
        coverage=_coverage(head, test, cut),
        noise=_noise(methods[0], test, cut),
        claims=_claims(scores, sums, test, cut),
    )


def mean_by(values: Any, group: Any, groups: int) -> list[float | None]:
    """Mean of ``values`` [n] in each of ``groups`` groups, None where a group is empty."""
    counts = np.bincount(group, minlength=groups)
    sums = np.bincount(group, weights=values, minlength=groups)
    return [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]


def bootstrap(sums: Any, counts: Any, of: Any = None, draws: int = _DRAWS, seed: int = 0) -> Interval:
    """Mean error over predictions, with the 95 % interval from drawing requests anew.

    Parameters
    ----------
    sums : float64[n]
        Summed errors of each request.
    counts : int[n]
        Its predictions.
    of : float64[n], optional
        Summed errors of another predictor on the same requests: the figure is then the change against it, as a share.
    """
    source = np.random.default_rng(seed)

    def figure(weights: Any) -> Any:
        mine = weights @ sums
        return mine / (weights @ np.asarray(counts, np.float64)) if of is None else mine / (weights @ of) - 1.0

    n = len(sums)
    drawn = [figure(np.bincount(source.integers(0, n, n), minlength=n).astype(np.float64)) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(figure(np.ones(n))), float(low), float(high))


class _Cut:
    """Which class each prediction belongs to."""

    def __init__(self, test: Samples) -> None:
        self.generated_from, self.by_generated = _classes(GENERATED_FROM, test.generated)
        self.remaining_from, self.by_remaining = _classes(REMAINING_FROM, test.remaining)
        self.counts = np.bincount(test.request, minlength=len(test.output_tokens))
        long = np.quantile(test.output_tokens, 1.0 - LONGEST_SHARE, method="higher")
        self.longest_from = int(long)
        self.is_long = test.output_tokens >= long
        # Before the first token, and stretches that all of them go through to the end, with as many predictions of
        # each: so a falling curve means better predictions, not other requests.
        every = test.about.every
        stretch = every * max(-(-self.longest_from // (every * _CURVE_POINTS)), 1)
        stretches = self.longest_from // stretch
        self.points = [0, *((2 * k + 1) * stretch // 2 for k in range(stretches))]
        place = np.where(test.generated == 0, 0, 1 + test.generated // stretch)
        self.on_curve = self.is_long[test.request] & (place <= stretches)
        self.point = place[self.on_curve]

    def along_longest(self, errors: F64) -> list[float | None]:
        """Mean error of the longest outputs at each of the points."""
        return mean_by(errors[self.on_curve], self.point, len(self.points))


def _classes(begins: Sequence[int], values: Any) -> tuple[list[int], NDArray[np.int64]]:
    kept = [begin for begin in begins if begin <= values.max()]
    return kept, (np.searchsorted(kept, values, side="right") - 1).astype(np.int64)


def _scores(method: Method, test: Samples, cut: _Cut) -> tuple[Scores, Any]:
    """Its scores, and its summed errors for each request."""
    errors = np.abs(method.predict(test) - test.remaining)
    sums = np.bincount(test.request, weights=errors, minlength=len(cut.counts))
    us_1, us_32 = (time_us(method, test, batch) for batch in (1, 32))
    by_family = mean_by(errors, test.family[test.request], len(test.families))
    found = Scores(
        name=method.name,
        reads=method.reads,
        parameters=method.parameters,
        mae=bootstrap(sums, cut.counts),
        first=float(errors[test.generated == 0].mean()),
        by_request=float((sums / cut.counts).mean()),
        by_generated=mean_by(errors, cut.by_generated, len(cut.generated_from)),
        by_remaining=mean_by(errors, cut.by_remaining, len(cut.remaining_from)),
        longest=cut.along_longest(errors),
        by_family={name: x for name, x in zip(test.families, by_family, strict=True) if name and x is not None},
        us_1=us_1,
        us_32=us_32,
    )
    return found, sums


def time_us(method: Method, test: Samples, batch: int) -> float:
    """Microseconds a prediction when ``batch`` requests are asked about at once: the median call, divided by the batch.

    The first prediction of each request is timed: the only one for which predictors of the whole length compute.
    """
    rows = np.resize(np.flatnonzero(test.generated == 0), batch)
    asked = test.rows(rows)
    method.predict(asked)
    spent: list[float] = []
    while sum(spent) < _TIMED_S or len(spent) < 3:
        began = time.perf_counter()
        method.predict(asked)
        spent.append(time.perf_counter() - began)
    return float(np.median(spent)) / batch * 1e6


def _noise(method: Method, test: Samples, cut: _Cut) -> Noise:
    truth, generated = test.remaining.astype(np.float64), test.generated.astype(np.float64)
    errors = np.abs(method.predict(test) - truth)
    return fit_noise(errors, truth, generated, cut.by_generated, len(cut.generated_from))


def _coverage(head: Head, test: Samples, cut: _Cut) -> list[Coverage]:
    quantiles = head.remaining(test.hidden, test.generated)
    first = test.generated == 0
    found = []
    for k, level in enumerate(head.quantiles):
        below = (test.remaining <= quantiles[:, k]).astype(np.float64)
        by_generated = mean_by(below, cut.by_generated, len(cut.generated_from))
        found.append(Coverage(level, float(below.mean()), float(below[first].mean()), by_generated))
    return found


def _claims(scores: list[Scores], sums: list[Any], test: Samples, cut: _Cut) -> list[Claim]:
    """The paper's comparisons, where there is something to compare."""
    names = [s.name for s in scores]
    ours = 0
    encoders = [i for i, name in enumerate(names) if name.startswith("auxiliary encoder")]
    found = []
    if encoders:
        best = min(encoders, key=lambda i: scores[i].mae.value)
        change = bootstrap(sums[ours], cut.counts, sums[best])
        found.append(
            Claim(
                f"MAE, head against the better {names[best].partition(',')[0]}",
                "−49.4 %",
                f"{100 * change.value:+.1f} % ({100 * change.low:+.1f} to {100 * change.high:+.1f})".replace("-", "−"),
            )
        )
        fewer = scores[ours].parameters / scores[best].parameters - 1.0
        found.append(Claim("its parameters", "−93.3 %", f"{100 * fewer:+.1f} %".replace("-", "−")))
    curve = scores[ours].longest
    if len(curve) > 1 and curve[0] is not None:
        mean = float(test.output_tokens[cut.is_long].mean())
        later = int(np.argmin(np.abs(np.array(cut.points) - PAPER_PROGRESS * mean)))
        value = curve[later]
        if value is not None:
            found.append(
                Claim(
                    f"MAE of the longest {LONGEST_SHARE:.0%} of outputs, before the first token → after 26 % of them",
                    "18,256 → 2,929 (8K of 31K tokens)",
                    f"{curve[0]:,.0f} → {value:,.0f} ({cut.points[later]:,} of {mean:,.0f} tokens)",
                )
            )
    return found
