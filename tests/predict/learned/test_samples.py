"""Samples: where they are taken, how they are dealt out and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.predict.learned.samples import FILE, Part, load_samples, positions, save_samples, split
from tests.predict.learned.support import toy


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(0, 1000))
def test_no_question_is_in_two_parts(questions: list[int], seed: int) -> None:
    keys = [str(q) for q in questions]
    part = split(keys, seed)
    for key in set(keys):
        assert len({p for p, k in zip(part.tolist(), keys, strict=True) if k == key}) == 1
    distinct = len(set(keys))
    trained = len({k for p, k in zip(part.tolist(), keys, strict=True) if p == Part.TRAIN})
    assert trained == round(0.7 * distinct)


def test_shares_of_the_parts() -> None:
    part = split([str(i) for i in range(1000)], 1)
    assert np.bincount(part).tolist() == [700, 150, 150]
    assert (part != split([str(i) for i in range(1000)], 2)).any()


@given(st.integers(1, 500), st.integers(1, 50), st.integers(0, 49))
def test_positions(output: int, every: int, offset: int) -> None:
    found = positions(output, every, offset)
    assert found == sorted(set(found))
    expected = {0, 1} | {g for g in range(2, output) if (g + offset) % every == 0}
    assert set(found) == {g for g in expected if g < output}


def test_positions_of_the_paper() -> None:
    assert positions(61, 20) == [0, 1, 20, 40, 60]
    assert positions(60, 20) == [0, 1, 20, 40]


def test_parts_keep_requests_and_samples_together() -> None:
    samples = toy([5, 50, 100])._replace(part=np.array([0, 2, 2], np.int32))
    test = samples.of(Part.TEST)
    assert test.output_tokens.tolist() == [50, 100]
    assert test.texts == (b"q1", b"q2")
    assert test.request.tolist() == [0] * 4 + [1] * 6
    assert test.remaining.tolist() == [50, 49, 30, 10, 100, 99, 80, 60, 40, 20]
    np.testing.assert_allclose(np.expm1(test.hidden[:, 0].astype(float)), test.remaining, rtol=2e-2)
    assert len(samples.of(Part.VALID).request) == 0


def test_files_go_and_come(tmp_path: Path) -> None:
    made = toy([5, 50, 100])
    save_samples(tmp_path / "new", made)
    read = load_samples(tmp_path / "new", "abcd")
    assert read.about == made.about and read.families == made.families and read.texts == made.texts
    for name, value in made._asdict().items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(read, name), value)
            assert getattr(read, name).dtype == value.dtype
    with pytest.raises(PenstockError, match=r"abcd.*ffff"):
        load_samples(tmp_path / "new", "ffff")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match="predictor collect"):
        load_samples(tmp_path)
    (tmp_path / FILE).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(PenstockError, match="collect anew"):
        load_samples(tmp_path)
