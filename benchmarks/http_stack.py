"""What a streamed token costs a proxy, by HTTP stack: ours, aiohttp, uvicorn + starlette + httpx, and no HTTP at all.

Run: ``python benchmarks/http_stack.py --peers /path/to/venv/bin/python`` with a virtual environment that has
``aiohttp uvicorn starlette httpx httptools uvloop``; stacks that are absent there are skipped with a message.

One source writes server-sent events (one HTTP chunk each), one proxy process of the stack under test passes them on,
and this process reads them. Figures are user + system CPU microseconds of the proxy process per event, while all
streams run. All stacks run on uvloop. The ``tcp`` row copies bytes between sockets without looking at them: what system
calls and the event loop cost alone.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

NEEDS = {
    "penstock": ["penstock", "uvloop"],
    "aiohttp": ["aiohttp", "uvloop"],
    "starlette": ["uvicorn", "starlette", "httpx", "httptools", "uvloop"],
    "tcp": ["uvloop"],
}
LABELS = {
    "penstock": "Penstock (asyncio protocols, httptools)",
    "aiohttp": "aiohttp client and server",
    "starlette": "uvicorn (httptools), starlette, httpx",
    "tcp": "bytes copied between sockets, no HTTP",
}
CASES = [(200, 0.04), (200, 0.01)]  # streams, seconds between two events of one
SLOTS = 10  # the streams take turns in this many groups
WARM_S, MEASURE_S = 1.0, 3.0
EVENT = (
    b'data: {"id":"cmpl-4c9fd8ff03954a59b4b2a4cfe25c81ae","object":"text_completion","created":1763683200,"model":"m",'
    b'"choices":[{"index":0,"text":" the","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":[279]}],'
    b'"usage":null}\n\n'
)


def announce(port: int) -> None:
    """Tell the parent where we listen."""
    print(port, flush=True)


def bound() -> socket.socket:
    """A listening socket on a free port."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(2048)
    sock.setblocking(False)
    return sock


async def source(interval_s: float) -> None:
    """Stream events to everybody for ever."""
    from penstock.live.http import HttpServer, Reply

    groups: list[set[Reply]] = [set() for _ in range(SLOTS)]
    loop = asyncio.get_running_loop()

    def handler(reply: Reply) -> None:
        group = min(groups, key=len)
        group.add(reply)
        reply.on_disconnect = lambda: group.discard(reply)
        reply.start()

    announce(await HttpServer(handler).start("127.0.0.1", 0))
    step, turn, due = interval_s / SLOTS, 0, loop.time()
    while True:
        for reply in groups[turn % SLOTS]:
            reply.write(EVENT)
        turn += 1
        due = max(due + step, loop.time() - interval_s)
        await asyncio.sleep(due - loop.time())


async def proxy_penstock(upstream: int) -> None:
    """Pass on with our stack."""
    from penstock.live.http import Head, HttpClient, HttpFault, HttpServer, Reply

    client = HttpClient()

    class Relay:
        def __init__(self, reply: Reply) -> None:
            self.on_body = reply.write
            self.on_end = reply.end
            self.reply = reply

        def on_head(self, head: Head) -> None:
            self.reply.start(head.status, head.headers["content-type"])

        def on_fault(self, fault: HttpFault) -> None:
            self.reply.drop()

    def handler(reply: Reply) -> None:
        call = client.open(
            f"http://127.0.0.1:{upstream}", "POST", reply.request.path, Relay(reply), body=reply.request.body
        )
        reply.on_disconnect = call.abort

    announce(await HttpServer(handler).start("127.0.0.1", 0))
    await asyncio.Event().wait()


async def proxy_aiohttp(upstream: int) -> None:
    """Pass on with aiohttp."""
    logging.disable()  # it logs every stream that the reader leaves at the end
    aiohttp = importlib.import_module("aiohttp")
    web = importlib.import_module("aiohttp.web")
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
    )

    async def handler(request: Any) -> Any:
        async with session.post(f"http://127.0.0.1:{upstream}{request.path}", data=await request.read()) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]}
            )
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    sock = bound()
    await web.SockSite(runner, sock).start()
    announce(sock.getsockname()[1])
    await asyncio.Event().wait()


async def proxy_starlette(upstream: int) -> None:
    """Pass on with uvicorn, starlette and httpx."""
    httpx = importlib.import_module("httpx")
    uvicorn = importlib.import_module("uvicorn")
    responses = importlib.import_module("starlette.responses")
    routing = importlib.import_module("starlette.routing")
    applications = importlib.import_module("starlette.applications")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)

    async def handler(request: Any) -> Any:
        url = f"http://127.0.0.1:{upstream}{request.url.path}"
        answer = await client.send(client.build_request("POST", url, content=await request.body()), stream=True)
        kind = answer.headers["content-type"]
        return responses.StreamingResponse(answer.aiter_raw(), answer.status_code, media_type=kind)

    app = applications.Starlette(routes=[routing.Route("/{path:path}", handler, methods=["POST"])])
    config = uvicorn.Config(
        app, http="httptools", loop="uvloop", access_log=False, log_level="critical", lifespan="off"
    )
    sock = bound()
    announce(sock.getsockname()[1])
    await uvicorn.Server(config).serve(sockets=[sock])


