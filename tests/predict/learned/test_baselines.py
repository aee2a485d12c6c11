"""Predictors on toy requests whose right answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.predict.learned.baselines.encoder import PAD, AuxiliaryEncoder, Encoder, as_bytes
from penstock.predict.learned.baselines.history import ConditionalHistory
from penstock.predict.learned.baselines.median import MedianLength
from penstock.predict.learned.baselines.oracle import SimulatedNoise
from penstock.predict.learned.baselines.probe import HeadMedian, PaperHead
from penstock.predict.learned.baselines.prompt import EntropyPooled, PromptState
from penstock.predict.learned.baselines.trail import BayesBins
from penstock.predict.learned.bins import equal, fall
from penstock.predict.learned.head import Head
from penstock.predict.learned.softmax import softmax
from tests.predict.learned.support import WIDTH, linear, random_mlp, toy

FIRST = [1.0] + [0.0] * (WIDTH - 1)


def test_median_length_is_about_to_end_once_outlived() -> None:
    made = MedianLength([10, 30, 1000])
    samples = toy([25, 50])
    assert samples.generated.tolist() == [0, 1, 20, 0, 1, 20, 40]
    assert made.predict(samples).tolist() == [30, 29, 10, 30, 29, 10, 0]
    assert made.parameters == 0


@pytest.mark.parametrize(("quantile", "left"), [(-1.0, [250.0, 249.0, 470.0]), (0.5, [300.0, 299.0, 660.0])])
def test_history_knows_only_how_far_a_request_is(quantile: float, left: list[float]) -> None:
    """Of 10, 10, 300, 680 all are longer than 0 and 1 tokens, two are longer than 20."""
    made = ConditionalHistory([10, 300, 10, 680], quantile)
    samples = toy([25])
    assert made.predict(samples).tolist() == pytest.approx(left)


def test_the_prompt_state_gives_one_length_for_all_refreshes() -> None:
    """The network passes on the first number of the state: log1p of what remains at the prompt, the whole length."""
    samples = toy([25, 50])
    found = PromptState(linear([FIRST], [0.0])).predict(samples)
    np.testing.assert_allclose(found, [25, 24, 5, 50, 49, 30, 10], rtol=0.01, atol=0.05)
    short = PromptState(linear([FIRST], [-np.log(2.0)])).predict(samples)
    assert short[2] == 0.0, "12 tokens were predicted, 20 have come"


def test_entropy_pooling_is_the_expected_bin() -> None:
    edges = equal(40.0, 2)
    flat = EntropyPooled(linear([[0.0] * WIDTH] * 2, [0.0, np.log(3.0)]), edges)
    assert flat.predict(toy([25])).tolist() == pytest.approx([25.0, 24.0, 5.0])


def test_head_and_paper_answer_anew_each_time() -> None:
    samples = toy([25, 50])
    shift = np.zeros(1, np.float32)
    head = Head(linear([FIRST], [0.0]), shift, (0.5,), "abcd", "t", 20, 0, {})
    np.testing.assert_allclose(HeadMedian(head).predict(samples), samples.remaining, rtol=0.01)
    paper = PaperHead(linear([FIRST], [-2.0]), 10.0)
    expected = np.maximum(10.0 * (samples.hidden[:, 0].astype(np.float64) - 2.0), 0.0)
    np.testing.assert_allclose(paper.predict(samples), expected, rtol=1e-5)
    assert (HeadMedian(head).parameters, paper.parameters) == (WIDTH + 1, WIDTH + 1)


def test_trail_smooths_along_each_request_alone() -> None:
    """Against the recursion written out for one request after the other."""
    edges, probe = equal(100.0, 5), random_mlp((WIDTH, 5), 3)
    samples = toy([25, 3, 90, 1, 60])
    samples = samples._replace(hidden=np.random.default_rng(0).normal(size=samples.hidden.shape))
    middle = (edges[:-1] + edges[1:]) / 2
    expected = []
    for request in range(5):
        rows = np.flatnonzero(samples.request == request)
        belief = None
        for before, row in zip([None, *rows[:-1]], rows, strict=True):
            said = softmax(probe(samples.hidden[[row]]).astype(np.float64))[0]
            if belief is not None:
                said = said * (belief @ fall(edges, samples.generated[row] - samples.generated[before]))
            belief = said / said.sum()
            expected.append(belief @ middle)
    np.testing.assert_allclose(BayesBins(probe, edges, "t").predict(samples), expected, rtol=1e-6)


def test_trail_believes_what_it_was_once_sure_of() -> None:
    """Sure of 80 to 100 tokens at the first look, ignorant ever after: what remains falls as tokens come."""
    probe = linear([[0.0] * WIDTH, [0.0] * WIDTH, [0.0] * WIDTH, [0.0] * WIDTH, [40.0, 0, 0, 0]], [0.0] * 5)
    samples = toy([90])
    hidden = np.zeros_like(samples.hidden)
    hidden[0, 0] = 1.0
    found = BayesBins(probe, equal(100.0, 5), "t").predict(samples._replace(hidden=hidden))
    assert found[0] == pytest.approx(90.0)
    assert (np.diff(found) < 0.0).all()
    assert found[-1] == pytest.approx(90.0 - samples.generated[-1], abs=15.0)


def test_the_encoder_reads_bytes_and_forgets_what_was_filled_in() -> None:
    ids = as_bytes([b"abc", b"", b"x" * 600])
    assert ids.shape == (3, 512)
    assert ids[0, :4].tolist() == [97, 98, 99, PAD]
    source = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return source.normal(size=shape).astype(np.float32)

    d = 8
    tensors = {"embed": draw(257, d), "place": draw(512, d), "norm": draw(2, d), "head": draw(4, d), "bias": draw(4)}
    tensors |= {"n0": draw(2, d), "m0": draw(2, d), "qkv0": draw(3 * d, d), "out0": draw(d, d), "up0": draw(4 * d, d)}
    encoder = Encoder(tensors | {"down0": draw(d, 4 * d)}, 2)
    alone = encoder([b"abc"])
    np.testing.assert_allclose(encoder([b"a longer prompt", b"abc"])[1], alone[0], rtol=1e-4, atol=1e-5)
    assert np.abs(encoder([b"acb"]) - alone).max() > 1e-3, "order counts"
    assert encoder.parameters == sum(t.size for t in encoder.tensors.values())
    samples = toy([25])._replace(texts=(b"abc",))
    edges = np.array([0.0, 200.0, 400.0, 600.0])
    likeliest = 100.0 + 200.0 * int(np.argmax(alone[0, :3]))
    bins = AuxiliaryEncoder(encoder, edges, True).predict(samples)
    assert bins.tolist() == pytest.approx([likeliest, likeliest - 1, likeliest - 20])
    length = np.expm1(float(alone[0, 3]))
    told = AuxiliaryEncoder(encoder, edges, False).predict(samples)
    assert told.tolist() == pytest.approx([max(length - g, 0.0) for g in (0, 1, 20)], rel=1e-4)


def test_simulated_noise_has_the_right_median() -> None:
    samples = toy([500] * 400)
    first = samples.generated == 0
    found = SimulatedNoise(1).predict(samples)[first]
    assert np.median(found) == pytest.approx(500.0, rel=0.15)
    assert found.std() > 100.0
