"""What a league has played so far, in a file: broken off, it goes on where it was.

One JSON object a line: a key, which is a digest of all that the result follows from (the task, the files it reads and
Penstock's own source), and the result. Lines of other leagues and of other sources are left alone and do no harm.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

import penstock
from penstock.core.errors import PenstockError
from penstock.experiment.build import digests
from penstock.experiment.repeat import Done, fan_out
from penstock.experiment.setup import Setup

T = TypeVar("T")
_START = b'{"key":'


class Line(msgspec.Struct):
    """One result."""

    key: str
    result: msgspec.Raw


class Ledger(Generic[T]):
    """Results of one kind, by the tasks that they came from; with no ``path``, in memory only.

    Raises
    ------
    PenstockError
        The file cannot be read or written, or is no such file.
    """

    def __init__(self, path: str | None, kind: type[T]) -> None:
        self.path = path
        self.kind = kind
        self._known: dict[str, T] = {}
        if path is not None:
            self._read(Path(path))

    def fan_out(
        self, call: Callable[..., T], tasks: Sequence[tuple[Any, ...]], jobs: int = 0, done: Done | None = None
    ) -> list[T]:
        """As :func:`penstock.experiment.repeat.fan_out`, but for what is known; every result is written at once."""
        keys = [key_of(call.__name__, task) for task in tasks]
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        known = len(tasks) - len(missing)
        if done is not None and known > 0:
            done(known)
        fan_out(
            call,
            [tasks[i] for i in missing],
            jobs,
            None if done is None else lambda ended: done(known + ended),
            lambda k, result: self._keep(keys[missing[k]], result),
        )
        return [self._known[key] for key in keys]

    def known(self, call: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> list[T]:
        """The results of those tasks that have one."""
        keys = [key_of(call.__name__, task) for task in tasks]
        return [self._known[key] for key in keys if key in self._known]

    def _keep(self, key: str, result: T) -> None:
        self._known[key] = result
        if self.path is not None:
            line = msgspec.json.encode(Line(key, msgspec.Raw(msgspec.json.encode(result))))
            with open(self.path, "ab") as file:
                file.write(line + b"\n")

    def _read(self, path: Path) -> None:
        try:
            with open(path, "ab"):  # now, rather than after the first result
                pass
            text = path.read_bytes()
        except OSError as error:
            raise PenstockError(f"{path}: {error.strerror}", "give --keep a file that can be written") from None
        whole = text[: text.rfind(b"\n") + 1]
        torn = text[len(whole) :]
        if torn and not torn.startswith(_START[: len(torn)]):
            whole = text  # whatever it is, it is not ours
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = msgspec.json.decode(line, type=Line)
            except msgspec.DecodeError:
                remedy = "give --keep a file of its own"
                raise PenstockError(f"{path}: line {number} is no result of a league", remedy) from None
            with contextlib.suppress(msgspec.ValidationError):  # of another kind
                self._known[found.key] = msgspec.json.decode(found.result, type=self.kind)
        if len(whole) < len(text):  # broken off in the middle of a line
            path.write_bytes(whole)


def key_of(call: str, task: tuple[Any, ...]) -> str:
    """A digest of a task, its call, the files that it names and the source."""
    files = [digests(one) | _trace(one.workload.trace) for one in task if isinstance(one, Setup)]
    text = msgspec.json.encode([_source(), call, task, files], enc_hook=repr)
    return hashlib.sha256(text).hexdigest()[:32]


@functools.cache
def _trace(path: str | None) -> dict[str, str]:
    return {} if path is None else {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}


@functools.cache
def _source() -> str:
    """A digest of the package: another policy is another league."""
    found = hashlib.sha256()
    root = Path(penstock.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()