class _Copy(asyncio.Protocol):
    """One direction of a copy; ``peer`` is where the bytes go."""

    def __init__(self, upstream: int = 0) -> None:
        self.upstream = upstream
        self.peer: Any = None
        self.early = b""
        self.opening: asyncio.Task[Any] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.upstream:
            self.opening = asyncio.get_running_loop().create_task(self.join())

    async def join(self) -> None:
        other = _Copy()
        other.peer = self.transport
        self.peer, _ = await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self.upstream)
        self.peer.write(self.early)

    def data_received(self, data: bytes) -> None:
        if self.peer is None:
            self.early += data
        else:
            self.peer.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer is not None:
            self.peer.close()


async def proxy_tcp(upstream: int) -> None:
    """Pass on without knowing what."""
    sock = bound()
    await asyncio.get_running_loop().create_server(lambda: _Copy(upstream), sock=sock)
    announce(sock.getsockname()[1])
    await asyncio.Event().wait()


class Counter:
    """A sink that counts bytes."""

    total = 0
    heads = 0
    faults = 0

    def on_head(self, head: object) -> None:
        Counter.heads += 1

    def on_body(self, data: bytes) -> None:
        Counter.total += len(data)

    def on_end(self) -> None:
        Counter.faults += 1

    def on_fault(self, fault: object) -> None:
        Counter.faults += 1


async def load(port: int, pid: int, streams: int) -> tuple[float, float, float]:
    """Open the streams, measure; give CPU µs an event, events a second, CPU share of a core."""
    import psutil

    from penstock.live.http import HttpClient

    proxy = psutil.Process(pid)
    Counter.total = Counter.heads = Counter.faults = 0
    client = HttpClient(connect_s=20.0)
    for _ in range(streams):
        client.open(f"http://127.0.0.1:{port}", "POST", "/v1/completions", Counter(), body=b'{"stream":true}')
    while Counter.heads < streams:
        assert not Counter.faults
        await asyncio.sleep(0.01)
    await asyncio.sleep(WARM_S)

    def look() -> tuple[float, float, int]:
        times = proxy.cpu_times()
        return time.perf_counter(), times.user + times.system, Counter.total

    before = look()
    await asyncio.sleep(MEASURE_S)
    wall, cpu, size = (b - a for a, b in zip(before, look(), strict=True))
    assert not Counter.faults
    await client.close()
    events = size / len(EVENT)
    return cpu / events * 1e6, events / wall, cpu / wall


def child(python: str, role: str, value: float) -> tuple[subprocess.Popen[str], int]:
    """Start a role of this script; give the process and its port."""
    command = [python, __file__, "--role", role, "--value", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def missing(python: str, names: list[str]) -> list[str]:
    """Name the modules that an interpreter lacks."""
    script = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    return subprocess.run([python, "-c", script, *names], check=True, capture_output=True, text=True).stdout.split()


def one(python: str, stack: str, streams: int, interval_s: float) -> tuple[float, float, float]:
    """Run one stack under one load."""
    import uvloop

    feeding, upstream = child(sys.executable, "source", interval_s)
    proxy, port = child(python, stack, upstream)
    try:
        return uvloop.run(load(port, proxy.pid, streams))
    finally:
        for process in (proxy, feeding):
            process.kill()
            process.wait()


def main() -> None:
    """Measure all stacks in turn, three times, and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the other stacks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--value", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        roles = {"penstock": proxy_penstock, "aiohttp": proxy_aiohttp, "starlette": proxy_starlette, "tcp": proxy_tcp}
        run = importlib.import_module("uvloop").run
        run(source(options.value) if options.role == "source" else roles[options.role](int(options.value)))
        return
    stacks = {}
    for stack, names in NEEDS.items():
        python = sys.executable if stack in ("penstock", "tcp") else options.peers
        absent = missing(python, names)
        if absent:
            print(f"skipped: {LABELS[stack]} (not installed for {python}: {', '.join(absent)})")
        else:
            stacks[stack] = python
    for streams, interval_s in CASES:
        figures: dict[str, list[tuple[float, float, float]]] = {stack: [] for stack in stacks}
        for _ in range(options.rounds):
            for stack, python in stacks.items():
                figures[stack].append(one(python, stack, streams, interval_s))
        print(
            f"\n{streams} streams, an event each {interval_s * 1e3:g} ms ({streams / interval_s:,.0f} events/s offered)"
        )
        print("| stack | CPU µs per event | of ours | delivered/s | of one core |\n|---|---:|---:|---:|---:|")
        ours = statistics.median(figure[0] for figure in figures["penstock"])
        for stack, rounds in figures.items():
            cost, rate, share = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"| {LABELS[stack]} | {cost:.1f} | {cost / ours:.2f} | {rate:,.0f} | {share:.0%} |")


if __name__ == "__main__":
    main()
