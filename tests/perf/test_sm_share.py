"""Parts of a GPU: the curve, the parts' step times, and what two parts do to each other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.perf.contention import Contention, Phases, stretch
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.sm_share import SharedGpu, SmCurve, bandwidth_share, shared_gpu, sm_count
from penstock.perf.step import LinearStepModel

MODEL = RooflineStepModel(model_spec("qwen3-8b"), hardware_spec("h100"))
GPU = shared_gpu(MODEL)


def test_curve() -> None:
    curve = SmCurve(132)
    assert (curve.compute(66), curve.bandwidth(66), curve.bandwidth(40)) == (0.5, 1.0, 1.0)
    assert curve.bandwidth(6) == pytest.approx(6 / (0.3 * 132))
    assert list(SmCurve(10).parts()) == [2, 4, 6, 8]
    assert SmCurve(11).parts()[-1] == 8  # the other part keeps a whole unit
    assert sm_count(hardware_spec("h100")) == 132
    assert bandwidth_share(hardware_spec("h100"), 20) == pytest.approx(20 / 39.6)


@pytest.mark.parametrize(("sms", "saturation"), [(2, 0.3), (132, 0.0), (132, 1.1)])
def test_bad_curves(sms: int, saturation: float) -> None:
    with pytest.raises(PenstockError):
        SmCurve(sms, saturation)


def test_what_cannot_be_divided_says_so() -> None:
    with pytest.raises(PenstockError, match="does not know the SMs"):
        shared_gpu(LinearStepModel(0.01))
    with pytest.raises(PenstockError, match="part of the GPU"):
        SharedGpu(LinearStepModel(0.01), SmCurve(132)).on(2)
    unknown = hardware_spec("spad-decode")
    with pytest.raises(PenstockError, match="number of SMs of spad-decode"):
        sm_count(unknown)


def test_a_part_is_the_same_step_at_other_rates() -> None:
    half = MODEL.part(0.5, 1.0)
    slow = MODEL.part(1.0, 0.5)
    both = MODEL.part(0.5, 0.5)
    whole = MODEL.step_s(64, 64 * 2049, [500], [100])
    assert both.step_s(64, 64 * 2049, [500], [100]) == pytest.approx(2 * whole)
    assert whole < half.step_s(64, 64 * 2049, [500], [100]) < 2 * whole
    assert whole < slow.step_s(64, 64 * 2049, [500], [100]) < 2 * whole
    assert MODEL.part(1.0, 1.0).step_s(64, 64 * 2049, [500], [100]) == whole
    assert half.sms() == 132


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 256), st.integers(1, 4000))
def test_more_sms_never_take_longer(unit: int, decodes: int, mean: int) -> None:
    few, more = GPU.on(2 * unit), GPU.on(2 * unit + 2)
    assert more.step_s(decodes, decodes * mean, [], []) <= few.step_s(decodes, decodes * mean, [], [])
    assert more.step_s(0, 0, [mean], [0]) <= few.step_s(0, 0, [mean], [0])


def test_phases_of_a_decode_step_and_of_a_prefill() -> None:
    contention = Contention(GPU)
    decode = contention.phases(10, lambda m: m.step_s(16, 16 * 2049, [], []))
    assert decode.total_s() == pytest.approx(GPU.on(10).step_s(16, 16 * 2049, [], []))
    assert decode.compute_s == pytest.approx(0.0, abs=1e-6)
    assert decode.memory_draw == pytest.approx(10 / 39.6)
    prefill = contention.phases(122, lambda m: m.step_s(0, 0, [8192], [0]))
    assert prefill.total_s() == pytest.approx(GPU.on(122).step_s(0, 0, [8192], [0]))
    assert prefill.memory_s < 0.1 * prefill.compute_s  # norms and activations only
    # All bytes are accounted for: about 15 GB of weights, 45 in and out of matrix products, 47 of norms and
    # activations, 5 of queries and KV.
    drawn = prefill.memory_s * prefill.memory_draw + prefill.compute_s * prefill.compute_draw
    assert 108e9 < drawn * hardware_spec("h100").bandwidth_Bps * 0.8 < 118e9


def test_two_streams_that_want_all_the_memory_take_twice_as_long() -> None:
    stream = Phases(0.0, 1.0, 1.0, 1.0)
    assert stretch(stream, stream) == pytest.approx((2.0, 2.0))
    assert stretch(stream, stream, together=0.8) == pytest.approx((2.5, 2.5))
    modest = Phases(1.0, 0.0, 0.3, 1.0)
    assert stretch(Phases(0.0, 1.0, 0.6, 0.6), modest) == (1.0, 1.0)
    assert stretch(stream, modest) == pytest.approx((1.3, 1.3))


def test_chance_meetings() -> None:
    """Half of the other's time, as it then is, wants memory: x = 1 / (1 + 1 / slowdown)."""
    stream = Phases(0.0, 1.0, 1.0, 1.0)
    mixed = Phases(1.0, 1.0, 0.0, 1.0)
    slow_stream, slow_mixed = stretch(stream, mixed)
    assert slow_mixed == pytest.approx((1.0 + 2.0) / 2.0)  # its memory half always meets the stream
    assert slow_stream == pytest.approx(1.0 / (1.0 - 0.5 * 2.0 / 3.0))


phases = st.builds(
    lambda compute, memory, low, high: Phases(compute, memory, low * high, high),
    st.floats(0.0, 1.0),
    st.floats(0.001, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.05, 1.0),
)


@settings(deadline=None)
@given(phases, phases, st.floats(0.5, 1.0))
def test_no_more_is_drawn_than_there_is(one: Phases, other: Phases, together: float) -> None:
    slow_one, slow_other = stretch(one, other, together)
    assert slow_one >= 1.0 and slow_other >= 1.0
    assert (slow_other, slow_one) == pytest.approx(stretch(other, one, together))
    if one.memory_draw <= together and other.memory_draw <= together:
        drawn = 0.0
        for part, slow in ((one, slow_one), (other, slow_other)):
            moved = part.compute_s * part.compute_draw + part.memory_s * part.memory_draw
            drawn += moved / (part.total_s() * slow)
        assert drawn <= together * (1.0 + 1e-6)
