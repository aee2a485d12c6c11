"""Model catalogue: parameter counts of the published models, and configurations read from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.perf.models import expected_experts, from_hf_config, model_names, model_spec


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("llama-3.1-8b", 8.03, 7.5),
        ("llama-3.1-70b", 70.6, 69.5),
        ("llama-2-70b", 69.0, 68.7),
        ("qwen2.5-7b", 7.62, 7.07),
        ("deepseek-r1-distill-qwen-7b", 7.62, 7.07),
        ("qwen3-8b", 8.19, 7.57),
        ("qwen3-32b", 32.8, 32.0),
        ("qwen3-30b-a3b", 30.5, 3.04),
        ("qwen3-235b-a22b", 235.1, 21.6),
        ("deepseek-v3", 671.0, 36.6),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, billions: float, active: float) -> None:
    spec = model_spec(name)
    assert spec.params() / 1e9 == pytest.approx(billions, rel=2e-3)
    assert spec.active_params() / 1e9 == pytest.approx(active, rel=1e-2)
    assert name in model_names()
    assert spec.source.startswith("https://huggingface.co/")


def test_lookup_ignores_case_and_names_close_matches() -> None:
    assert model_spec("Llama-3.1-8B") is model_spec("llama-3.1-8b")
    with pytest.raises(PenstockError, match=r"did you mean llama-3\.1-8b") as caught:
        model_spec("llama-31-8b")
    assert "config.json" in caught.value.remedy


def test_reads_a_config_file_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    spec = model_spec(str(folder))
    assert spec == model_spec(str(folder / "config.json"))
    assert spec.name == "my-model"
    assert spec.head_dim == 128  # not in the file: hidden / heads
    assert spec.params() / 1e9 == pytest.approx(46.7, rel=2e-3)  # Mixtral-8x7B
    assert spec.moe_layers == 32


def test_head_dim_comes_from_the_config_where_it_is_given() -> None:
    # 5120 / 64 heads would be 80; the model has 128.
    assert model_spec("qwen3-32b").head_dim == 128


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 1,\n oops}')
    with pytest.raises(PenstockError, match=r"config\.json:2: not JSON"):
        model_spec(str(path))
    with pytest.raises(PenstockError, match="num_attention_heads"):
        from_hf_config({"hidden_size": 64}, "x")


def test_weights_split_over_tensor_and_expert_parallel_ranks() -> None:
    dense = model_spec("llama-3.1-8b")
    assert dense.weight_bytes() == pytest.approx(2 * dense.params())
    assert dense.weight_bytes(tp=4) == pytest.approx(dense.weight_bytes() / 4)
    moe = model_spec("qwen3-30b-a3b")
    saved = moe.weight_bytes() - moe.weight_bytes(ep=2)
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    assert saved == pytest.approx(experts / 2)
    assert model_spec("deepseek-v3").weight_bytes() < 0.52 * 2 * model_spec("deepseek-v3").params()  # fp8


def test_expected_experts_from_one_token_to_all() -> None:
    assert expected_experts(128, 8, 1) == pytest.approx(8.0)
    assert expected_experts(128, 8, 2) == pytest.approx(8 + 8 * 120 / 128)
    assert expected_experts(128, 8, 10_000) == pytest.approx(128.0)
    assert expected_experts(0, 0, 5) == 0.0
