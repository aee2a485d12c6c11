"""One engine process: started behind its guard, watched, hurt on purpose in tests, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.live.http import HttpFault
from penstock.live.http.client import HttpClient
from penstock.live.local import logs

_GUARD = Path(__file__).with_name("guard.py")
_GRACE_S = 10.0  # between SIGTERM and SIGKILL: vLLM takes one or two
_POLL_S = 0.2


class EngineProcess:
    """A stock vLLM server of ours and everything it starts, in one process group.

    Nothing of it outlives us: a guard process (guard.py) ends the group when we ask, when the server dies, or when this
    process is gone for whatever reason. All methods may be called from any event loop.

    Parameters
    ----------
    url : str
        Where it will serve.
    command : Sequence[str]
        Its command line.
    environment : Callable[[str], Mapping[str, str]]
        Its environment, given a folder for temporary files, which goes when the engine does.
    log : Path
        What it prints is appended here.
    """

    def __init__(
        self, url: str, command: Sequence[str], environment: Callable[[str], Mapping[str, str]], log: Path
    ) -> None:
        self.url = url
        self.log = log
        self.pid = 0
        self._command = list(command)
        self._environment = environment
        self._guard: subprocess.Popen[bytes] | None = None
        self._scratch = ""

    @property
    def alive(self) -> bool:
        """Whether anything of it may still run."""
        guard = self._guard
        if guard is None:
            return False
        if guard.poll() is None:
            return True
        if guard.returncode:  # the guard itself was killed: its duty is ours
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._guard = None
        return False

    def start(self) -> None:
        """Start the process; it is not ready yet.

        Raises
        ------
        PenstockError
            It cannot be started.
        """
        if self.alive:
            raise RuntimeError("this engine runs")
        scratch = tempfile.mkdtemp(prefix="penstock-")  # short: vLLM puts Unix sockets there
        self.log.write_bytes(b"")
        command = [sys.executable, "-I", "-S", str(_GUARD), str(_GRACE_S), str(self.log), scratch, *self._command]
        guard = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=dict(self._environment(scratch)),
        )
        assert guard.stdout is not None
        word = guard.stdout.readline().split()
        if word[:1] != [b"pid"]:
            guard.wait()
            shutil.rmtree(scratch, ignore_errors=True)
            raise PenstockError(f"cannot start {self._command[0]}", "is it a Python that runs?")
        self._guard, self._scratch = guard, scratch
        self.pid = int(word[1])

    async def ready(self, client: HttpClient, timeout_s: float, progress: Callable[[str], None]) -> None:
        """Wait until it serves; ``progress`` is told of each new phase.

        Raises
        ------
        PenstockError
            It ended, or is not ready after ``timeout_s`` seconds: with the line of its log that says why.
        """
        shown = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    phase = logs.phase(self.log)
                    if phase != shown:
                        progress(shown := phase)
                    if not self.alive:
                        raise PenstockError(f"engine {self.url} did not start", self._why())
                    with contextlib.suppress(HttpFault):
                        health = await client.fetch(self.url, "GET", "/health", timeout_s=5.0)
                        models = await client.fetch(self.url, "GET", "/v1/models", timeout_s=5.0)
                        if health.status == models.status == 200:
                            break
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise PenstockError(f"engine {self.url} is not ready after {timeout_s:g} s", self._why()) from None
        progress("ready")

    def _why(self) -> str:
        return f"{logs.reason(self.log) or 'it said nothing'} (log: {self.log})"

    async def gone(self) -> None:
        """Wait until nothing of it is left, whether it was stopped or died."""
        guard = self._guard
        if not self.alive or guard is None:
            return
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        watch = os.pidfd_open(guard.pid)  # becomes readable when the guard has ended, which it does last
        loop.add_reader(watch, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(watch)
            os.close(watch)
        guard.wait()
        assert not self.alive

    def hang_up(self) -> None:
        """Ask it to end and return at once; `gone` waits for it."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()

    async def stop(self) -> None:
        """End it, with force after ten seconds. Does nothing if it has ended."""
        self.hang_up()
        await self.gone()

    def kill9(self) -> None:
        """SIGKILL to all its processes, as the kernel does when memory is short."""
        os.killpg(self.pid, signal.SIGKILL)

    def suspend(self) -> None:
        """SIGSTOP to all its processes: connections stay open and nothing answers."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to all its processes."""
        os.killpg(self.pid, signal.SIGCONT)
