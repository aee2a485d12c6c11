"""Ten thousand concurrent streams through one gateway over emulated engines: all complete, none with an error.

    .venv/bin/python benchmarks/many_streams.py --streams 10000 --instances 64

Engines run slowly (``--speed``), so that all streams are open at the same time and one machine can also play the
engines and the clients. Prints how many were open at the peak, errors, CPU and memory of the gateway, and pauses.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import psutil
import typer
import uvloop

from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Head, HttpFault


class Reader:
    """One stream."""

    def __init__(self, over: asyncio.Semaphore) -> None:
        self.start_s = time.perf_counter()
        self.first_s = 0.0
        self.chunks = 0
        self.ended = ""
        self.tail = b""
        self.over = over

    def on_head(self, head: Head) -> None:
        if head.status != 200:
            self.ended = f"status {head.status}"

    def on_body(self, data: bytes) -> None:
        if not self.first_s:
            self.first_s = time.perf_counter() - self.start_s
        self.chunks += data.count(b'"text":')
        self.tail = data[-20:]

    def on_end(self) -> None:
        self.ended = self.ended or ("done" if b"[DONE]" in self.tail else "cut")
        self.over.release()

    def on_fault(self, fault: HttpFault) -> None:
        self.ended = fault.reason
        self.over.release()


async def measure(streams: int, instances: int, tokens: int, speed: float, ramp_s: float) -> None:
    """Everything, and the figures."""
    command = [sys.executable, "-m", "penstock.live.emulated", "--instances", str(instances), "--hardware", "h100"]
    command += ["--speed", str(speed), "--lease-s", "600"]
    fleet = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert fleet.stdout is not None
    lines = [json.loads(fleet.stdout.readline()) for _ in range(instances)]
    prefills = max(1, instances // 8)
    port = 18410
    gateway = [str(Path(sys.executable).parent / "penstock"), "serve", "--policy", "least-kv", "--port", str(port)]
    gateway += ["--admin-port", str(port + 1), "--log-level", "warning", "--hang", "600s"]
    for i, line in enumerate(lines):
        gateway += ["--attach", f"{line['url']},role={'prefill' if i < prefills else 'decode'}"]
    process = subprocess.Popen(gateway, stdout=subprocess.DEVNULL)
    client = HttpClient(connect_s=60.0)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if (await client.fetch(url, "GET", "/ready", timeout_s=2.0)).status == 200:
                    break
            except HttpFault:
                pass
            await asyncio.sleep(0.1)
        over = asyncio.Semaphore(0)
        start, cpu = time.perf_counter(), sum(psutil.Process(process.pid).cpu_times()[:2])
        readers: list[Reader] = []
        for i in range(streams):
            body = {"model": lines[0]["model"], "prompt": f"request {i} " * 8, "max_tokens": tokens, "stream": True}
            body |= {"ignore_eos": True, "temperature": 0}
            readers.append(Reader(over))
            client.open(
                url,
                "POST",
                "/v1/completions",
                readers[-1],
                {"content-type": "application/json"},
                msgspec.json.encode(body),
            )
            while time.perf_counter() - start < ramp_s * i / streams:
                await asyncio.sleep(0.002)
        opened = time.perf_counter() - start
        at_once = sum(not r.ended for r in readers)
        memory = psutil.Process(process.pid).memory_info().rss / 2**20
        for _ in range(streams):
            await over.acquire()
        took = time.perf_counter() - start
        used = sum(psutil.Process(process.pid).cpu_times()[:2]) - cpu
        metrics = (await client.fetch(url, "GET", "/metrics")).body.decode()
        bad = [r.ended for r in readers if r.ended != "done"]
        chunks = sum(r.chunks for r in readers)
        first = np.array([r.first_s for r in readers])
        print(
            f"{streams:,} streams over {instances} engines: {at_once:,} open after {opened:.0f} s, {took:.0f} s in all"
        )
        print(f"errors {len(bad)} {bad[:3]}; chunks {chunks:,} for {streams * tokens:,} tokens")
        print(
            f"gateway: {used / max(chunks, 1) * 1e6:.1f} µs CPU a chunk (starts included), {memory:.0f} MiB at the peak"
        )
        print(f"TTFT P50 {np.quantile(first, 0.5):.2f} s, P99 {np.quantile(first, 0.99):.2f} s at speed {speed:g}")
        for line in metrics.splitlines():
            if line.startswith(
                ("penstock:protocol_errors_total", "penstock:engine_errors_total", "penstock:requests_total")
            ):
                print(line)
    finally:
        process.terminate()
        process.wait()
        await client.close()
        fleet.terminate()
        fleet.wait()


def main(
    streams: Annotated[int, typer.Option()] = 10_000,
    instances: Annotated[int, typer.Option()] = 64,
    tokens: Annotated[int, typer.Option(help="Output tokens of each.")] = 60,
    speed: Annotated[float, typer.Option(help="Engine seconds a second.")] = 0.02,
    ramp_s: Annotated[float, typer.Option(help="Seconds over which streams are opened.")] = 20.0,
) -> None:
    """Print the figures."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(f"{os.cpu_count()} cores, at most {most:,} open files")
    uvloop.run(measure(streams, instances, tokens, speed, ramp_s))


if __name__ == "__main__":
    typer.run(main)
