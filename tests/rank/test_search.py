"""The ranking: pruning changes nothing that counts, waves are the same everywhere, and errors are one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.repeat import Done
from penstock.experiment.setup import Setup, Target, WorkloadSetup, replace
from penstock.rank.search import PRUNED, SEARCHED, UNFIT, UNREACHABLE, Ranking, rank
from penstock.rank.sensitivity import swings
from penstock.rank.space import Space
from penstock.rank.spread import OverCores

T = TypeVar("T")
HERE = OverCores(1)
SMALL = Space({"a100-80g": 3}, tps=(1, 2), chunks=(512,))


def base(slo: Target, **workload: Any) -> Setup:
    return Setup(workload=WorkloadSetup(**({"requests": 400} | workload)), slo=slo)


class Counting:
    """A spread that notes what it was asked, and answers backwards."""

    def __init__(self) -> None:
        self.waves: list[int] = []

    def __call__(self, call: Callable[..., T], tasks: Sequence[tuple[Any, ...]], done: Done | None = None) -> list[T]:
        self.waves.append(len(tasks))
        found = [call(*task) for task in reversed(tasks)]
        if done is not None:
            done(len(tasks))
        return found[::-1]


def names(ranking: Ranking, count: int) -> list[str]:
    return [c.name for c in ranking.candidates[:count]]


@pytest.mark.parametrize(
    ("slo", "workload"),
    [
        (Target(1.0, 0.05), {}),
        (Target(0.4, 0.02), {"synthetic": "azure-code"}),
        (Target(2.0, 0.1), {"synthetic": "1500/30", "cv": 0.0, "requests": 800}),
    ],
)
def test_pruning_keeps_what_counts(slo: Target, workload: dict[str, Any]) -> None:
    prices = {"a100-80g": 2.0}
    setup = base(slo, **workload)
    pruned = rank(setup, SMALL, [0], HERE, top=3, prices=prices)
    full = rank(setup, SMALL, [0], HERE, top=3, prune=False, prices=prices)
    assert {c.status for c in full.candidates} <= {SEARCHED, UNREACHABLE}
    assert names(pruned, 3) == names(full, 3)
    assert {c.name for c in pruned.candidates if c.on_front} == {c.name for c in full.candidates if c.on_front}
    for kind in (True, False):
        one, other = pruned.most(kind), full.most(kind)
        assert one is not None and other is not None and one.name == other.name
    for c in full.candidates:
        assert c.bound_rps is None or c.rate_rps < c.bound_rps


def test_what_is_pruned_says_why() -> None:
    setup = base(Target(0.5, 0.03), synthetic="1500/30", cv=0.0, requests=1500)
    space = Space({"a100-80g": 6}, tps=(1,), chunks=(512,))
    ranking = rank(setup, space, [0], HERE, top=1)
    gone = [c for c in ranking.candidates if c.status == PRUNED]
    assert gone, "the case prunes nothing, so it tests nothing"
    by_name = {c.name: c for c in ranking.candidates}
    for c in gone:
        assert c.bound_rps is not None and c.goodput_rps is None and c.runs == 0
        better = by_name[c.reason.split("; ")[1].split(" sustains")[0]]
        assert better.rate_rps >= c.bound_rps and better.gpus <= c.gpus
        # No bluff: searched all the same, it stays below its bound.
        assert c.bound_rps / c.gpus <= ranking.winner().per_gpu


def test_answers_do_not_depend_on_who_computes_them() -> None:
    setup = base(Target(1.0, 0.04), requests=150)
    one, other = Counting(), OverCores(2)
    told: list[tuple[int, int]] = []
    a = rank(setup, SMALL, [0, 1], one, done=lambda n, total: told.append((n, total)))
    b = rank(setup, SMALL, [0, 1], other)
    assert a == b
    assert one.waves[0] == 16, "eight arrangements of two seeds"
    assert told == sorted(told) and told[-1][1] == len(a.candidates)
    first = a.winner()
    assert first.goodput_rps is not None and first.goodput_rps.n == 2 and first.goodput_rps.half_width is not None


def test_what_does_not_fit_is_listed() -> None:
    setup = Setup(workload=WorkloadSetup(requests=60), slo=Target(5.0, 0.2))
    setup = Setup(workload=setup.workload, slo=setup.slo, cluster=type(setup.cluster)(model="llama-3.1-70b"))
    ranking = rank(setup, Space({"a100-80g": 4}, tps=(1, 4), chunks=()), [0], HERE)
    assert [c.name for c in ranking.searched()] == ["1M(tp4) whole prompts"]
    rest = [c for c in ranking.candidates if c.status == UNFIT]
    assert len(rest) == len(ranking.candidates) - 1
    assert all("GiB of weights" in c.reason for c in rest)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(PenstockError, match="fits no arrangement of 2 x a100-80g"):
        rank(Setup(cluster=type(Setup().cluster)(model="deepseek-v3")), Space({"a100-80g": 2}), [0], HERE)
    with pytest.raises(PenstockError, match="no arrangement meets the targets at any rate"):
        rank(base(Target(1.0, 0.001)), SMALL, [0], HERE)
    with pytest.raises(PenstockError, match="give --top"):
        rank(base(Target()), SMALL, [0], HERE, top=0)
    with pytest.raises(PenstockError, match="give --goal"):
        rank(base(Target()), SMALL, [0], HERE, goal=1.5)


def test_slower_steps_cost_goodput() -> None:
    setup = base(Target(0.5, 0.03))
    ranking = rank(setup, SMALL, [0, 1], HERE, prune=False)
    pair = ranking.most(True)
    assert pair is not None
    found = swings(ranking.setup_of(setup, pair), 0, 0.9, 0.02, HERE, pair.goodput_rps)
    assert {s.input for s in found} == {
        "prefill step times",
        "decode step times",
        "KV link rate",
        "arrivals and lengths drawn",
    }
    assert [s.width_rps for s in found] == sorted((s.width_rps for s in found), reverse=True)
    for s in found:
        assert s.worse_rps <= 1.03 * pair.goodput_rps.max if pair.goodput_rps else False
    steps = next(s for s in found if s.input == "prefill step times")
    assert steps.worse_rps < steps.better_rps


def test_goodputs_are_those_of_taking_every_step() -> None:
    setup = base(Target(0.5, 0.03), requests=100)
    space = Space({"a100-80g": 2}, tps=(1,), chunks=(512,))
    leaps = rank(setup, space, [0], HERE, prune=False)
    steps = rank(replace(setup, stepping=True), space, [0], HERE, prune=False)
    assert [c.name for c in leaps.candidates] == [c.name for c in steps.candidates]
    for one, other in zip(leaps.candidates, steps.candidates, strict=True):
        assert one.rate_rps == pytest.approx(other.rate_rps, rel=0.021), "one step of the search at most"
