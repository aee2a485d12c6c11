"""The promise on real vLLM servers: requests move, engines die and hang, and clients notice nothing.

The long form, with 200 requests and figures, is ``benchmarks/migration.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from migration import LEVELS, Trial, noise
from penstock.live.http.client import HttpClient
from penstock.live.local.install import find_python
from penstock.live.local.noise import NOISE, noise_model
from tests.live.engines import Engines

REQUESTS = 32


def play(engines: Engines, work: Callable[[Trial], Awaitable[None]]) -> None:
    """Run ``work`` against a gateway over the engines; at the end nothing may be pinned and nobody lost."""

    async def all_of_it() -> None:
        client = HttpClient()
        trial = Trial(engines.fleet, client, noise(REQUESTS, seed=1))
        await trial.unmoved()
        await trial.start_gateway()
        try:
            async with asyncio.timeout(300):
                await work(trial)
            left = await trial.residue()
            assert not any(left["engines"].values()), left
            assert left["custody_claims"] == left["requests_in_books"] == 0, left
            assert left["protocol_errors"] == left["greedy_divergences"] == 0, left
        finally:
            await trial.deployment.stop()
            await client.close()

    uvloop.run(all_of_it())


def test_moved_outputs_equal_unmoved_ones(engines: Engines) -> None:
    async def work(trial: Trial) -> None:
        for level in LEVELS:
            found = await trial.moved(level, parallel=3)
            assert found["identical"] == REQUESTS, found
            assert found["moves"] > 0, found

    play(engines, work)


def test_streams_outlive_a_killed_engine(engines: Engines) -> None:
    async def work(trial: Trial) -> None:
        found = await trial.fault("kill -9", streams=20)
        assert found["on_that_engine"] > 0, found
        assert found["complete_and_identical"] == 20, found

    play(engines, work)


def test_streams_outlive_an_engine_that_hangs(engines: Engines) -> None:
    async def work(trial: Trial) -> None:
        found = await trial.fault("SIGSTOP", streams=20)
        assert found["on_that_engine"] > 0, found
        assert found["complete_and_identical"] == 20, found

    play(engines, work)


def test_the_load_generator_of_vllm(engines: Engines, tmp_path: Path) -> None:
    async def work(trial: Trial) -> None:
        program = (
            "import argparse, sys\n"
            "from vllm.benchmarks.serve import add_cli_args, main\n"
            "parser = argparse.ArgumentParser()\n"
            "add_cli_args(parser)\n"
            "main(parser.parse_args(sys.argv[1:]))\n"
        )
        options = ["--backend", "vllm", "--base-url", trial.url, "--model", NOISE, "--ignore-eos"]
        options += ["--tokenizer", str(noise_model()), "--dataset-name", "random", "--random-input-len", "48"]
        options += ["--random-output-len", "16", "--num-prompts", "12", "--request-rate", "20", "--disable-tqdm"]
        options += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "out.json"]
        process = await asyncio.create_subprocess_exec(
            find_python(),
            "-c",
            program,
            *options,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()[-2000:]
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["completed"] == 12 and result["failed"] == 0, result
        assert result["total_output_tokens"] == 12 * 16, result

    play(engines, work)
