"""Power by clock, step models by clock, tiles: what must hold whatever the constants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.perf.energy import ClockLevel, PowerModel, busy_joules
from penstock.perf.hardware import hardware_names, hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import MEMORY_CLOCK_EXPONENT, RooflineStepModel
from penstock.perf.step import LinearStepModel
from penstock.perf.tiles import TiledStepModel
from penstock.sim.cluster import InstanceSpec

A100, LLAMA = hardware_spec("a100-80g"), model_spec("llama-3.1-8b")


@pytest.mark.parametrize("name", hardware_names())
def test_every_card_has_a_power_model_with_sources_that_adds_up_to_its_tdp(name: str) -> None:
    spec = hardware_spec(name)
    power = spec.power
    assert power.idle_w + power.memory_w + power.dynamic_w == pytest.approx(spec.tdp_w)
    assert 0 < power.idle_w < power.busy_w(0.7, False) < power.busy_w(1.0, False) < power.busy_w(1.0, True) < spec.tdp_w
    for key in ("idle_w", "memory_w", "dynamic_w", *(["clocks_mhz"] if spec.clocks_mhz else [])):
        assert len(spec.sources[key]) > 10
    assert list(spec.clocks_mhz) == sorted(set(spec.clocks_mhz))


def test_the_levels_of_the_published_code() -> None:
    assert A100.clocks_mhz == (1005.0, 1095.0, 1200.0, 1305.0, 1410.0)


def test_watts_by_clock_and_kind_of_step() -> None:
    power = PowerModel(
        80.0, 80.0, 240.0, prompt_activity=1.0, prompt_memory=0.5, decode_activity=0.5, decode_memory=1.0
    )
    assert power.busy_w(1.0, True) == 360.0 and power.busy_w(1.0, False) == 280.0
    assert power.busy_w(0.5, True) == 80.0 + 40.0 + 240.0 / 8
    assert power.times(2).busy_w(0.5, False) == 2 * power.busy_w(0.5, False)
    joules = busy_joules(power, (500.0, 1000.0), (1.0, 2.0), (3.0, 4.0))
    assert joules == [150.0 + 3 * 175.0, 720.0 + 4 * 280.0]


def test_energy_of_a_fixed_amount_of_work_is_u_shaped_in_the_clock() -> None:
    """Too slow and the idle power runs on; too fast and the dynamic power grows with the cube of the clock."""
    joules = []
    for clock in np.linspace(0.2, 1.0, 33):
        seconds = RooflineStepModel(LLAMA, A100, clock=float(clock)).step_s(200, 100_000, [], [])
        joules.append(A100.power.busy_w(float(clock), False) * seconds)
    lowest = int(np.argmin(joules))
    assert 0 < lowest < 32
    assert (np.diff(joules[: lowest + 1]) < 0).all() and (np.diff(joules[lowest:]) > 0).all()


@given(st.floats(0.3, 1.0), st.integers(1, 400), st.integers(1, 1500))
def test_a_slower_clock_lengthens_steps_but_less_than_in_proportion(clock: float, decodes: int, each: int) -> None:
    slow, fast = RooflineStepModel(LLAMA, A100, clock=clock), RooflineStepModel(LLAMA, A100)
    for args in ((decodes, decodes * each, [], []), (0, 0, [each], [0])):
        ratio = slow.step_s(*args) / fast.step_s(*args)
        assert clock**-MEMORY_CLOCK_EXPONENT - 1e-9 <= ratio <= 1 / clock + 1e-9
    memory = RooflineStepModel(LLAMA, A100, clock=clock).step_s(1, each, [], [])
    assert memory == pytest.approx(fast.step_s(1, each, [], []) * clock**-MEMORY_CLOCK_EXPONENT, rel=1e-6)


@given(
    st.integers(1, 700),
    st.integers(0, 2_000),
    st.integers(0, 3_000),
    st.sampled_from([1, 16, 128]),
    st.floats(0.0, 1.0),
)
def test_tiles_round_the_batch_and_the_line_in_the_context_stays_exact(
    decodes: int, each: int, more: int, tile: int, share: float
) -> None:
    context = decodes * each
    for base in (RooflineStepModel(LLAMA, A100), LinearStepModel(0.01, 1e-4, 1e-8, 1e-5)):
        model = TiledStepModel(base, tile, share)
        up = -(-decodes // tile) * tile
        low, high = base.step_s(decodes, context, [], []), base.step_s(up, context, [], [])
        assert model.step_s(decodes, context, [], []) == pytest.approx((1 - share) * low + share * high, rel=1e-12)
        intercept, slope, limit = model.decode_affine(decodes, context)
        assert limit >= context
        for at in {context, int(min(limit, context + more))}:
            assert intercept + slope * at == pytest.approx(model.step_s(decodes, at, [], []), rel=1e-12)
        assert model.step_s(decodes, context, [7], [3]) == base.step_s(decodes, context, [7], [3])


def test_tiles_step_at_each_multiple_and_are_flat_between() -> None:
    model = TiledStepModel(LinearStepModel(0.01, 1e-4), 128)
    seconds = [model.step_s(b, 0, [], []) for b in range(1, 400)]
    assert [b + 1 for b in range(1, 399) if seconds[b] != seconds[b - 1]] == [129, 257, 385]
    assert model.decode_affine(0, 0) == LinearStepModel(0.01, 1e-4).decode_affine(0, 0)


def test_levels_that_do_not_rise_are_refused() -> None:
    step = LinearStepModel(0.01)
    with pytest.raises(PenstockError, match="do not rise"):
        InstanceSpec(Role.DECODE, step, 10, clocks=(ClockLevel(1410.0, step), ClockLevel(1005.0, step)))
