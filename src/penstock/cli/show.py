"""What a command says: tables, notes, progress and files. Tables go to stdout, the rest to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PATIENCE_S = 1.0
"""A progress bar appears when something takes longer than this."""


class Show:
    """Where output goes.

    Parameters
    ----------
    quiet : bool
        No tables, notes and bars: only files, and what ``--json -`` writes to stdout.
    json_path : str or None
        ``-`` gives stdout to the JSON; tables then go to stderr.
    """

    def __init__(self, quiet: bool = False, json_path: str | None = None) -> None:
        from rich.console import Console

        self.quiet = quiet
        self.json_path = json_path
        check_writable(None if json_path == "-" else json_path)
        self.err = Console(stderr=True, quiet=quiet)
        self.out = self.err if json_path == "-" else _wide(Console(quiet=quiet))

    def print(self, *things: RenderableType) -> None:
        """Print tables or lines of results."""
        for thing in things:
            if isinstance(thing, str):
                self.out.print(thing, markup=False, highlight=False, soft_wrap=not self.out.is_terminal)
            else:
                self.out.print(thing)

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        self.err.print(f"note: {text}", style="dim", markup=False, highlight=False, soft_wrap=True)

    def json(self, content: Any) -> None:
        """Write the document where ``--json`` said, if it did.

        Raises
        ------
        PenstockError
            The file cannot be written.
        """
        if self.json_path is None:
            return
        import msgspec

        text = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
        if self.json_path == "-":
            sys.stdout.write(text.decode())
            return
        with writing(self.json_path), open(self.json_path, "wb") as file:
            file.write(text)
        self.wrote(self.json_path)

    def wrote(self, path: str) -> None:
        """Say that a file was written."""
        self.err.print(f"wrote {path}", style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A progress bar that appears after a second; yields a function that takes the number of things done."""
        bar = _LateBar(self.err, what, total)
        try:
            yield bar.update
        finally:
            bar.stop()

    @contextmanager
    def phases(self, what: str) -> Iterator[Callable[[int, str], None]]:
        """Show how several things get on; yields ``say(index, phase)``, index -1 for all of them together."""
        found: dict[int, str] = {}
        start = time.monotonic()
        live = self.err.is_terminal and not self.err.quiet
        status = self.err.status(what) if live else None
        if status is not None:
            status.start()

        def say(index: int, phase: str) -> None:
            if found.get(index) == phase:
                return
            found[index] = phase
            took = time.monotonic() - start
            if status is not None:
                if index < 0:
                    found.clear()
                    found[index] = phase
                line = ", ".join(f"{i}: {p}" if i >= 0 else p for i, p in sorted(found.items()))
                status.update(f"{what} ({line})")
            else:
                self.note(f"{took:5.1f} s  {'' if index < 0 else f'engine {index}: '}{phase}")

        try:
            yield say
        finally:
            if status is not None:
                status.stop()


def check_writable(*paths: str | None) -> None:
    """Raise PenstockError for the first path that no file can be written to, before a long run rather than after."""
    import os

    from penstock.core.errors import PenstockError

    for path in paths:
        if path is None:
            continue
        if path == "-":
            raise PenstockError("only --json can write to stdout (-)", "give a path")
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.path.isdir(folder):
            why = "it is a folder" if os.path.isdir(path) else f"there is no folder {folder}"
            raise PenstockError(f"cannot write {path} ({why})", "give a path you may write")


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an OSError while writing ``path`` into a PenstockError."""
    from penstock.core.errors import PenstockError

    try:
        yield
    except OSError as error:
        raise PenstockError(f"cannot write {path} ({error.strerror or error})", "give a path you may write") from None


def _wide(console: Console) -> Console:
    """A console that does not squeeze tables where stdout is a file or a pipe."""
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


class _LateBar:
    def __init__(self, console: Console, what: str, total: int | None) -> None:
        self.console = console
        self.what = what
        self.total = total
        self.start = time.monotonic()
        self.progress: Any = None
        self.task: Any = None

    def update(self, done: int) -> None:
        if self.progress is None:
            if time.monotonic() - self.start < PATIENCE_S or not self.console.is_terminal or self.console.quiet:
                return
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.task = self.progress.add_task(self.what, total=self.total)
            self.progress.start()
        self.progress.update(self.task, completed=done)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
