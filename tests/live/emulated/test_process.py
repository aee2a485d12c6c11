"""A fleet in a process of its own: URLs on standard output, and no orphan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request

COMMAND = [sys.executable, "-m", "penstock.live.emulated"]


def test_it_serves_until_it_is_told_to_stop() -> None:
    with subprocess.Popen([*COMMAND, "--instances", "3"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rows = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert len({row["url"] for row in rows}) == 3
        assert {row["model"] for row in rows} == {"emulated-llama-3.1-8b"}
        for row in rows:
            with urllib.request.urlopen(row["url"] + "/health", timeout=20) as page:
                assert page.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_it_does_not_outlive_its_parent() -> None:
    # The parent reports the fleet's process id and is killed; standard output closes when the fleet ends too.
    parent = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    command = [sys.executable, "-c", parent, *COMMAND, "--instances", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert "url" in process.stdout.readline()
        process.kill()
        try:
            assert process.communicate(timeout=20)[0] == ""
        except subprocess.TimeoutExpired:
            os.kill(child, signal.SIGKILL)
            raise


def test_a_wrong_name_is_one_line() -> None:
    found = subprocess.run([*COMMAND, "--model", "no-such"], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: unknown model")
    assert len(found.stderr.splitlines()) == 1
