"""``penstock profile`` on emulated engines whose true costs are known, and its parts on figures made up."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvloop

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.live.emulated import EmulatedFleet, EmulatedSettings
from penstock.live.load.measure.campaign import Limits, experiments
from penstock.live.load.measure.probes import ALONE, Probe, Row
from penstock.live.load.measure.run import fit_rows, front_end_s
from penstock.live.load.measure.transfer import _fit as fit_transfer
from penstock.perf.fitted import FittedStepModel
from penstock.perf.profile_io import load_profile
from penstock.sim.cluster import InstanceSpec

from ...cli.support import document, ok, penstock
from .scripted import serving

TRUTH = FittedStepModel({
    "base_s": 0.015, "per_decode_s": 1e-3, "per_context_s": 2e-6, "prefill_base_s": 0.02, "per_prefill_s": 1e-4,
    "per_pair_s": 1e-8, "per_past_s": 2e-6, "per_chunk_s": 3e-3, "mixed_decode_s": 2e-3, "mixed_context_s": 3e-6,
})  # fmt: skip
KV_BYTES, LINK = 131072.0, 1e9


def shapes(seed: int = 0, n: int = 60) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    rng = random.Random(seed)
    found = []
    for i in range(n):
        decodes = rng.choice((1, 2, 4, 8)) if i % 3 else 0
        chunks = () if i % 3 == 1 else tuple(rng.randint(16, 500) for _ in range(rng.randint(1, 3)))
        past = tuple(rng.choice((0, 128, 512)) for _ in chunks)
        found.append((decodes, decodes * rng.randint(40, 2000), chunks, past))
    return found


def row(shape: tuple[int, int, tuple[int, ...], tuple[int, ...]], factor: float = 1.0, kind: str = "x") -> Row:
    decodes, context, new, past = shape
    return Row(kind, decodes, context, new, past, factor * TRUTH.step_s(decodes, context, list(new), list(past)))


def test_exact_rows_give_the_true_model_whatever_the_front_end_adds() -> None:
    rows = [row(shape) for shape in shapes()]
    alone = [Row(ALONE, 0, 0, (q,), (0,), TRUTH.step_s(0, 0, [q], [0]) + 0.004) for q in (16, 64, 300)]
    fit, dropped = fit_rows(rows + alone)
    assert dropped == 0
    assert fit.model.coefficients == pytest.approx(TRUTH.coefficients, rel=1e-3)
    assert front_end_s(rows + alone, fit.model) == pytest.approx(0.004, rel=1e-3)
    # A model that is wrong about everything drops nothing.
    noisy = [row(shape, factor=1 + 0.6 * (i % 2)) for i, shape in enumerate(shapes())]
    assert fit_rows(noisy)[1] == 0


def test_a_few_hiccups_are_left_out_and_counted() -> None:
    rows = [row(shape, factor=3.0 if i in (7, 30) else 1.0) for i, shape in enumerate(shapes())]
    fit, dropped = fit_rows(rows)
    assert dropped == 2
    assert fit.all.p99 < 1e-3


def test_one_prompt_a_step_leaves_no_cost_of_a_chunk() -> None:
    rows = [row((d, c, new[:1], past[:1])) for d, c, new, past in shapes()]
    found = fit_rows(rows)[0].model.coefficients
    assert found["per_chunk_s"] == 0
    both = TRUTH.coefficients["prefill_base_s"] + TRUTH.coefficients["per_chunk_s"]
    assert found["prefill_base_s"] == pytest.approx(both, rel=1e-3)
    with pytest.raises(PenstockError, match="too few to fit"):
        fit_rows([one for one in rows if one.chunk_new])


def test_a_link_is_a_line() -> None:
    lengths = np.array([16.0, 64, 256, 1024])
    found = fit_transfer(lengths, 0.002 + lengths / 50_000, 0.3)
    assert found is not None
    assert [found.latency_s, found.tokens_per_s] == pytest.approx([0.002, 50_000])
    assert [found.handshake_s, found.error_p90_s] == pytest.approx([0.3, 0], abs=1e-9)
    assert fit_transfer(lengths, np.full(4, 0.01) - lengths * 1e-6, 0.0) is None


@pytest.mark.parametrize("model_len", [40, 300, 4096, None])
@pytest.mark.parametrize("capacity", [100, 5000, None])
def test_no_experiment_asks_for_more_than_fits(model_len: int | None, capacity: int | None) -> None:
    limits = Limits(512, 8, model_len, capacity, 16)
    for run in experiments(limits, 10_000):
        ask = run.keywords  # type: ignore[attr-defined]
        streams, prompts = ask.get("streams", 0), ask.get("prompts", 1)
        new = max([ask.get("new", 0), *ask.get("news", [])])
        whole = max(ask.get("length", 0) + ask.get("output", 0), new + ask.get("past", 0) + 1, ask.get("ahead", 0) + 1)
        assert new * prompts + streams <= 512
        if model_len is not None:
            assert whole <= model_len
        if capacity is not None:
            assert streams * (ask.get("length", 0) + ask.get("output", 0)) <= capacity
    assert all(run.func in (Probe.running, Probe.together, Probe.alone, Probe.on_past)  # type: ignore[attr-defined]
               for run in experiments(limits, 10_000))  # fmt: skip


@contextmanager
def emulated(count: int = 2) -> Iterator[list[str]]:
    """Emulated engines of the true model, on a thread."""
    spec = InstanceSpec(
        Role.MIXED, TRUTH, capacity_blocks=1500, max_num_batched_tokens=512, link_bytes_per_s=LINK, max_num_seqs=16
    )
    settings = EmulatedSettings(
        instance=spec, kv_bytes_per_token=KV_BYTES, max_model_len=2048, handshake_s=0.2, link_latency_s=0.01
    )
    urls: list[str] = []
    loops: list[asyncio.AbstractEventLoop] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        fleet = EmulatedFleet()
        urls.extend(await fleet.start(settings, count))
        loops.append(asyncio.get_running_loop())
        ready.set()
        await stop.wait()
        await fleet.stop()

    thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield urls
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(20)


def test_an_emulated_engine_is_found_as_it_was_made(tmp_path: Path) -> None:
    """Bounds are wide: tests run on machines that have other things to do."""
    out, save = tmp_path / "p.json", tmp_path / "rows.jsonl"
    with emulated() as (url, other):
        given = ("--url", url, "--to", other, "--seconds", "20", "--max-batch", "4", "--max-num-batched-tokens", "512")
        said = ok("profile", *given, "--out", out, "--save", save, "--kv-bytes-per-token", str(KV_BYTES)).stdout
        measured = document("bench", "--url", url, "--synthetic", "100/20", "-n", "8", "--rate", "4", "--cv", "0")
    assert "24,000 tokens" in said and "--kv-blocks 1500 --block-size 16" in said
    assert len(save.read_text().splitlines()) > 10
    profile = load_profile(out)
    assert profile.versions["vllm"]
    for decodes, context in ((1, 100), (1, 1000), (4, 500), (4, 4000)):
        true = TRUTH.step_s(decodes, context, [], [])
        assert profile.model.step_s(decodes, context, [], []) == pytest.approx(true, rel=0.15)
    for chunks, past in (([64], [0]), ([500], [0]), ([64], [500]), ([32] * 4, [0] * 4)):
        true = TRUTH.step_s(0, 0, chunks, past)
        assert profile.model.step_s(0, 0, chunks, past) == pytest.approx(true, rel=0.25)
    true = TRUTH.step_s(4, 2000, [256], [0])
    assert profile.model.step_s(4, 2000, [256], [0]) == pytest.approx(true, rel=0.25)
    assert float(profile.machine["transfer_tokens_per_s"]) == pytest.approx(LINK / KV_BYTES, rel=0.3)
    assert float(profile.machine["handshake_s"]) == pytest.approx(0.2, rel=0.5)
    assert measured["finished"] == 8
    simulated = document("simulate", "--profile", out, "--policy", "mixed", "--mixed", "1", "--kv-blocks", "1500",
                         "--synthetic", "100/20", "-n", "8", "--rate", "4", "--cv", "0")  # fmt: skip
    assert simulated["tpot_s"]["p50"] == pytest.approx(measured["tpot_s"]["p50"], rel=0.25)


def test_engines_that_cannot_be_measured_are_a_bad_input(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    with serving(refuse=lambda body: "no ids" if isinstance(body["prompt"], list) else None) as server:
        result = penstock("profile", "--url", server.url, "--out", out)
    assert (result.exit_code, out.exists()) == (2, False)
    assert "no ids" in result.stderr
    assert penstock("profile", "--url", "http://127.0.0.1:9", "--out", out).exit_code == 2
    assert penstock("profile", "--seconds", "none", "--out", out).exit_code == 2
