"""Fitting measured steps, profile files, and operator profiles read from CSV."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.perf.distill import distill
from penstock.perf.fitted import COEFFICIENT_UNITS, FittedStepModel, fit_step_model
from penstock.perf.models import model_spec
from penstock.perf.operator_profile import capture_sizes, load_operator_profile, padding_table
from penstock.perf.operators import locate
from penstock.perf.profile_io import Profile, builtin_profiles, load_profile, save_profile
from penstock.perf.roofline import RooflineStepModel

from .conftest import shared
from .test_step_models import toy_operators

TRUTH = {
    "base_s": 0.011, "per_decode_s": 2e-5, "per_context_s": 9e-8, "prefill_base_s": 0.007, "per_prefill_s": 3.5e-5,
    "per_pair_s": 1.7e-9, "per_past_s": 3e-7, "per_chunk_s": 1e-4, "mixed_decode_s": 7e-5, "mixed_context_s": 2e-7,
}  # fmt: skip


def test_a_fit_finds_the_coefficients_that_made_the_steps() -> None:
    fit = distill(FittedStepModel(TRUTH), steps=400)
    for name, value in TRUTH.items():
        assert fit.model.coefficients[name] == pytest.approx(value, rel=1e-4), name
    assert fit.all.p99 < 1e-6
    assert fit.decode.steps == fit.prefill.steps == 200
    assert set(TRUTH) == set(COEFFICIENT_UNITS)


def test_a_fit_survives_noise_and_stays_positive() -> None:
    rng = random.Random(1)
    truth = FittedStepModel(TRUTH)
    decodes = [rng.randint(1, 128) for _ in range(400)]
    context = [n * rng.randint(100, 4000) for n in decodes]
    none: list[list[int]] = [[] for _ in decodes]
    seconds = [truth.step_s(n, c, [], []) * rng.gauss(1.0, 0.02) for n, c in zip(decodes, context, strict=True)]
    fit = fit_step_model(decodes, context, none, none, seconds)
    assert 0.01 < fit.decode.mean < 0.025
    assert abs(fit.decode.signed_mean) < 0.005
    assert fit.model.coefficients["per_context_s"] == pytest.approx(9e-8, rel=0.05)
    assert min(fit.model.coefficients.values()) >= 0.0
    # Decode steps only: a step with prefill still costs something.
    assert fit.model.step_s(0, 0, [100], [0]) > fit.model.step_s(1, 100, [], [])


def test_bad_measurements_are_refused() -> None:
    with pytest.raises(PenstockError, match="different lengths"):
        fit_step_model([1], [1, 2], [[]], [[]], [0.1])
    with pytest.raises(PenstockError, match="at least four steps"):
        fit_step_model([1], [1], [[]], [[]], [0.1])
    with pytest.raises(PenstockError, match="positive duration"):
        fit_step_model([1] * 5, [1] * 5, [[]] * 5, [[]] * 5, [0.1, 0.1, 0.0, 0.1, 0.1])


def test_profiles_survive_the_disk(tmp_path: Path) -> None:
    fitted = Profile(FittedStepModel(TRUTH), "x", "made up", "2026-11-21", {"gpu": "none"}, {"vllm": "0"})
    save_profile(fitted, tmp_path / "fitted.json")
    again = load_profile(tmp_path / "fitted.json")
    assert isinstance(again.model, FittedStepModel)
    assert again.model.coefficients == TRUTH
    assert (again.machine, again.date) == ({"gpu": "none"}, "2026-11-21")
    assert json.loads((tmp_path / "fitted.json").read_text())["units"]["per_pair_s"].startswith("s per pair")

    operators = toy_operators()
    save_profile(Profile(operators), tmp_path / "operators.json")
    model = load_profile(tmp_path / "operators.json").model
    for step in ((5, 700, [], []), (3, 2000, [64, 500], [0, 300]), (0, 0, [16], [5000])):
        assert model.step_s(*step) == operators.step_s(*step)


def test_bad_profiles_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("{")
    with pytest.raises(PenstockError, match=r"p\.json:1: not JSON"):
        load_profile(path)
    path.write_text('{"schema": "penstock.profile/1", "kind": "fitted", "fitted": {"base": 1}}')
    with pytest.raises(PenstockError, match="did you mean base_s"):
        load_profile(path)
    path.write_text('{"schema": "penstock.profile/1", "kind": "linear", "linear": {"base_s": 1}}')
    with pytest.raises(PenstockError, match="per_decode_s"):
        load_profile(path)
    path.write_text('{"schema": "other"}')
    with pytest.raises(PenstockError, match="schema is 'other'"):
        load_profile(path)
    with pytest.raises(PenstockError, match=r"did you mean rtx-4090/llama-3\.1-8b"):
        load_profile("rtx-4090/llama-3-8b")
    with pytest.raises(PenstockError, match="has no profile file"):
        from penstock.perf.hardware import hardware_spec

        save_profile(Profile(RooflineStepModel(model_spec("qwen3-8b"), hardware_spec("h100"))), path)


def test_shipped_profiles_say_where_they_come_from() -> None:
    assert len(builtin_profiles()) >= 3
    for name in builtin_profiles():
        profile = load_profile(name)
        assert profile.name == name
        assert len(profile.source) > 20
        assert profile.date >= "2026"
        assert profile.machine["gpu"]
        assert profile.versions["vllm"]
        assert profile.residuals["all"]["mean"] < 0.05


def test_capture_sizes_and_padding() -> None:
    sizes = capture_sizes(256)
    assert sizes[:5] == [1, 2, 4, 8, 16]
    assert sizes[-1] == 512
    assert capture_sizes(128)[-1] == 256
    table = padding_table(sizes)
    assert (table[0], table[3], table[9], table[257], table[512]) == (0, 4, 16, 272, 512)
    assert len(table) == 513


def test_locate() -> None:
    axis = [1, 2, 4, 8]
    assert [locate(axis, v) for v in (0.5, 1, 1.9, 2, 4, 7.9, 8, 99)] == [0, 0, 0, 1, 2, 2, 2, 2]


def write_profile(root: Path) -> None:
    dense = ["layer,tokens,time_us"]
    for layer, each in (("qkv_proj", 10), ("layernorm", 1), ("embedding", 2), ("final_layernorm", 3)):
        dense += [f"{layer},{n},{each * n}" for n in (1, 4, 16)]
    (root / "dense.csv").write_text("\n".join(dense))
    (root / "per_sequence.csv").write_text(
        "layer,sequences,time_us\nlm_head,1,100\nlm_head,8,170\nsampler,1,5\nsampler,8,12"
    )
    lines = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
    lines += [f"0,0,{n},{k},{n * k}" for n in (1, 2, 4) for k in (16, 32)]
    lines += [f"{c},{p},0,0,{c + p}" for c in (16, 32) for p in (0, 16)]
    lines += [
        f"{c},{p},{n},{k},{c + p + 2 * n * k}" for c in (16, 32) for p in (0, 16) for n in (1, 2) for k in (16, 32)
    ]
    # A point off the doubling grid, which is left out.
    lines += ["0,0,3,24,1"]
    (root / "attention.csv").write_text("\n".join(lines))


def test_columns_of_an_operator_profile(tmp_path: Path) -> None:
    write_profile(tmp_path)
    model = load_operator_profile(tmp_path, model_spec("llama-3.1-8b"))
    us = 1e-6
    # Two decodes of 24 tokens: 32 layers x (qkv + two norms) + embedding and norm + head and sampler + attention.
    rows = 110 + 6
    expected = 32 * (20 + 2 * 2) + (4 + 6) + rows + 32 * 2 * 24
    assert model.step_s(2, 48, [], []) == pytest.approx(expected * us)
    # The decodes cost twice as much beside a prompt; 18 tokens are padded to the captured 24.
    tokens = 32 * (24 * 10 + 2 * 24) + 24 * 5
    mixed = tokens + (100 + 70 * 2 / 7 + 5 + 2) + 32 * (16 + 2 * 2 * 24)
    assert model.step_s(2, 48, [16], [0]) == pytest.approx(mixed * us, rel=1e-6)


def test_bad_operator_profiles_are_named(tmp_path: Path) -> None:
    spec = model_spec("llama-3.1-8b")
    with pytest.raises(PenstockError, match=r"dense\.csv: no such file"):
        load_operator_profile(tmp_path, spec)
    write_profile(tmp_path)
    (tmp_path / "dense.csv").write_text("layer,tokens,time_us\nqkv_proj,1,ten")
    with pytest.raises(PenstockError, match=r"dense\.csv:2: 'ten' is not a number"):
        load_operator_profile(tmp_path, spec)
    write_profile(tmp_path)
    lines = (tmp_path / "attention.csv").read_text().splitlines()
    (tmp_path / "attention.csv").write_text("\n".join(line for line in lines if line != "16,0,2,32,144"))
    with pytest.raises(PenstockError, match="has 1 holes"):
        load_operator_profile(tmp_path, spec)
    (tmp_path / "attention.csv").write_text("a,b\n1,2")
    with pytest.raises(PenstockError, match="no column prefill_chunk"):
        load_operator_profile(tmp_path, spec)


@pytest.mark.parametrize(
    ("card", "model", "name"),
    [
        ("RTX4090", "meta-llama/Llama-3.1-8B", "rtx-4090/llama-3.1-8b"),
        ("RTXPRO6000", "meta-llama/Llama-3.1-8B", "rtx-pro-6000/llama-3.1-8b"),
        ("RTXPRO6000", "Qwen/Qwen3-32B", "rtx-pro-6000/qwen3-32b"),
    ],
)
def test_shipped_profiles_meet_the_measured_operators(card: str, model: str, name: str) -> None:
    folder = shared(f"ground_truth/perf/{card}/{model}/bf16/tp1")
    operators = load_operator_profile(folder, model_spec(name.split("/")[1]))
    fitted = load_profile(name).model
    for decodes in (1, 16, 64, 128):
        for mean in (200, 1000, 3000):
            context = decodes * mean
            measured = operators.step_s(decodes, context, [], [])
            assert fitted.step_s(decodes, context, [], []) == pytest.approx(measured, rel=0.08)
            measured = operators.step_s(decodes, context, [1500], [0])
            assert fitted.step_s(decodes, context, [1500], [0]) == pytest.approx(measured, rel=0.15)
    # Decode of one short sequence is bound by reading 15 GB of weights at the card's bandwidth.
    weights = 2.0 * (operators.layers * 218_103_808 + 128_256 * 4096)
    if "llama" in name:
        rate = 1008e9 if card == "RTX4090" else 1597e9
        assert 0.75 < weights / rate / operators.step_s(1, 100, [], []) < 1.0
