"""Logs hold what helps and nothing that clients or operators keep to themselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.live.logs import setup_logging

LOG = logging.getLogger("penstock.live")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    root, own = logging.getLogger(), logging.getLogger("penstock")
    before = (root.handlers[:], root.level, own.level)
    yield tmp_path / "gateway.log"
    for handler in [h for h in root.handlers if h not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    own.setLevel(before[2])


def test_json_lines_hold_the_named_fields_only(file: Path) -> None:
    setup_logging(json=True, file=str(file))
    LOG.warning("fence", extra={"instance": 2, "reason": "it hangs", "prompt": "my secret", "body": b"x"})
    LOG.debug("not shown")
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "penstock.live",
        "message": "fence",
        "instance": 2,
        "reason": "it hangs",
    }


def test_text_is_one_line_an_event(file: Path) -> None:
    setup_logging(file=str(file), level="debug")
    LOG.info("flip\nforged line", extra={"instance": 1, "role": "PREFILL", "reason": 'so "be" it'})
    (line,) = file.read_text().splitlines()
    assert line.split(" ", 1)[1] == 'info flip forged line instance=1 role=PREFILL reason="so \\"be\\" it"'


@pytest.mark.parametrize("as_json", [True, False])
def test_keys_and_quoted_prompts_stay_out(file: Path, as_json: bool) -> None:
    setup_logging(json=as_json, file=str(file), secrets=["sk-live", "sk-live-2", ""])
    complaint = '{"error":{"message":"bad value: \'my medical history\'","type":"BadRequestError"}}'
    LOG.warning("engine fault", extra={"status": 400, "reason": complaint})
    LOG.warning("engine fault", extra={"status": 422, "reason": "input: my medical history"})
    LOG.warning("engine fault", extra={"status": 500, "reason": "EngineCore encountered an issue " + "x" * 5000})
    LOG.warning("engine fault", extra={"status": 0, "reason": "connection refused"})
    LOG.warning("call with Authorization: Bearer abc.def failed", extra={"url": "http://user:pass@h:1/x"})
    try:
        raise ValueError("the key is sk-live-2")
    except ValueError:
        LOG.exception("trouble with sk-live")
    text = file.read_text()
    for hidden in ("medical", "abc.def", "user:pass", "sk-live", "x" * 400):
        assert hidden not in text
    for kept in ("BadRequestError", "EngineCore", "connection refused", "Bearer ***", "Traceback", "the key is ***"):
        assert kept in text


def test_a_second_call_replaces_the_first(file: Path) -> None:
    first = setup_logging(file=str(file))
    second = setup_logging(file=str(file), level="error")
    root = logging.getLogger()
    assert second in root.handlers and first not in root.handlers
    LOG.warning("too quiet")
    LOG.error("heard once")
    assert file.read_text().count("heard once") == 1 and "too quiet" not in file.read_text()


def test_what_cannot_be_set_up_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match="debug, info, warning, error"):
        setup_logging(level="loud")
    with pytest.raises(PenstockError, match="give a path"):
        setup_logging(file=str(tmp_path / "no" / "folder.log"))
