"""What a gateway adds: TTFT and CPU per streamed token, beside a direct connection and beside Rust routers.

    .venv/bin/python benchmarks/gateway_overhead.py --streams 200 --seconds 8 [--routers DIR]

Emulated engines (one process), the gateway (one process) and the client (this one) share the machine; every contender
faces the same engines in the same run. DIR is the ``bin`` of an environment with vllm-router and sglang-router from
PyPI; without it they are left out. CPU time is the gateway process's own (user and system), from the kernel's books.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import psutil
import typer
import uvloop

from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Head, HttpFault

HERE = Path(__file__).resolve().parent
TOKENS = 10_000_000
PROMPT = "x" * 64


class Reader:
    """Counts one stream's chunks; a chunk is a token here."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.first_s = 0.0
        self.chunks = 0
        self.failed = ""

    def on_head(self, head: Head) -> None:
        if head.status != 200:
            self.failed = f"status {head.status}"

    def on_body(self, data: bytes) -> None:
        if self.failed:
            self.failed += data[:200].decode(errors="replace")
            return
        count = data.count(b'"text":"') - data.count(b'"text":""')
        if count and not self.first_s:
            self.first_s = time.perf_counter() - self.start_s
        self.chunks += count

    def on_end(self) -> None:
        self.failed = self.failed or "ended"

    def on_fault(self, fault: HttpFault) -> None:
        self.failed = fault.reason


async def load(client: HttpClient, url: str, model: str, streams: int, seconds: float, pid: int) -> dict[str, Any]:
    """Run ``streams`` endless streams for ``seconds``; figures of the steady part and of the starts."""
    body = msgspec.json.encode(
        {"model": model, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True, "temperature": 0}
    )
    headers = {"content-type": "application/json"}
    warm = Reader(time.perf_counter())
    call = client.open(url, "POST", "/v1/completions", warm, headers, body)
    await asyncio.sleep(1.5)
    call.abort()
    readers, calls = [], []
    for _ in range(streams):
        reader = Reader(time.perf_counter())
        calls.append(client.open(url, "POST", "/v1/completions", reader, headers, body))
        readers.append(reader)
        await asyncio.sleep(2.0 / streams)
    await asyncio.sleep(1.0)
    process = psutil.Process(pid)

    def cpu_s() -> float:
        parts = [process, *process.children(recursive=True)]
        return sum(sum(p.cpu_times()[:2]) for p in parts)

    before, cpu, start = sum(r.chunks for r in readers), cpu_s(), time.perf_counter()
    await asyncio.sleep(seconds)
    tokens, took, used = sum(r.chunks for r in readers) - before, time.perf_counter() - start, cpu_s() - cpu
    for call in calls:
        call.abort()
    failed = [r.failed for r in readers if r.failed]
    if failed:
        print(f"  {len(failed)} streams failed, as {failed[0][:150]}", file=sys.stderr)
    await asyncio.sleep(1.0)
    first = np.array([r.first_s for r in readers if r.first_s]) * 1e3
    return {
        "ttft_p50_ms": float(np.quantile(first, 0.5)),
        "ttft_p99_ms": float(np.quantile(first, 0.99)),
        "tokens_per_s": tokens / took,
        "cpu_us_per_token": used / max(tokens, 1) * 1e6,
        "core_share": used / took,
        "failed": len(failed),
    }


def engines(count: int) -> tuple[subprocess.Popen[str], list[str], str]:
    """Emulated engines in a process of their own."""
    command = [sys.executable, "-m", "penstock.live.emulated", "--instances", str(count), "--hardware", "h100"]
    command += ["--max-num-seqs", "2048", "--max-model-len", "8192"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(count)]
    return process, [line["url"] for line in lines], lines[0]["model"]


