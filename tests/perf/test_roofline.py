"""Roofline: DuetServe's published vectors, limits of its terms, and SPAD's relative performance."""

from __future__ import annotations

import pytest

from penstock.perf.hardware import hardware_spec
from penstock.perf.models import ModelSpec, model_spec
from penstock.perf.roofline import (
    DEFAULT_ATTENTION_MBU,
    DEFAULT_ATTENTION_MFU,
    DEFAULT_MBU,
    KERNELS_PER_LAYER,
    RooflineStepModel,
)
from penstock.perf.transfer import collective_link


def duetserve() -> RooflineStepModel:
    """The set-up of the published vectors: the whole rectangle of attention, no element-wise kernels."""
    return RooflineStepModel(
        model_spec("qwen3-8b"),
        hardware_spec("h100"),
        mfu=0.62,
        mbu=0.9,
        attention_mfu=0.62,
        attention_mbu=0.9,
        causal=False,
        elementwise=False,
    )


def test_duetserve_vectors() -> None:
    model = duetserve()
    context = 64 * 2049  # 2048 cached and the new token
    assert round(model.step_s(64, context, [], []) * 1e3, 1) == 11.6
    assert round(model.step_s(0, 0, [8192], [0]) * 1e3) == 251
    assert round(model.step_s(64, context, [8128], [0]) * 1e3) == 256


def test_causal_attention_halves_the_pairs_of_a_fresh_prompt() -> None:
    h100, model = hardware_spec("h100"), model_spec("qwen3-8b")
    whole = RooflineStepModel(model, h100, causal=False)
    half = RooflineStepModel(model, h100, causal=True)
    rest = whole.tokens_s(8192) + whole.rows_s(1)
    ratio = (half.step_s(0, 0, [8192], [0]) - rest) / (whole.step_s(0, 0, [8192], [0]) - rest)
    assert ratio == pytest.approx(0.5, rel=1e-3)


def test_chunks_cost_the_same_pairs_in_any_split() -> None:
    model = RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec("h100"))

    def attention(new: list[int], past: list[int]) -> float:
        return model.step_s(0, 0, new, past) - model.tokens_s(sum(new)) - model.rows_s(len(new))

    assert attention([2048], [0]) + attention([2048], [2048]) == pytest.approx(attention([4096], [0]), rel=0.01)


def test_dispatch_limits() -> None:
    spec, card = model_spec("llama-3.1-8b"), hardware_spec("h100")
    free = RooflineStepModel(spec, card)
    slow = RooflineStepModel(spec, card, dispatch_s=1e-3)
    kernels = KERNELS_PER_LAYER * spec.layers + 4
    # A host that slow hides everything: the step is kernels x dispatch, whatever the batch.
    assert slow.step_s(1, 100, [], []) == slow.step_s(128, 128_000, [], []) == pytest.approx(kernels * 1e-3)
    # Flat in the batch until the roofline crosses the floor.
    some = RooflineStepModel(spec, card, dispatch_s=2e-5)
    assert some.step_s(1, 100, [], []) == some.step_s(8, 800, [], []) == pytest.approx(kernels * 2e-5)
    assert some.step_s(128, 300_000, [], []) == free.step_s(128, 300_000, [], [])


def test_all_reduce_formula() -> None:
    model = RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec("h100"), tp=4, mfu=0.5, alpha_s=1e-6)
    size = 2048 * 4096 * 2.0
    rate = collective_link(hardware_spec("h100"))[0]
    by_hand = 2 * 3 * 1e-6 + 2 * 3 * size / (4 * rate) + 4 * 3 * size / (989.4e12 * 0.5)
    assert model.all_reduce_s(size) == pytest.approx(by_hand)
    assert RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec("h100")).all_reduce_s(size) == 0.0


def test_tensor_parallelism_speeds_up_but_not_linearly() -> None:
    spec, card = model_spec("llama-3.1-70b"), hardware_spec("h100")
    one, four = RooflineStepModel(spec, card), RooflineStepModel(spec, card, tp=4)
    for step in ((32, 64_000, [], []), (0, 0, [4096], [0])):
        ratio = one.step_s(*step) / four.step_s(*step)
        assert 2.0 < ratio < 4.0


def test_experts_are_read_as_they_are_touched() -> None:
    model = RooflineStepModel(model_spec("qwen3-30b-a3b"), hardware_spec("h100"))
    expert = 3 * 2048 * 768 * 2 / (3352e9 * DEFAULT_MBU)
    assert model.moe_s(1) == pytest.approx(8 * expert, rel=0.01)
    assert 128 * expert < model.moe_s(1024) < 1.4 * 128 * expert
    assert model.moe_s(0) == 0.0
    # Two ranks share the experts: a rank reads half of those that both ranks' tokens touch.
    shared = RooflineStepModel(model_spec("qwen3-30b-a3b"), hardware_spec("h100"), ep=2, alpha_s=0.0)
    assert shared.moe_s(256) < model.moe_s(256)


def test_latent_attention_is_bound_by_compute_on_h20_and_by_memory_on_b200() -> None:
    spec = model_spec("deepseek-v3")
    # 128 heads share 576 numbers: 242 FLOP a byte, beyond the ridge of an H20, short of a B200's.
    by_compute = RooflineStepModel(spec, hardware_spec("h20"), tp=1).decode_affine(64, 64 * 4096)[1]
    flop = 61 * 128 * (2 * 576 + 2 * 512 + 2)
    assert by_compute == pytest.approx(flop / (148e12 * DEFAULT_ATTENTION_MFU))
    by_memory = RooflineStepModel(spec, hardware_spec("b200"), attention_mfu=0.9).decode_affine(64, 64 * 4096)[1]
    assert by_memory == pytest.approx(61 * 576 * 2 / (8000e9 * DEFAULT_ATTENTION_MBU))


def test_spad_chips_relative_to_h100() -> None:
    """SPAD, chip table: prefill 1.08 and 0.69, decode 0.80 and 0.97 of an H100 (BLOOM-176B, TP8)."""
    bloom = ModelSpec(
        name="bloom-176b", layers=70, hidden=14336, heads=112, kv_heads=112, head_dim=128,
        intermediate=57344, vocab=250880, mlp_matrices=2, tied_embeddings=True,
    )  # fmt: skip
    prefill, decode = {}, {}
    for chip in ("h100", "spad-prefill", "spad-decode"):
        model = RooflineStepModel(bloom, hardware_spec(chip), tp=8)
        prefill[chip] = model.step_s(0, 0, [1024, 1024], [0, 0])
        decode[chip] = model.step_s(64, 64 * 1024, [], [])
    # The decode chip decodes as fast as an H100 and prefills at about its share of FLOP/s.
    assert decode["h100"] / decode["spad-decode"] == pytest.approx(0.97, abs=0.1)
    assert prefill["h100"] / prefill["spad-decode"] == pytest.approx(0.69, abs=0.12)
    # The prefill chip: more compute than the paper's 1.08 shows, because a roofline has no tiling losses.
    assert 1.0 < prefill["h100"] / prefill["spad-prefill"] < 1.95
    assert 0.55 < decode["h100"] / decode["spad-prefill"] < 0.85
