"""No policy passes the clairvoyant bound, and the bound is not idle."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.experiment.build import run, with_policy
from penstock.experiment.setup import ClusterSetup, Setup, Target, TruthSetup, WorkloadSetup, replace
from penstock.experiment.traffic import slos
from penstock.policy.registry import PRESETS
from penstock.rank.clairvoyant import Fluid
from penstock.report.metrics import Verdicts

SHARES_A_GPU = ("duet", "duet-static")
"""Two steps at once on one GPU: not what the lines below a step are about (docs/bound.md)."""
PLAYERS = [name for name in PRESETS if name not in SHARES_A_GPU]


@st.composite
def small_settings(draw: st.DrawFn) -> tuple[Setup, float]:
    """A small cluster under some policy, with targets near what it can do; and a rate as a share of the bound."""
    lengths = draw(st.sampled_from(["azure-conv", "azure-code", "512/64", "100-3000/1-40", "50-400/100-600"]))
    cluster = ClusterSetup(
        prefill=draw(st.integers(1, 2)),
        decode=draw(st.integers(1, 2)),
        hardware=draw(st.sampled_from(["a100-80g", "h100"])),
        max_num_seqs=draw(st.sampled_from([8, 64, 256])),
        kv_blocks=draw(st.sampled_from([None, 1500])),
    )
    setup = Setup(
        policy=draw(st.sampled_from(PLAYERS)),
        workload=WorkloadSetup(
            synthetic=lengths, requests=draw(st.integers(30, 120)), cv=draw(st.sampled_from([0, 1]))
        ),
        cluster=cluster,
        slo=Target(draw(st.sampled_from([0.4, 1.0])), draw(st.sampled_from([0.015, 0.03, 0.1]))),
        slo_form=draw(st.sampled_from(["mean", "deadline"])),
        seed=draw(st.integers(0, 5)),
    )
    return setup, draw(st.sampled_from([0.3, 0.8, 1.2, 2.0, 6.0]))


@given(small_settings())
@settings(max_examples=40, deadline=None)
def test_no_policy_attains_more_at_any_rate(case: tuple[Setup, float]) -> None:
    setup, share = case
    fluid = Fluid(setup)
    rate = share * max(fluid.bound().any_rps, 0.5)
    result = run(setup.at_rate(rate), sample=False)
    attained = float(Verdicts(result, slos(setup, result.trace)).met.mean())
    assert attained <= fluid.attainment(rate, finite=True) + 1e-9


def conv(**more: object) -> Setup:
    work = WorkloadSetup(synthetic="azure-conv", requests=3000)
    return replace(Setup(workload=work, slo=Target(1.0, 0.04)), **more)


def test_fixed_roles_are_bound_more_tightly_and_goals_trade() -> None:
    fluid = Fluid(conv())
    strict, lax = fluid.bound(0.99), fluid.bound(0.8)
    assert strict.any_rps < fluid.bound(0.9).any_rps < lax.any_rps
    assert 0 < strict.split_rps <= strict.any_rps * 1.001
    assert 0 < strict.prefill_share < 1
    assert fluid.attainment(0.5 * strict.any_rps) == 1.0
    assert fluid.attainment(2 * strict.any_rps) < fluid.attainment(1.5 * strict.any_rps) < 0.9
    # Sparing the dearest tenth is worth more than a tenth: they are the long ones.
    assert lax.any_rps > strict.any_rps * 0.99 / 0.8


def test_not_knowing_outputs_costs_where_they_make_the_work() -> None:
    prompts, outputs = (
        Fluid(conv(workload=WorkloadSetup(synthetic=name, requests=1000))).bound()
        for name in ("1000-9000/8", "100/10-9000")
    )
    assert prompts.blind_rps == pytest.approx(prompts.any_rps, rel=0.01)
    assert outputs.blind_rps < 0.95 * outputs.any_rps
    # Whoever serves a random 90 % serves 90 % of the work.
    everything = Fluid(conv(workload=WorkloadSetup(synthetic="100/10-9000", requests=1000))).bound(1.0)
    assert outputs.blind_rps == pytest.approx(everything.any_rps / 0.9, rel=0.04)


def test_it_scales_with_the_instances_and_does_not_see_the_split() -> None:
    two = Fluid(conv(cluster=ClusterSetup(prefill=1, decode=1))).bound()
    four = Fluid(conv(cluster=ClusterSetup(prefill=1, decode=3))).bound()
    assert four.any_rps == pytest.approx(2 * two.any_rps, rel=0.01)
    assert Fluid(conv(cluster=ClusterSetup(prefill=3, decode=1))).bound() == four


def test_a_run_comes_near_it_where_nothing_is_in_the_way() -> None:
    # One token each, steps full of prompts and no deadline to speak of: then work is all there is.
    work = WorkloadSetup(synthetic="2048/1", requests=800, cv=0.0)
    setup = Setup(policy="mixed", workload=work, cluster=ClusterSetup(prefill=1, decode=1), slo=Target(2.0, None))
    fluid = Fluid(setup)
    rate = 0.95 * fluid.bound(1.0).any_rps
    result = run(setup.at_rate(rate), sample=False)
    assert Verdicts(result, slos(setup, result.trace)).met.mean() > 0.9


def test_phases_are_bound_each_by_itself() -> None:
    # The same requests, in two phases or mixed evenly: idle time of the light phase does not serve the heavy one.
    heavy, light = "3000/10@40x4", "3000/10@40x0.25"
    slo = Target(2.0, 0.05)
    phased = Setup(workload=WorkloadSetup(synthetic=f"{heavy},{light}", duration_s=80.0), slo=slo)
    even = Setup(workload=WorkloadSetup(synthetic="3000/10", requests=2000), slo=slo)
    assert Fluid(phased).bound(0.99).any_rps * 4 == pytest.approx(Fluid(even).bound(0.99).any_rps, rel=0.1)


def test_classes_are_held_to_their_own_targets() -> None:
    work = WorkloadSetup(synthetic="50-400/100-600", requests=2000, classes={"a": 0.5, "b": 0.5})
    loose, tight = Target(1.0, 0.1), Target(1.0, 0.011)
    base = Setup(workload=work, slo=loose)
    all_loose = Fluid(base).bound(0.99).any_rps
    half = Fluid(replace(base, slo_classes={"a": tight})).bound(0.99).any_rps
    all_tight = Fluid(replace(base, slo=tight)).bound(0.99).any_rps
    assert all_tight < half < all_loose


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (conv(truth=TruthSetup(noise=0.1)), "drop --noise"),
        (conv(cluster=ClusterSetup(prefill_hardware="h100")), "drop --prefill-hardware"),
    ],
)
def test_what_has_no_bound(setup: Setup, words: str) -> None:
    with pytest.raises(PenstockError, match=words):
        Fluid(setup)


def test_a_goal_out_of_reach() -> None:
    assert Fluid(conv(slo=Target(1.0, 0.001))).bound().any_rps == 0
    with pytest.raises(PenstockError, match="--goal"):
        Fluid(with_policy(conv(), "ares")).bound(1.5)
