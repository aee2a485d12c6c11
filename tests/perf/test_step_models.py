"""What must hold for every step model: the straight line agrees with the step, and more work never takes less time."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.perf.fitted import FittedStepModel
from penstock.perf.hardware import hardware_names, hardware_spec
from penstock.perf.models import model_names, model_spec
from penstock.perf.operators import AttentionTable, OperatorStepModel
from penstock.perf.profile_io import builtin_profiles, load_profile
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.step import LinearStepModel, StepModel


def toy_operators() -> OperatorStepModel:
    """Three layers of a made-up model: attention bends at 100 and 1000 tokens."""
    kv = [10, 100, 1000]
    decode = [[1e-5, 2e-5, 8e-5], [2e-5, 5e-5, 3e-4], [4e-5, 1e-4, 9e-4]]
    prefill = [[1e-5, 5e-5], [6e-5, 3e-4]]
    mixed = [
        [[[p] * 3, [p + 1e-5, p + 4e-5, p + 3e-4], [p + 3e-5, p + 2e-4, p + 2e-3]] for p in row] for row in prefill
    ]
    table = AttentionTable(
        [1, 8, 64], kv, decode, [16, 512], [0, 1024], prefill, [0, 8, 64], mixed, [1.0, 1.05, 1.02], [1.0, 1.1, 1.0]
    )
    dense = [0.0, *(1e-4 + 1e-6 * (-(-n // 64)) for n in range(1, 600))]
    return OperatorStepModel(
        layers=3, dense_s=dense, once_s=dense, rows_s=[1e-6 * n for n in range(65)], attention=table,
        pad=[0, 1, 2, 4, 4], overhead_s=1e-4, eager_gap_s=1e-3,
    )  # fmt: skip


@cache
def every_model() -> dict[str, StepModel]:
    h100 = hardware_spec("h100")
    found: dict[str, StepModel] = {
        "linear": LinearStepModel(0.01, 1e-5, 1e-8, 1e-6, 1e-9),
        "fitted": FittedStepModel({"base_s": 0.01, "per_context_s": 1e-7, "per_prefill_s": 1e-5}),
        "operators": toy_operators(),
        "roofline": RooflineStepModel(model_spec("llama-3.1-8b"), h100),
        "roofline moe": RooflineStepModel(model_spec("qwen3-30b-a3b"), h100, ep=2, overhead_s=1e-3),
        "roofline mla tp8": RooflineStepModel(model_spec("deepseek-v3"), h100, tp=8),
        # Latent attention is compute-bound on a card with little compute, memory-bound on one with much.
        "roofline mla": RooflineStepModel(model_spec("deepseek-v3"), hardware_spec("h20"), tp=8),
        "roofline dispatch": RooflineStepModel(model_spec("qwen3-8b"), h100, dispatch_s=3e-5),
        "roofline mla dispatch": RooflineStepModel(model_spec("deepseek-v3"), h100, tp=8, dispatch_s=5e-5),
    }
    found |= {name: load_profile(name).model for name in builtin_profiles()}
    return found


NAMES = sorted(every_model())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(decodes=st.integers(1, 300), mean=st.floats(1.0, 30_000.0), where=st.floats(0.0, 1.0))
def test_the_line_agrees_with_the_step(name: str, decodes: int, mean: float, where: float) -> None:
    model = every_model()[name]
    context = max(decodes, int(decodes * mean))
    intercept, slope, limit = model.decode_affine(decodes, context)
    assert limit >= context
    end = limit if math.isfinite(limit) else 4.0 * context + 1000
    for c in (context, int(end), int(context + where * (end - context))):
        assert intercept + slope * c == pytest.approx(model.step_s(decodes, c, [], []), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    decodes=st.integers(0, 200),
    mean=st.integers(16, 8192),
    new=st.lists(st.integers(16, 1024), min_size=1, max_size=3),
    past=st.integers(0, 4096),
)
def test_prefill_costs_time(name: str, decodes: int, mean: float, new: list[int], past: int) -> None:
    model = every_model()[name]
    context = int(decodes * mean)
    alone = model.step_s(0, 0, new, [past] * len(new))
    assert 0.0 < alone < math.inf
    assert model.step_s(decodes, context, new, [past] * len(new)) >= alone * (1 - 1e-9)
    # An engine computes no more pairs for the same tokens with less past.
    assert model.step_s(0, 0, new, [0] * len(new)) <= alone * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_step_takes_no_time(name: str) -> None:
    if name != "linear":  # its base is paid by definition
        assert every_model()[name].step_s(0, 0, [], []) == 0.0
        assert every_model()[name].decode_affine(0, 0) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize("hardware", hardware_names())
@pytest.mark.parametrize("model", model_names())
def test_roofline_of_every_pair_is_finite_and_decode_reads_the_weights(model: str, hardware: str) -> None:
    spec, card = model_spec(model), hardware_spec(hardware)
    roofline = RooflineStepModel(spec, card, tp=4)
    one = roofline.step_s(1, 1000, [], [])
    each = spec.weight_bytes_each
    least = each * (spec.active_params() - spec.vocab * spec.hidden) / 4 / card.bandwidth_Bps
    assert least < one < 0.5
    assert roofline.step_s(0, 0, [2048], [0]) > one
