"""Processes without vLLM: whatever happens, nothing of an engine is left, and a failed start says why."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from penstock.core.errors import PenstockError
from penstock.live.http import HttpFault
from penstock.live.http.client import HttpClient
from penstock.live.local import logs
from penstock.live.local.launch import _free_ports
from penstock.live.local.process import EngineProcess

# Like vLLM: a server with a child and a grandchild, which report their ids through files.
TREE = """
import http.server, os, subprocess, sys, time
folder, port = sys.argv[1], int(sys.argv[2])
sleeper = "import time; time.sleep(600)"
child = "import subprocess, sys, time; made = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
child += "print(made.pid, flush=True); time.sleep(600)"
made = subprocess.Popen([sys.executable, "-c", child, sleeper], stdout=subprocess.PIPE)
pids = f"{os.getpid()} {made.pid} {int(made.stdout.readline())} {os.environ['SCRATCH']}"
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = pids.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


class Made:
    """A started tree: the engine, its processes, its folder for temporary files."""

    def __init__(self, engine: EngineProcess, members: list[psutil.Process], scratch: Path) -> None:
        self.engine = engine
        self.members = members
        self.scratch = scratch

    def assert_nothing_left(self) -> None:
        assert not any(process.is_running() for process in self.members)
        assert not self.scratch.exists()
        assert not self.engine.alive


def make(folder: Path) -> EngineProcess:
    (port,) = _free_ports(1)

    def environment(scratch: str) -> dict[str, str]:
        return dict(os.environ) | {"SCRATCH": scratch}

    command = [sys.executable, "-c", TREE, str(folder), str(port)]
    return EngineProcess(f"http://127.0.0.1:{port}", command, environment, folder / "log")


async def begin(engine: EngineProcess) -> Made:
    phases: list[str] = []
    client = HttpClient()
    engine.start()
    await engine.ready(client, 30.0, phases.append)
    assert phases[-1] == "ready"
    *pids, scratch = (await client.fetch(engine.url, "GET", "/")).body.decode().split()
    await client.close()
    assert int(pids[0]) == engine.pid
    return Made(engine, [psutil.Process(int(pid)) for pid in pids], Path(scratch))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    made = make(tmp_path)
    yield made
    made.hang_up()


def kill_group(engine: EngineProcess) -> None:
    engine.kill9()


def kill_first(engine: EngineProcess) -> None:
    os.kill(engine.pid, signal.SIGKILL)


def hang_up(engine: EngineProcess) -> None:
    engine.hang_up()


def hang_up_suspended(engine: EngineProcess) -> None:
    engine.suspend()
    engine.hang_up()


@pytest.mark.parametrize("end", [kill_group, kill_first, hang_up, hang_up_suspended])
def test_no_process_and_no_file_is_left(engine: EngineProcess, end: Callable[[EngineProcess], None]) -> None:
    async def work() -> None:
        made = await begin(engine)
        end(engine)
        await engine.gone()
        made.assert_nothing_left()
        again = await begin(engine)  # at the same address
        await engine.stop()
        await engine.stop()  # is harmless
        again.assert_nothing_left()

    asyncio.run(work())


def test_nothing_outlives_our_own_kill(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from tests.live.local.test_process import begin, make
        async def work():
            made = await begin(make(Path(sys.argv[1])))
            print(*(process.pid for process in made.members), made.scratch, flush=True)
            await asyncio.sleep(600)
        asyncio.run(work())
    """)
    ours = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None
    *pids, scratch = ours.stdout.readline().split()
    members = [psutil.Process(int(pid)) for pid in pids]
    guard = members[0].parent()
    assert guard is not None
    ours.kill()
    ours.wait()
    _, left = psutil.wait_procs([*members, guard], timeout=20)
    assert not left
    assert not Path(scratch).exists()


def test_nothing_outlives_the_guard(engine: EngineProcess) -> None:
    async def work() -> None:
        made = await begin(engine)
        guard = made.members[0].parent()
        assert guard is not None
        guard.kill()
        await engine.gone()
        _, left = psutil.wait_procs(made.members, timeout=20)
        assert not left
        made.assert_nothing_left()

    asyncio.run(work())


def test_a_suspended_engine_goes_on(engine: EngineProcess) -> None:
    async def work() -> None:
        await begin(engine)
        engine.suspend()
        client = HttpClient()
        with pytest.raises(HttpFault):
            await client.fetch(engine.url, "GET", "/health", timeout_s=0.5)
        assert engine.alive
        engine.resume()
        assert (await client.fetch(engine.url, "GET", "/health")).status == 200
        await client.close()
        await engine.stop()

    asyncio.run(work())


def test_a_failed_start_says_why(tmp_path: Path) -> None:
    async def work(command: list[str], because: str) -> None:
        engine = EngineProcess("http://127.0.0.1:9", command, lambda scratch: dict(os.environ), tmp_path / "log")
        client = HttpClient()
        with pytest.raises(PenstockError, match=because):
            engine.start()
            await engine.ready(client, 30.0, lambda phase: None)
        await client.close()
        assert not engine.alive

    asyncio.run(work([sys.executable, "-c", "raise ValueError('no such thing')"], "ValueError: no such thing"))
    asyncio.run(work([sys.executable, "-c", "pass"], "it said nothing"))
    asyncio.run(work(["/nowhere/python"], "cannot start /nowhere/python"))


def test_a_start_has_a_time_limit(tmp_path: Path) -> None:
    async def work() -> None:
        command = [sys.executable, "-c", "import time; print('on my way', flush=True); time.sleep(600)"]
        engine = EngineProcess("http://127.0.0.1:9", command, lambda scratch: dict(os.environ), tmp_path / "log")
        client = HttpClient()
        engine.start()
        with pytest.raises(PenstockError, match=r"not ready after 0.5 s: on my way"):
            await engine.ready(client, 0.5, lambda phase: None)
        await engine.stop()
        await client.close()
        assert not engine.alive

    asyncio.run(work())


LOG = """\
(APIServer pid=1) INFO 11-21 07:18:51 [api_utils.py:286] non-default args: {'max_error': 'Error: not one'}
(Worker pid=3) INFO 11-21 07:19:14 [cpu_model_runner.py:68] Starting to load model /tmp/x...
(EngineCore pid=2) ERROR 11-21 07:19:15 [core.py:1] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-21 07:19:15 [core.py:1]   File "core.py", line 1, in f
(EngineCore pid=2) ERROR 11-21 07:19:15 [core.py:1] ValueError: no room for KV
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_found_among_its_consequences(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert logs.reason(log) == ""
    assert logs.phase(log) == "starting"
    log.write_text(LOG)
    assert logs.reason(log) == "ValueError: no room for KV"
    assert logs.phase(log) == "loading the model"
    log.write_text(
        "pydantic_core.ValidationError: 1 validation error for X\n  Value error, no such type [type=x]\n hint"
    )
    assert logs.reason(log) == "Value error, no such type [type=x]"
    log.write_text("only words\n\n")
    assert logs.reason(log) == "only words"
