"""The evaluation: what it counts, on predictors whose errors are known."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.predict.learned.baselines.base import Method
from penstock.predict.learned.evaluate import Evaluation, bootstrap, evaluate, mean_by
from penstock.predict.learned.figures import figures, svg
from penstock.predict.learned.head import Head
from penstock.predict.learned.page import page
from penstock.predict.learned.samples import Part, Samples
from penstock.workload.trace import F64
from tests.predict.learned.support import WIDTH, linear, toy

HEAD = Head(
    linear([[1.0] + [0.0] * (WIDTH - 1), [0.0] * WIDTH], [0.0, 0.0]),
    np.array([0.0, 0.0], np.float32), (0.5, 0.9), "abcd", "t", 20, 0, {},
)  # fmt: skip


class OffBy(Method):
    """Always too much, by so many tokens; ten times that before the first token."""

    def __init__(self, name: str, tokens: float, parameters: int = 0) -> None:
        self.name, self._tokens, self.parameters = name, tokens, parameters

    def predict(self, samples: Samples) -> F64:
        found: F64 = samples.remaining + self._tokens * np.where(samples.generated == 0, 10.0, 1.0)
        return found


@pytest.fixture(scope="module")
def found() -> Evaluation:
    lengths = [5, 30, 150, 300, *range(1000, 1016)]
    methods = [OffBy("ours", 1.0, 100), OffBy("auxiliary encoder, bins", 2.0, 1000)]
    return evaluate(toy(lengths), HEAD, methods)


def test_means_by_class(found: Evaluation) -> None:
    ours, other = found.scores
    assert found.generated_from == [0, 1, 20, 100, 200, 500, 1000]
    assert found.generated_count[:2] == [20, 20]
    assert sum(found.generated_count) == sum(found.remaining_count) == found.predictions
    assert ours.by_generated == [10.0] + [1.0] * 6
    assert (ours.first, other.first) == (10.0, 20.0)
    mean = (10.0 * 20 + (found.predictions - 20)) / found.predictions
    assert ours.mae.value == pytest.approx(mean)
    assert ours.mae.low <= mean <= ours.mae.high
    assert other.mae.value == pytest.approx(2 * mean)
    assert ours.by_request > ours.mae.value, "short requests have a greater share of first predictions"
    assert set(ours.by_family) == {"even", "odd"}
    assert ours.us_1 > ours.us_32 > 0.0


def test_the_simulated_predictor_can_be_made_as_wrong() -> None:
    """Errors drawn from the simulated predictor itself give its two numbers back."""
    from penstock.predict.learned.noise import fit_noise, relative_error
    from penstock.predict.simulated import NoisyOracle

    assert relative_error(0.642) == pytest.approx(18256 / 31000, rel=1e-3)  # STAR's first prediction
    oracle = NoisyOracle(0, 0.5, 700.0)
    rows = [(r, length - t, t) for r, length in enumerate(range(100, 3100, 10)) for t in range(0, length, 20)]
    truth, generated = (np.array([row[i] for row in rows], np.float64) for i in (1, 2))
    errors = np.abs(np.array([oracle.remaining(*row) for row in rows]) - truth)
    begins = np.array([0, 20, 100, 200, 500, 1000, 2000, 2990])
    found = fit_noise(errors, truth, generated, np.searchsorted(begins, generated, side="right") - 1, 9)
    assert found.sigma_first == pytest.approx(0.5, rel=0.1)
    assert found.halving_tokens == pytest.approx(700, rel=0.2)
    assert found.by_generated[8] is None
    assert found.by_generated[0] == pytest.approx(errors[generated < 20].mean(), rel=0.1)


def test_the_longest_are_followed_to_where_all_of_them_are(found: Evaluation) -> None:
    assert (found.longest_from, found.longest_requests) == (1014, 2)
    assert found.longest_at[0] == 0 and found.longest_at[-1] < 1014
    assert found.scores[0].longest == [10.0] + [1.0] * (len(found.longest_at) - 1)


def test_the_papers_comparisons(found: Evaluation) -> None:
    change, fewer, curve = found.claims
    assert change.here.startswith("−50.0 % (−50.0 to −50.0)")
    assert fewer.here == "−90.0 %"
    assert curve.here.startswith("10 → 1 (")


def test_coverage_counts_what_is_at_or_below() -> None:
    """The head's first quantile is a hair off the truth either way, its second at twice as many tokens."""
    samples = toy([300] * 10)
    above = samples._replace(hidden=(samples.hidden + np.array([0.01, 0, 0, 0])).astype(np.float16))
    e = evaluate(above, HEAD, [OffBy("ours", 0.0)])
    assert [c.share for c in e.coverage] == [1.0, 1.0]
    below = samples._replace(hidden=(samples.hidden - np.array([0.1, 0, 0, 0])).astype(np.float16))
    e = evaluate(below, HEAD, [OffBy("ours", 0.0)])
    assert [c.share for c in e.coverage] == [0.0, 1.0]
    assert [c.first for c in e.coverage] == [0.0, 1.0]


def test_only_test_requests_count() -> None:
    samples = toy([100] * 4)._replace(part=np.array([0, 1, 2, 2], np.int32))
    assert evaluate(samples, HEAD, [OffBy("ours", 1.0)]).requests == 2
    with pytest.raises(PenstockError, match="no test requests"):
        evaluate(toy([100], Part.TRAIN), HEAD, [OffBy("ours", 1.0)])


def test_bootstrap_draws_requests() -> None:
    """One request in two is bad: drawing 200 of them anew moves the mean by about 0.035 either way, twice that."""
    sums, counts = np.tile([0.0, 10.0], 100), np.full(200, 10)
    found = bootstrap(sums, counts)
    assert found.value == 0.5
    assert 0.05 < found.high - 0.5 < 0.1
    assert 0.05 < 0.5 - found.low < 0.1
    same = bootstrap(sums, counts, 2.0 * sums)
    assert (same.value, same.low, same.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_mean_by() -> None:
    assert mean_by(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]), 3) == [2.0, None, 5.0]


def test_pictures_show_every_predictor(found: Evaluation) -> None:
    drawn = ElementTree.fromstring(svg(found))
    words = [element.text for element in drawn.iter() if element.text]
    assert {"ours", "auxiliary encoder, bins"} <= set(words)
    titles = figures(found)
    assert len(titles) == 4
    assert all({trace.name for trace in figure.data} >= {"ours"} for _, figure in list(titles.values())[:3])
    text = page(found)
    assert text.count("<section>") == 5
    assert "TTFT" not in text and "auxiliary encoder, bins" in text
