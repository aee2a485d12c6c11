"""Ladders: published readings, no extrapolation, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.plan.ladder import Ladder, read_ladder
from tests.plan.support import BATCH, LADDER, TPOT_S, ladder_file


def test_published_readings_at_20_ms() -> None:
    """In arXiv 2603.04716 the quadratic fit of its demo script gives 1,691 tokens/s, linear interpolation 1,714."""
    assert LADDER.throughput_at(0.020, "quadratic") == pytest.approx(1691, abs=0.5)
    assert LADDER.throughput_at(0.020, "linear") == pytest.approx(1714, abs=0.5)
    assert LADDER.quadratic.tolist() == pytest.approx([-2.3019, 203.319, -1454.66], rel=1e-5)
    assert [round(x) for x in LADDER.throughput] == [781, 1220, 1596, 1852, 2092, 2290]


@pytest.mark.parametrize("fit", ["quadratic", "linear"])
def test_outside_the_ladder_is_refused(fit: str) -> None:
    with pytest.raises(PenstockError, match=r"below the lowest.*12.8 ms at batch 10.*measure smaller batches"):
        LADDER.throughput_at(0.0127, fit)
    with pytest.raises(PenstockError, match=r"above the highest.*26.2 ms at batch 60.*measure larger batches"):
        LADDER.throughput_at(0.0263, fit)
    assert LADDER.throughput_at(TPOT_S[0], "linear") == pytest.approx(BATCH[0] / TPOT_S[0])
    assert LADDER.tpot_at(9.0) is None and LADDER.tpot_at(61.0) is None


@given(st.floats(TPOT_S[0], TPOT_S[-1]))
def test_batch_and_tpot_are_inverse(tpot_s: float) -> None:
    assert LADDER.tpot_at(LADDER.batch_at(tpot_s)) == pytest.approx(tpot_s)


def test_fit_errors() -> None:
    """Points on a parabola: no error of the quadratic fit; points on a line: none of the linear one."""
    tpot = np.array([0.010, 0.014, 0.019, 0.027])
    throughput = -2e6 * tpot**2 + 2e5 * tpot - 1000
    assert Ladder(tuple(throughput * tpot), tuple(tpot)).fit_error("quadratic") == pytest.approx(0, abs=1e-9)
    assert Ladder((10, 20, 40), (0.010, 0.012, 0.016)).fit_error("linear") == pytest.approx(0, abs=1e-12)
    assert LADDER.fit_error("quadratic") == pytest.approx(0.0136, abs=1e-4)


def test_a_file_in_any_order_is_read(tmp_path: Path) -> None:
    path = ladder_file(tmp_path)
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *reversed(rows)]))
    assert (read_ladder(str(path)).batch, read_ladder(str(path)).tpot_s) == (BATCH, TPOT_S)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("batch,tpot\n1,2\n", "no column 'tpot_s'"),
        ("batch,tpot_s\n10,0.01\n20,fast\n", ":3: '20', 'fast' are not two numbers"),
        ("batch,tpot_s\n10,0.01\n", "has 1 rungs"),
        ("batch,tpot_s\n10,0.01\n10,0.02\n", "batch 10 twice"),
        ("batch,tpot_s\n10,0.02\n20,0.01\n", "TPOT does not rise from batch 10 to 20"),
        ("batch,tpot_s\n10,0.01\n20,nan\n", "not above 0"),
        ("batch,tpot_s\n-10,0.01\n20,0.02\n", "not above 0"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(PenstockError, match=problem):
        read_ladder(str(path))


def test_a_missing_file() -> None:
    with pytest.raises(PenstockError, match=r"cannot read /nowhere\.csv"):
        read_ladder("/nowhere.csv")


def test_two_rungs_have_no_parabola() -> None:
    with pytest.raises(PenstockError, match="--ladder-fit linear"):
        Ladder((1, 2), (0.1, 0.2)).throughput_at(0.15, "quadratic")
