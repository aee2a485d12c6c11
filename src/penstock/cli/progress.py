"""A progress bar for things that take real time: share done, rate, time left. It goes to stderr, on terminals only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.cli.show import Show


@contextmanager
def running(show: Show, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that takes how many are done and how many there are, or None where nobody would see it."""
    if not show.err.is_terminal or show.err.quiet:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Things a second, lately."""

        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    # Drawn from our own calls: a drawing thread would take turns with the event loop.
    with Progress(*columns, console=show.err, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, refresh=True)

        yield update
