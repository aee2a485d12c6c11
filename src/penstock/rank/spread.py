"""Many tasks over the cores of this machine (joblib) or of a Ray cluster: one function, two ways to call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from penstock.core.errors import PenstockError
from penstock.experiment.repeat import Done, fan_out

T = TypeVar("T")


class Spread(Protocol):
    """``[call(*task) for task in tasks]`` in order, somewhere else; ``done`` is told how many have ended."""

    def __call__(self, call: Callable[..., T], tasks: Sequence[tuple[Any, ...]], done: Done | None = None) -> list[T]:
        """See the class. Errors of a task are raised here."""
        ...


class OverCores:
    """Processes on this machine; 0 or less: one a core."""

    def __init__(self, jobs: int = 0) -> None:
        self.jobs = jobs

    def __call__(self, call: Callable[..., T], tasks: Sequence[tuple[Any, ...]], done: Done | None = None) -> list[T]:
        """See :class:`Spread`."""
        return fan_out(call, tasks, self.jobs, done)


class OverRay:
    """Ray tasks of one CPU each, placed by Ray's own scheduler. Made by :func:`over_ray`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._remote = ray.remote(num_cpus=1)(answer)

    def __call__(self, call: Callable[..., T], tasks: Sequence[tuple[Any, ...]], done: Done | None = None) -> list[T]:
        """See :class:`Spread`."""
        where = {self._remote.remote(call, task): i for i, task in enumerate(tasks)}
        found: dict[int, T] = {}
        waiting = list(where)
        while waiting:
            ready, waiting = self._ray.wait(waiting)
            for reference in ready:
                value, problem = self._ray.get(reference)
                if problem is not None:
                    for other in waiting:
                        self._ray.cancel(other)
                    raise PenstockError(*problem)
                found[where[reference]] = value
                if done is not None:
                    done(len(found))
        return [found[i] for i in range(len(tasks))]


def answer(call: Callable[..., T], task: tuple[Any, ...]) -> tuple[T | None, tuple[str, str] | None]:
    """The result of a task, or the two texts of its PenstockError, which Ray would wrap in an error of its own."""
    try:
        return call(*task), None
    except PenstockError as error:
        return None, (error.problem, error.remedy)


@contextmanager
def over_ray(address: str) -> Iterator[OverRay]:
    """Connect to a Ray cluster (``auto``, ``HOST:PORT``, ``ray://HOST:PORT``) or start one here (``local``).

    The nodes need this release of Penstock, and trace files under the same path.

    Raises
    ------
    PenstockError
        Ray is not installed, or nothing answers at the address.
    """
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise PenstockError("--ray needs Ray, which is not installed", "pip install 'penstock[ray]'") from None
    try:
        ours = {"include_dashboard": False} if address == "local" else {}  # a running cluster has its own settings
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **ours)
    except Exception as error:  # Ray has no common base for what can go wrong here
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PenstockError(
            f"no Ray cluster at {address!r} ({text})", "give the address of `ray start --head`, or local"
        ) from None
    try:
        yield OverRay(ray)
    finally:
        ray.shutdown()
