"""Provisioning: the cheapest mix against every mix, re-purposing against every assignment, and SPAD's shape."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.experiment.setup import ClusterSetup, Setup
from penstock.plan.chips import CHIPS, mix_cost, saving
from penstock.plan.closed_form import Case
from penstock.plan.provision import MachineRate, Workload, machine_rate, machine_rates, mixes, repurpose
from penstock.plan.sources import modelled
from penstock.workload.lengths import length_profile

NAMES = list(CHIPS)


@st.composite
def some_rates(draw: st.DrawFn) -> tuple[list[MachineRate], float]:
    rate = draw(st.floats(1.0, 20.0))
    found = []
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)):
        p, d = draw(st.floats(1.0, 25.0)), draw(st.floats(1.0, 25.0))
        found.append(MachineRate(name, p, d, math.ceil(rate / p)))
    return found, rate


@settings(max_examples=60, deadline=None)
@given(some_rates())
def test_no_smaller_mix_holds_the_rate(drawn: tuple[list[MachineRate], float]) -> None:
    rates, rate = drawn
    best = mixes(rates, rate)[0]
    by_name = {one.chip: one for one in rates}
    assert best.capacity_rps >= rate * (1 - 1e-9)
    for p, d in itertools.product(rates, rates):
        for n, m in itertools.product(range(1, 21), repeat=2):
            if min(n * p.prefill_rps, m * d.decode_rps) >= rate:
                together = {p.chip: n}
                together[d.chip] = together.get(d.chip, 0) + m
                assert mix_cost(together) >= best.cost - 1e-9
    # One machine fewer of either kind does not hold it.
    if best.prefill > 1:
        assert (best.prefill - 1) * by_name[best.prefill_chip].prefill_rps < rate
    if best.decode > 1:
        assert (best.decode - 1) * by_name[best.decode_chip].decode_rps < rate


def test_another_goal_may_choose_another_mix() -> None:
    rates = [MachineRate("spad-prefill", 10, 10, 4), MachineRate("spad-decode", 10, 10, 4)]
    assert mixes(rates, 40.0, "cost")[0].prefill_chip == "spad-prefill"
    assert mixes(rates, 40.0, "tdp")[0].prefill_chip == "spad-decode"
    with pytest.raises(PenstockError, match="unknown goal 'money'"):
        mixes(rates, 40.0, "money")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.5, 5), st.floats(0.5, 5), st.floats(0.5, 5), st.floats(0.5, 5),
       st.floats(0.5, 30))  # fmt: skip
def test_repurposing_finds_the_fewest_moves(
    p: int, d: int, pp: float, pd: float, dp: float, dd: float, rate: float
) -> None:
    rates = [MachineRate("spad-prefill", pp, pd), MachineRate("spad-decode", dp, dd)]
    found = repurpose(rates, {"spad-prefill": p}, {"spad-decode": d}, rate)
    every = []
    for a, b in itertools.product(range(p + 1), range(d + 1)):
        every.append((min((p - a) * pp + b * dp, a * pd + (d - b) * dd), a + b))
    enough = [moves for capacity, moves in every if capacity >= rate * (1 - 1e-9)]
    assert found.holds == bool(enough)
    if enough:
        assert found.moved == min(enough) and found.capacity_rps >= rate * (1 - 1e-9)
    else:
        assert found.capacity_rps == pytest.approx(max(capacity for capacity, _ in every))
    assert sum(found.prefill.values()) + sum(found.decode.values()) == p + d


def bloom(folder: Path) -> str:
    """BLOOM-176B's shapes, SPAD's first model."""
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 14336,
              "num_hidden_layers": 70, "num_attention_heads": 112, "intermediate_size": 57344, "vocab_size": 250880,
              "torch_dtype": "bfloat16", "tie_word_embeddings": True}  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(("profile", "ttft_s", "tpot_s"), [("azure-code", 1.9, 0.055), ("azure-conv", 1.0, 0.039)])
def test_spad_saves_hardware_as_published(profile: str, ttft_s: float, tpot_s: float, tmp_path: Path) -> None:
    """70 requests/s of BLOOM-176B: SPAD's mix is 30 % and more cheaper; coding prefills, conversation decodes.

    The paper: 41 % (18P+7D against 25 machines) and 19 % (8P+17D against 23). Its simulator has tiling losses that a
    roofline lacks, so the Prefill chip comes out better here and its savings are upper bounds.
    """
    setup = Setup(cluster=ClusterSetup(model=bloom(tmp_path), hardware="h100", tp=8))
    prompts, outputs = length_profile(profile).sample(4000, np.random.default_rng(0))
    case = Case(
        modelled(setup), 70.0, prompts.astype(float), outputs.astype(float), ttft_s, tpot_s, 90.0, queue="pooled"
    )
    rates = machine_rates(Workload(case, setup), NAMES)
    best = mixes(rates, 70.0)[0]
    uniform = mixes([one for one in rates if one.chip == "h100"], 70.0)[0]
    assert (best.prefill_chip, best.decode_chip) == ("spad-prefill", "spad-decode")
    assert 0.19 < saving(best.cost, uniform.cost) < 0.6
    assert saving(best.tdp, uniform.tdp) > 0.1
    assert 18 <= uniform.prefill + uniform.decode <= 30
    assert (best.prefill > best.decode) == (profile == "azure-code")


def test_what_a_machine_cannot_do_is_said() -> None:
    setup = Setup(cluster=ClusterSetup(model="llama-3.1-70b", hardware="h100", tp=8))
    case = Case(modelled(setup), 5.0, np.array([2000.0]), np.array([100.0]), 0.12, 0.05, 90.0, queue="pooled")
    slow = machine_rate(Workload(case, setup), "a100")
    assert slow.prefill_rps == 0 and "TTFT 120 ms cannot be met" in slow.prefill_problem
    assert slow.decode_rps > 0
    with pytest.raises(PenstockError, match="no machine type can prefill within the SLO"):
        machine_rates(Workload(case, setup), ["a100"])
    odd = Setup(cluster=ClusterSetup(model="llama-3.1-8b", hardware="h100", tp=16))
    with pytest.raises(PenstockError, match="does not divide 8 chips"):
        machine_rate(Workload(case, odd), "h100")
