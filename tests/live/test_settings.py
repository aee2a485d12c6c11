"""What ``penstock serve`` is told, before anything is started."""

from __future__ import annotations

import pytest

from penstock.core.errors import PenstockError
from penstock.core.types import MigrationLevel, Role
from penstock.live.settings import Attached, ServeSettings, attached


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://h:1", Attached("http://h:1", Role.MIXED)),
        ("http://h:1/,role=decode", Attached("http://h:1", Role.DECODE)),
        ("http://h:1,role=prefill, plugin=tcp://h:5", Attached("http://h:1", Role.PREFILL, "tcp://h:5")),
        ("https://h,plugin=tcp://[::1]:65534", Attached("https://h", Role.MIXED, "tcp://[::1]:65534")),
    ],
)
def test_servers_that_run(text: str, found: Attached) -> None:
    assert attached(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "ftp://h:1",
        "http://h:1/v1",
        "http://h:1,role=cook",
        "http://h:1,plugin=",
        "http://h:1,plugin=h:5",
        "http://h:1,plugin=http://h:5",
        "http://h:1,plugin=tcp://h",
        "http://h:1,plugin=tcp://h:0",
        "http://h:1,plugin=tcp://h:65535",  # commands go to the port above
        "http://h:1,plugin=tcp://h:70000",
        "http://h:1,plugin=tcp://h:5/path",
        "http://h:1,color=blue",
    ],
)
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(PenstockError) as caught:
        attached(text)
    assert caught.value.remedy


def test_the_migration_level() -> None:
    def believed(level: str) -> MigrationLevel:
        return ServeSettings(migration_level=level, policy="least-kv").setup().cluster.migration_level

    assert {level: believed(level) for level in ("replay", "reprompt", "handoff", "precopy")} == {
        level.name.lower(): level for level in MigrationLevel
    }
    assert believed("auto") == MigrationLevel.REPROMPT
    with pytest.raises(PenstockError, match="teleport"):
        believed("teleport")
