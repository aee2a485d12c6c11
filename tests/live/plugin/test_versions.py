"""A vLLM that the plugin does not know, or that lacks what it uses, is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.live.plugin.penstock_engine import versions


class Complete:
    """Has every attribute that is asked for."""

    def __init_subclass__(cls, names: tuple[str, ...] = ()) -> None:
        for name in names:
            setattr(cls, name, None)


def everything(path: str) -> Any:
    """Find a vLLM in which nothing is missing."""

    class Owner(Complete, names=tuple(versions.NEEDED[path])):
        pass

    return Owner


def test_known_versions_pass() -> None:
    for version in ("0.32.0", "0.32.1+cpu", "0.33.0"):
        assert versions.refusal(version, find=everything) is None


def test_others_are_refused_with_a_remedy() -> None:
    for version in ("0.22.1", "0.320.1", "1.0.0", "dev"):
        refusal = versions.refusal(version, find=everything)
        assert refusal is not None
        assert version in refusal
        assert "0.32.x, 0.33.x" in refusal
        assert versions.ANYWAY in refusal
        assert "\n" not in refusal
        assert versions.refusal(version, any_version=True, find=everything) is None


def test_what_is_missing_is_named() -> None:
    def find(path: str) -> Any:
        if path.endswith(":BlockPool"):
            return object
        if path.endswith(":Request"):
            raise ImportError(path)
        if path.endswith(":SchedulerOutput"):
            raise AttributeError(path)
        return everything(path)

    refusal = versions.refusal("0.32.0", find=find)
    assert refusal is not None
    assert "0.32.0 lacks Request, BlockPool.touch, BlockPool.free_blocks" in refusal
    assert "SchedulerOutput: run" in refusal
    assert versions.refusal("9.9", any_version=True, find=find) is not None


class Base:
    """Sets an attribute when it is made."""

    def __init__(self) -> None:
        self.deep = 1


class Derived(Base):
    """Sets another, and has a method."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow = 2

    def method(self) -> None:
        """Do nothing."""


@dataclass
class Record:
    """Has fields without values."""

    field: int


def test_attributes_are_found_without_an_instance() -> None:
    found = {"m:Derived": Derived, "m:Record": Record}
    needed = {"m:Derived": ("deep", "shallow", "method", "none"), "m:Record": ("field", "nothing")}
    assert versions.missing(needed, found.__getitem__) == ["Derived.none", "Record.nothing"]
