"""Short texts of the command line."""

from __future__ import annotations

import math

import pytest

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.experiment import parse
from penstock.experiment.build import lengths
from penstock.experiment.settings import options_of
from penstock.experiment.setup import Setup, TruthSetup
from penstock.sim.cluster import Fault, FaultKind


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("50ms", 0.05), ("1.5", 1.5), ("1.5s", 1.5), ("2min", 120.0), ("1h", 3600.0), ("200us", 2e-4), ("none", math.inf)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-3s", "3 days", "1.2.3s", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(PenstockError, match="is not a time"):
        parse.duration(text)


def test_faults_are_sorted_by_time() -> None:
    found = parse.faults("up:3@3min, down:3@120s,slow:0x1.5@60")
    assert found == (
        Fault(60.0, 0, FaultKind.SLOW, 1.5),
        Fault(120.0, 3, FaultKind.DOWN),
        Fault(180.0, 3, FaultKind.UP),
    )
    assert parse.faults("") == ()


def test_slo_classes_and_shares() -> None:
    assert parse.slo_classes(["chat=500ms/40ms", "batch=none/1s"]) == {"chat": Slo(0.5, 0.04), "batch": Slo(tpot_s=1)}
    assert parse.class_shares(["chat=0.8", "batch=0.2"]) == {"chat": 0.8, "batch": 0.2}
    assert parse.class_shares(["chat=0.75"]) == {"chat": 0.75, "default": 0.25}
    with pytest.raises(PenstockError, match="given twice"):
        parse.slo_classes(["a=1s/1s", "a=2s/1s"])


def test_settings_go_to_one_policy_or_to_all_that_have_them() -> None:
    found = options_of(["ares", "ares-history", "least-kv"], ["horizon=100", "ares.margin=0.2"])
    assert found == {"ares": {"horizon": 100.0, "margin": 0.2}, "ares-history": {"horizon": 100.0}, "least-kv": {}}
    with pytest.raises(PenstockError, match="unknown option"):
        options_of(["least-kv"], ["horizon=100"])


def test_predictors_and_how_wrong_they_are() -> None:
    assert parse.predictor("oracle") == {"predictor": "oracle"}
    told = {"predictor": "noisy", "predictor_sigma": 0.4, "predictor_halving": 800.0}
    assert parse.predictor("noisy:0.4,800") == told
    for text in ("noisy:", "noisy:1", "noisy:-1,5", "noisy:1,0", "noisy:nan,1", "oracle:1,2"):
        with pytest.raises(PenstockError, match="cannot be read"):
            parse.predictor(text)


def test_a_smaller_error_is_nearer_to_the_truth() -> None:
    """The option reaches the oracle: with no error at all the noisy one says what is true."""
    setups = [
        Setup(policy="ares", truth=TruthSetup(**parse.predictor(text))) for text in ("noisy:0,1", "noisy:0.5,1000")
    ]
    exact, wrong = (lengths(setup, 3) for setup in setups)
    assert exact is not None and wrong is not None
    assert [exact.remaining(r, 500, 20) for r in range(50)] == [500.0] * 50
    assert len({wrong.remaining(r, 500, 20) for r in range(50)}) == 50
