"""The lines stay below the steps of every kind of model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.types import Role
from penstock.perf.fitted import COEFFICIENT_UNITS, FittedStepModel
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.step import LinearStepModel, StepModel
from penstock.rank.lines import Line, lines_below
from penstock.sim.cluster import InstanceSpec

BUDGET, SEQS = 512, 64

chunks = st.lists(st.tuples(st.integers(1, 128), st.integers(0, 4000)), max_size=3)
steps = st.tuples(st.integers(0, SEQS - 3), st.integers(1, 8000), chunks)


def floor_s(line: Line, decodes: int, each: int, parts: list[tuple[int, int]]) -> float:
    """The line's word on a step: pairs of a chunk are those of the half of the prompt it sees."""
    pairs = sum(q * (c + q / 2) for q, c in parts)
    chunks_s = sum(line.chunk_s + line.prompt_s * q for q, _ in parts)
    return line.step_s + decodes * (line.decode_s + line.context_s * each) + chunks_s + line.pair_s * pairs


def stays_below(model: StepModel, step: tuple[int, int, list[tuple[int, int]]]) -> None:
    decodes, each, parts = step
    if decodes == 0 and not parts:
        return
    spec = InstanceSpec(Role.MIXED, model, 1000, max_num_seqs=SEQS, max_num_batched_tokens=BUDGET)
    took = model.step_s(decodes, decodes * each, [q for q, _ in parts], [c for _, c in parts])
    lines = lines_below(spec)
    assert lines
    for line in lines:
        assert min(line.step_s, line.decode_s, line.context_s, line.chunk_s, line.prompt_s, line.pair_s) >= 0
        assert floor_s(line, decodes, each, parts) <= took * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3"]),
    st.sampled_from(["a100-80g", "h100", "l40s"]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(["bf16", "fp8"]),
    st.sampled_from([0.0, 5e-6]),
    steps,
)
def test_below_the_roofline(
    model: str, card: str, tp: int, kv: str, dispatch_s: float, step: tuple[int, int, list[tuple[int, int]]]
) -> None:
    step_model = RooflineStepModel(model_spec(model), hardware_spec(card), tp, kv_dtype=kv, dispatch_s=dispatch_s)
    stays_below(step_model, step)


coefficient = st.floats(0, 1e-3)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[coefficient] * len(COEFFICIENT_UNITS)), steps)
def test_below_a_fitted_model(values: tuple[float, ...], step: tuple[int, int, list[tuple[int, int]]]) -> None:
    stays_below(FittedStepModel(dict(zip(COEFFICIENT_UNITS, values, strict=True))), step)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[coefficient] * 5), steps)
def test_below_a_linear_model(values: tuple[float, ...], step: tuple[int, int, list[tuple[int, int]]]) -> None:
    stays_below(LinearStepModel(*values), step)


def test_the_steepest_line_is_the_full_step() -> None:
    """A prompt as long as the budget takes what the steepest line says, but for the reading of weights."""
    model = RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec("a100-80g"))
    spec = InstanceSpec(Role.PREFILL, model, 1000, max_num_batched_tokens=8192)
    best = max(floor_s(line, 0, 0, [(8192, 0)]) for line in lines_below(spec))
    assert best >= 0.98 * model.step_s(0, 0, [8192], [0])


def test_an_unknown_model_has_no_line() -> None:
    assert lines_below(InstanceSpec(Role.MIXED, StepModel(), 10)) == ()