def penstock_gateway(prefill: list[str], decode: list[str], port: int) -> list[str]:
    """Our gateway."""
    command = [str(Path(sys.executable).parent / "penstock"), "serve", "--policy", "least-kv", "--port", str(port)]
    command += ["--admin-port", str(port + 1), "--max-num-seqs", "2048", "--log-level", "warning"]
    for url in prefill:
        command += ["--attach", f"{url},role=prefill"]
    for url in decode:
        command += ["--attach", f"{url},role=decode"]
    return command


def vllm_router(folder: Path, prefill: list[str], decode: list[str], port: int) -> list[str]:
    """vllm-router in PD mode."""
    command = [str(folder / "vllm-router"), "--vllm-pd-disaggregation", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(port + 1), "--log-level", "warning"]
    for url in prefill:
        command += ["--prefill", url]
    for url in decode:
        command += ["--decode", url]
    return command


def sglang_router(folder: Path, decode: list[str], port: int) -> list[str]:
    """sglang-router as a plain proxy: its PD mode speaks SGLang's protocol, not vLLM's."""
    command = [str(folder / "python"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(port + 1), "--log-level", "warn"]
    return [*command, "--worker-urls", *decode]


async def healthy(client: HttpClient, url: str, seconds: float = 30.0) -> bool:
    """Wait until a gateway answers."""
    for _ in range(int(seconds * 10)):
        try:
            if (await client.fetch(url, "GET", "/v1/models", timeout_s=1.0)).status == 200:
                return True
        except HttpFault:
            pass
        await asyncio.sleep(0.1)
    return False


async def measure(streams: int, seconds: float, routers: Path | None) -> dict[str, dict[str, Any]]:
    """All contenders, one after another."""
    fleet, urls, model = engines(3)
    prefill, decode = urls[:1], urls[1:]
    found: dict[str, dict[str, Any]] = {}
    client = HttpClient(connect_s=10.0)
    try:
        found["direct"] = await load(client, decode[0], model, streams, seconds, os.getpid())
        contenders = {"penstock": penstock_gateway(prefill, decode, 18310)}
        if routers is not None:
            contenders["vllm-router (PD)"] = vllm_router(routers, prefill, decode, 18320)
            contenders["sglang-router (plain proxy)"] = sglang_router(routers, decode, 18330)
        for name, command in contenders.items():
            port = int(command[command.index("--port") + 1])
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                try:
                    url = f"http://127.0.0.1:{port}"
                    if not await healthy(client, url):
                        print(f"  {name} did not come up", file=sys.stderr)
                        continue
                    found[name] = await load(client, url, model, streams, seconds, process.pid)
                finally:
                    process.terminate()
    finally:
        await client.close()
        fleet.terminate()
        fleet.wait()
    del found["direct"]["cpu_us_per_token"], found["direct"]["core_share"]  # that is the client's own
    return found


def main(
    streams: Annotated[int, typer.Option(help="Concurrent streams.")] = 200,
    seconds: Annotated[float, typer.Option(help="Seconds of steady state to measure.")] = 8.0,
    routers: Annotated[Path | None, typer.Option(help="bin folder with vllm-router and sglang-router.")] = None,
) -> None:
    """Print a table and one JSON line."""
    found = uvloop.run(measure(streams, seconds, routers))
    base = found["direct"]
    print(f"{streams} streams, {seconds:g} s, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    titles = ("TTFT P50", "P99", "added P50", "added P99", "tok/s", "µs/token", "tok/s/core")
    print(f"{'':28}" + "".join(f"{title:>{w}}" for title, w in zip(titles, (10, 10, 11, 11, 9, 10, 12), strict=True)))
    for name, row in found.items():
        cpu = row.get("cpu_us_per_token")
        extra = f"{cpu:10.1f}{1e6 / cpu:12,.0f}" if cpu else ""
        print(
            f"{name:28}{row['ttft_p50_ms']:8.1f}ms{row['ttft_p99_ms']:8.1f}ms"
            f"{row['ttft_p50_ms'] - base['ttft_p50_ms']:9.1f}ms{row['ttft_p99_ms'] - base['ttft_p99_ms']:9.1f}ms"
            f"{row['tokens_per_s']:9,.0f}{extra}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
