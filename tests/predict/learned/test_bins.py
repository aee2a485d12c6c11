"""Bins of lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.predict.learned.bins import centres, equal, fall, logarithmic, place
from penstock.predict.learned.softmax import softmax


def test_edges_and_places() -> None:
    edges = equal(100.0, 4)
    assert edges.tolist() == [0, 25, 50, 75, 100]
    assert centres(edges).tolist() == [12.5, 37.5, 62.5, 87.5]
    assert place(edges, [0, 24.9, 25, 99, 100, 5000, -3]).tolist() == [0, 0, 1, 3, 3, 3, 0]
    logs = np.log1p(logarithmic(1000.0, 7))
    assert (logs[0], logs[-1]) == (0.0, pytest.approx(np.log(1001.0)))
    np.testing.assert_allclose(np.diff(logs), logs[-1] / 7)


def test_one_token_moves_a_share_of_each_bin_to_the_one_below() -> None:
    """TRAIL's matrix: 1/width of a bin falls into the next."""
    moved = fall(equal(30.0, 3), 1.0)
    np.testing.assert_allclose(moved, [[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.0, 0.1, 0.9]])


@given(st.floats(1, 5000), st.integers(1, 30), st.floats(0, 6000), st.booleans())
def test_nothing_is_lost_when_all_falls(top: float, bins: int, tokens: float, log: bool) -> None:
    edges = (logarithmic if log else equal)(top, bins)
    moved = fall(edges, tokens)
    assert (moved >= -1e-12).all()
    np.testing.assert_allclose(moved.sum(axis=1), 1.0, atol=1e-9)
    # Nothing rises, and the mean falls by at most the tokens (and half a bin, for what is in the middle of one).
    assert np.allclose(np.triu(moved, 1), 0.0)
    width = np.diff(edges)
    assert ((centres(edges) - moved @ centres(edges)) <= tokens + width.max() + 1e-6).all()


@given(st.floats(2, 5000), st.integers(1, 10))
def test_falling_twice_is_falling_by_the_sum_on_whole_bins(width: float, bins: int) -> None:
    edges = equal(width * bins, bins)
    step = edges[1]
    np.testing.assert_allclose(fall(edges, step) @ fall(edges, step), fall(edges, 2 * step), atol=1e-9)


def test_softmax() -> None:
    np.testing.assert_allclose(softmax(np.array([[0.0, np.log(3.0)], [1e4, 1e4]])), [[0.25, 0.75], [0.5, 0.5]])
