"""Tasks over Ray: a stand-in with its interface, and Ray itself where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest

from penstock.core.errors import PenstockError
from penstock.rank.spread import OverRay, over_ray


def double(x: int) -> int:
    if x == 13:
        raise PenstockError("thirteen", "give another")
    return 2 * x


class FakeRay:
    """References are numbers; results become ready in the opposite order."""

    def __init__(self) -> None:
        self.results: dict[int, Any] = {}
        self.cancelled: list[int] = []
        self.options: dict[str, Any] = {}

    def remote(self, **options: Any) -> Any:
        self.options = options

        def decorate(function: Any) -> Any:
            def submit(*args: Any) -> int:
                self.results[len(self.results)] = function(*args)
                return len(self.results) - 1

            return types.SimpleNamespace(remote=submit)

        return decorate

    def wait(self, waiting: list[int]) -> tuple[list[int], list[int]]:
        return waiting[-1:], waiting[:-1]

    def get(self, reference: int) -> Any:
        return self.results[reference]

    def cancel(self, reference: int) -> None:
        self.cancelled.append(reference)


def test_order_is_that_of_the_tasks() -> None:
    ray = FakeRay()
    told: list[int] = []
    found = OverRay(ray)(double, [(1,), (2,), (3,)], told.append)
    assert found == [2, 4, 6] and told == [1, 2, 3]
    assert ray.options == {"num_cpus": 1}


def test_a_problem_of_a_task_is_raised_here_and_ends_the_rest() -> None:
    ray = FakeRay()
    with pytest.raises(PenstockError, match="thirteen: give another"):
        OverRay(ray)(double, [(1,), (2,), (13,)])
    assert ray.cancelled == [0, 1]


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PenstockError, match=r"not installed: pip install 'penstock\[ray\]'"), over_ray("auto"):
        pass


def test_an_address_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=refuse))
    said = r"no Ray cluster at 'auto' \(Could not find any running Ray instance.\)"
    with pytest.raises(PenstockError, match=said), over_ray("auto"):
        pass


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an optional extra")
def test_a_real_local_ray() -> None:
    with over_ray("local") as spread:
        assert spread(double, [(i,) for i in range(5)]) == [0, 2, 4, 6, 8]
        with pytest.raises(PenstockError, match="thirteen"):
            spread(double, [(13,)])
