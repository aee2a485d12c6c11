"""Running a task in a Python that has torch: our own if it has, else the engines'."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.local.install import find_python
from penstock.predict.learned.tasks import Done, Failed, Progress, Said, Task, Tell

# Appended, not put first: the other Python's own packages must win over those beside ours.
_START = (
    "import sys; sys.path.append(sys.argv.pop()); from penstock.predict.learned.worker.__main__ import main; main()"
)


def torch_python(explicit: str | None = None) -> str:
    """Path of a Python that should have torch and transformers. Raises PenstockError if there is none."""
    if explicit is None and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return sys.executable
    return find_python(explicit)


def run_task(task: Task, tell: Tell | None = None, python: str | None = None) -> list[str]:
    """Run a task to its end in a process of its own.

    Parameters
    ----------
    task : Task
        What to do.
    tell : function, optional
        Called as it gets on.
    python : str, optional
        Its interpreter; by default found by :func:`torch_python`.

    Returns
    -------
    list of str
        What it has to say.

    Raises
    ------
    PenstockError
        It failed; with its own words where it had some.
    """
    command = [torch_python(python), "-c", _START, str(Path(__file__).resolve().parents[3])]
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        try:
            last = _listen(worker, task, tell)
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        if isinstance(last, Done):
            return last.notes
        if isinstance(last, Failed):
            raise PenstockError(last.problem, last.remedy)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    said = lines[-1].strip() if lines else f"exit code {worker.returncode}"
    raise PenstockError(
        f"{command[0]} could not do it ({said})", "it needs torch and transformers: `make engine-cpu`, or --python"
    )


def _listen(worker: subprocess.Popen[bytes], task: Task, tell: Tell | None) -> Said | None:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(msgspec.json.encode(task))
        worker.stdin.close()
    except BrokenPipeError:
        return None
    last: Said | None = None
    for line in worker.stdout:
        last = msgspec.json.decode(line, type=Said)
        if isinstance(last, Progress) and tell is not None:
            tell(last.what, last.done, last.total)
    worker.wait()
    return last
