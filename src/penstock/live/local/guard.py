"""Stands between Penstock and one engine so that nothing of the engine outlives either of them.

    python -I guard.py GRACE_SECONDS LOG SCRATCH COMMAND…

Run as a program, with the standard library only. It starts COMMAND in a process group of its own with output to LOG and
says ``pid N`` on its standard output. The engine ends when

* standard input ends: Penstock asked for it, or died, ``kill -9`` included;
* COMMAND itself ends, killed or not: whatever it has started goes too;
* this process is told to end (SIGTERM).

The end is SIGTERM, after GRACE_SECONDS SIGKILL to all, and the removal of the folder SCRATCH; then ``exit CODE`` is
said. The guard has its own session: neither Ctrl-C at the terminal nor a suspended engine stops it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def _end(engine: subprocess.Popen[bytes], grace_s: float) -> int:
    """End the engine and everything that came from it; returns the exit code of the engine's first process."""
    if engine.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGCONT)  # a suspended process would not see the next signal
            engine.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    code = engine.wait()
    while True:  # orphans of the engine have become our children: none is left when this is over
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return code


def _told_to_end(_number: int, _frame: object) -> None:
    raise SystemExit


def main() -> None:
    """Start, wait for one of the three reasons, end."""
    grace_s, log, scratch, command = float(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _told_to_end)
    with open(log, "ab") as output:
        engine = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_guard,  # safe: this process has one thread
        )
    print(f"pid {engine.pid}", flush=True)
    code = 0
    try:
        select.select([sys.stdin.fileno(), os.pidfd_open(engine.pid)], [], [])
    finally:
        code = _end(engine, grace_s)
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # nobody may be listening any more
            print(f"exit {code}", flush=True)


if __name__ == "__main__":
    main()
