"""Fixtures for all tests of the live world."""

from __future__ import annotations

import pytest

from tests.live.engines import engines, solvers

__all__ = ["engines", "solvers"]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with real engines, so that they can be run apart."""
    for item in items:
        if {"engines", "solvers"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("engines")
