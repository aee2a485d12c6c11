"""Hardware catalogue, KV capacity and transfer links."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.perf.hardware import hardware_names, hardware_spec
from penstock.perf.kv import kv_bytes_per_token, kv_capacity
from penstock.perf.models import model_spec
from penstock.perf.transfer import HANDSHAKE_S, Link, link_between

from .conftest import shared


@pytest.mark.parametrize("name", hardware_names())
def test_every_figure_has_a_source_and_a_sane_size(name: str) -> None:
    spec = hardware_spec(name)
    for key in ("memory_bytes", "bandwidth_Bps", "scale_up_Bps", "pcie_Bps", "nic_Bps", "tdp_w"):
        assert len(spec.sources[key]) > 10
    for dtype in spec.flops:
        assert len(spec.sources[f"flops.{dtype}"]) > 10
    assert 1e14 < spec.flops_of("bf16") < 1e16
    # Bytes per FLOP: every accelerator ever sold lies in this band, so a slip of a power of ten shows.
    assert 50 < spec.flops_of("bf16") / spec.bandwidth_Bps < 1000 or name == "h20"
    assert 5e11 < spec.bandwidth_Bps < 1e13
    assert 20 * 2**30 < spec.usable_bytes < spec.memory_bytes


def test_lookup() -> None:
    assert hardware_spec("H100") is hardware_spec("h100")
    assert hardware_spec("a100").name == "a100-80g"
    with pytest.raises(PenstockError, match="did you mean rtx-4090"):
        hardware_spec("rtx-4080")
    assert hardware_spec("a100-80g").flops_of("fp8") == hardware_spec("a100-80g").flops_of("bf16")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("qwen2.5-7b", 57_344),
        ("llama-3.1-8b", 131_072),
        ("llama-2-70b", 327_680),
        ("qwen3-30b-a3b", 98_304),
        ("deepseek-v3", 70_272),
    ],
)
def test_kv_bytes_per_token(name: str, size: int) -> None:
    spec = model_spec(name)
    assert kv_bytes_per_token(spec) == size
    assert kv_bytes_per_token(spec, "fp8") == size // 2


def test_kv_under_tensor_parallelism() -> None:
    llama = model_spec("llama-3.1-8b")
    assert kv_bytes_per_token(llama, tp=4) == 131_072 // 4
    # Eight KV heads on sixteen GPUs: each head is held twice.
    assert kv_bytes_per_token(llama, tp=16) == 131_072 // 8
    assert kv_bytes_per_token(model_spec("deepseek-v3"), tp=8) == 70_272
    with pytest.raises(PenstockError, match="does not divide 32"):
        kv_bytes_per_token(llama, tp=3)
    with pytest.raises(PenstockError, match="number type"):
        kv_bytes_per_token(llama, "bf61")


def test_capacity_is_near_what_vllm_found_on_the_rtx_4090() -> None:
    meta = json.loads(shared("ground_truth/RTX4090/Llama-3.1-8B/meta.json").read_text())
    found = kv_capacity(model_spec("llama-3.1-8b"), hardware_spec("rtx-4090"), memory_utilization=0.9)
    assert found.blocks == pytest.approx(meta["kv_cache"]["num_gpu_blocks"], rel=0.03)
    assert hardware_spec("rtx-4090").usable_bytes == pytest.approx(
        meta["hardware"]["device_total_memory_bytes"], rel=1e-3
    )


def test_too_large_a_model_says_what_to_do() -> None:
    with pytest.raises(PenstockError, match="tensor parallelism 4 or more"):
        kv_capacity(model_spec("llama-3.1-70b"), hardware_spec("h100"))
    assert kv_capacity(model_spec("llama-3.1-70b"), hardware_spec("h100"), tp=4).tokens > 100_000
    with pytest.raises(PenstockError, match="not in"):
        kv_capacity(model_spec("llama-3.1-8b"), hardware_spec("h100"), memory_utilization=1.5)


@given(util=st.floats(0.5, 1.0), more=st.floats(0.0, 0.3))
def test_capacity_grows_with_utilisation(util: float, more: float) -> None:
    model, card = model_spec("qwen2.5-7b"), hardware_spec("h100")
    low = kv_capacity(model, card, memory_utilization=util)
    high = kv_capacity(model, card, memory_utilization=min(util + more, 1.0))
    assert high.tokens >= low.tokens
    assert low.tokens % low.block_size == 0


def test_links_by_hardware() -> None:
    h100, l40s, h20 = hardware_spec("h100"), hardware_spec("l40s"), hardware_spec("h20")
    assert link_between(h100, h20).kind == "nvlink"
    assert link_between(h100, l40s).kind == "pcie"
    assert link_between(h100, hardware_spec("mi300x")).kind == "pcie"
    assert link_between(hardware_spec("mi300x"), hardware_spec("mi300x")).kind == "xgmi"
    rdma = link_between(h100, h100, same_node=False)
    assert rdma.kind == "rdma"
    # 32K tokens of a 7B model with 56 KiB a token at 400 Gb/s: about 40 ms at full rate (ARES notes).
    assert rdma.transfer_s(32_768 * 57_344) == pytest.approx(0.0376 / 0.8, rel=0.01)
    assert link_between(h100, h100, tp=2, same_node=False).bandwidth_Bps == 2 * rdma.bandwidth_Bps
    with pytest.raises(PenstockError, match="has no nvlink"):
        link_between(h100, l40s, kind="nvlink")
    with pytest.raises(PenstockError, match="unknown link"):
        link_between(h100, h100, kind="pigeon")
    with pytest.raises(PenstockError, match="not positive"):
        Link("rdma", 0.0)


@given(size=st.integers(0, 10**12), share=st.floats(0.01, 1.0))
def test_transfer_time(size: int, share: float) -> None:
    link = link_between(hardware_spec("h100"), hardware_spec("h100"), same_node=False)
    alone = link.transfer_s(size)
    assert link.transfer_s(size, share=share) >= alone >= link.latency_s
    assert link.transfer_s(size, first_contact=True) == pytest.approx(alone + HANDSHAKE_S)


def test_importing_the_catalogues_pulls_in_neither_numpy_nor_scipy() -> None:
    code = (
        "import sys, penstock.perf.roofline, penstock.perf.transfer, penstock.perf.kv, penstock.perf.profile_io;"
        "sys.exit(bool({'numpy', 'scipy', 'polars'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
