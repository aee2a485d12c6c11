"""What the engine plugin costs: decode throughput with and without stream and predictor, and microseconds a step.

    .venv/bin/python benchmarks/plugin_overhead.py [--rounds 12] [--model DIR] [--json FILE]

Two engines, one with the plugin's stream (with a listener) and a predictor, one without either; both have the plugin's
remedies for the CPU. They take turns, each time in the other order, with the same batch; a ratio is that of two turns
next to each other, so that what else the machine does falls on both. Then the parts by themselves, in an engine's
Python, with stand-ins for requests (plugin_inside.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
import zmq
import zmq.asyncio

from penstock.live.http.client import HttpClient
from penstock.live.local.command import PLUGIN_FOLDER, EngineSettings
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.local.model import bundled_model
from random_head import random_head

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
WIDTHS = (512, 128)


async def turn(client: HttpClient, url: str, model: str, batch: int, tokens: int) -> float:
    """Tokens a second of one batch, which starts and ends together."""
    prompts = np.random.default_rng(0).integers(10, 200, (batch, 32)).tolist()
    headers = {"Content-Type": "application/json"}

    async def one(prompt: list[int]) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        raw = msgspec.json.encode(body)
        answer = await client.fetch(url, "POST", "/v1/completions", raw, headers, timeout_s=600.0)
        assert answer.status == 200, answer.body

    begin = time.perf_counter()
    await asyncio.gather(*map(one, prompts))
    return batch * tokens / (time.perf_counter() - begin)


async def listen(address: str, seen: dict[str, int]) -> None:
    """Count what a gateway would read."""
    reader = zmq.asyncio.Context.instance().socket(zmq.SUB)
    reader.subscribe(b"")
    reader.connect(address)
    while True:
        message = msgspec.msgpack.decode(await reader.recv())
        seen["steps"] += 1
        seen["predictions"] += len(message[9])


async def throughput(python: str, model: Path, head: Path, rounds: int, batch: int, tokens: int) -> dict[str, Any]:
    """Turns of an engine without and one with the plugin."""
    name = "model"
    common = EngineSettings(served_name=name, dtype="float32", max_model_len=2048, kv_bytes=256 * 2**20, threads=1)
    installation = inspect(python)
    fleets = [
        LocalFleet(installation, str(model), settings=msgspec.structs.replace(common, **more))
        for more in ({"plugin": False}, {"head": str(head)})
    ]
    client = HttpClient()
    seen = {"steps": 0, "predictions": 0}
    rates: list[tuple[float, float]] = []
    try:
        await asyncio.gather(*(fleet.start() for fleet in fleets))
        urls = [fleet.addresses[0].url for fleet in fleets]
        task = asyncio.create_task(listen(str(fleets[1].addresses[0].plugin), seen))
        for url in urls:
            await turn(client, url, name, batch, 20)
        for index in range(rounds):
            order = (0, 1) if index % 2 == 0 else (1, 0)
            found = {which: await turn(client, urls[which], name, batch, tokens) for which in order}
            rates.append((found[0], found[1]))
            print(f"  without {found[0]:8.0f}  with {found[1]:8.0f} tokens/s  ratio {found[1] / found[0]:.3f}")
        task.cancel()
    finally:
        await asyncio.gather(*(fleet.stop() for fleet in fleets))
        await client.close()
    ratios = np.array([there / here for here, there in rates])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {
        "without_tokens_per_s": float(np.median([here for here, _ in rates])),
        "with_tokens_per_s": float(np.median([there for _, there in rates])),
        "ratio": float(np.median(ratios)),
        "ratio_95": [float(low), float(high)],
        "batch": batch,
        **seen,
    }


def inside(python: str, head: Path, rows: int) -> dict[str, Any]:
    """The parts by themselves."""
    about = json.loads((head / "head.json").read_text())
    script = Path(__file__).with_name("plugin_inside.py")
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN_FOLDER), "OMP_NUM_THREADS": "1"}
    command = [python, str(script), str(head), about["model"], str(rows), str(about["hidden_size"])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    rounds: Annotated[int, typer.Option(help="Turns of each engine.")] = 12,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    tokens: Annotated[int, typer.Option(help="Output tokens of each.")] = 300,
    model: Annotated[Path | None, typer.Option(help="Folder; the bundled model by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Measure and print."""
    python = find_python()
    folder = model or bundled_model()
    with tempfile.TemporaryDirectory() as temporary:
        head = Path(temporary)
        random_head(head, folder, WIDTHS, QUANTILES, features=0)
        figures: dict[str, Any] = {"parts": inside(python, head, batch)}
        if rounds:
            figures |= asyncio.run(throughput(python, folder, head, rounds, batch, tokens))
    for part, costs in figures["parts"].items():
        print(f"{part:8} {costs['mean_us']:7.1f} us a step (median {costs['p50_us']:.1f}, 99 % {costs['p99_us']:.1f})")
    if rounds:
        low, high = figures["ratio_95"]
        print(f"throughput with / without: {figures['ratio']:.4f} (95 %: {low:.4f} to {high:.4f})")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
