"""Where ``penstock ctl`` finds the gateways of this machine: one small file each, readable by their owner only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import psutil

from penstock.core.errors import PenstockError

CLOCK_SLACK_S = 5.0
"""How far two readings of a process's start may be apart: it is counted from the boot time, which a clock moves."""


class Found(msgspec.Struct, frozen=True):
    """One running gateway. ``key`` is empty where the operator chose one; ``started_s`` tells reused process ids."""

    url: str
    key: str
    pid: int
    started_s: float = 0.0


def folder() -> Path:
    """``$XDG_RUNTIME_DIR/penstock`` where that exists, else ``~/.local/state/penstock``."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime, "penstock")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "penstock"


def announce(url: str, key: str, port: int) -> Path:
    """Write the file of this process.

    Raises
    ------
    OSError
        It cannot be written.
    """
    where = folder()
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = where / f"{port}.json"
    new = where / f".{port}.{os.getpid()}"
    found = Found(url, key, os.getpid(), psutil.Process().create_time())
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    # Made with its final mode, so that there is no moment in which others can read the key.
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "wb") as file:
        file.write(msgspec.json.encode(found) + b"\n")
    new.replace(path)
    return path


def withdraw(path: Path) -> None:
    """Remove the file, unless another process has taken the place."""
    found = _read(path)
    if found is not None and found.pid == os.getpid():
        with contextlib.suppress(OSError):
            path.unlink()


def running() -> list[Found]:
    """The gateways whose process lives."""
    try:
        paths = sorted(folder().glob("*.json"))
    except OSError:
        return []
    found = [f for f in map(_read, paths) if f is not None]
    return [f for f in found if _alive(f)]


def the_one() -> Found:
    """The only gateway of this machine.

    Raises
    ------
    PenstockError
        There is none, or there are several.
    """
    found = running()
    if not found:
        raise PenstockError(
            "no gateway of yours was found on this machine",
            "is penstock serve running? else give --admin URL --key KEY",
        )
    if len(found) > 1:
        raise PenstockError("several gateways run here", "give --admin " + " or ".join(f.url for f in found))
    return found[0]


def key_of(url: str) -> str | None:
    """The key of the gateway on this machine at ``url``, if there is one with a known key."""
    return next((f.key for f in running() if f.url == url and f.key), None)


def _read(path: Path) -> Found | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Found)
    except (OSError, msgspec.MsgspecError):
        return None


def _alive(found: Found) -> bool:
    try:
        return abs(psutil.Process(found.pid).create_time() - found.started_s) < CLOCK_SLACK_S
    except psutil.Error:
        return False
