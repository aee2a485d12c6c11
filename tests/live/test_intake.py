"""What the gateway makes of request bodies, without any engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.live.intake import CHAT_PATH, COMPLETION_PATH, STAYS, BadRequest, Intake, read_intake
from penstock.live.stops import StopMatcher


def read(body: Any, path: str = COMPLETION_PATH, **headers: str) -> Intake:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return read_intake(path, raw, {k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"null", None),
        (b'"x"', None),
        (b"\xff", None),
        (b'{"prompt":"x"', None),
        (b'{"prompt":NaN}', None),
        (b"[" * 5000 + b"]" * 5000, None),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "stream": 1}, "stream"),
        ({"prompt": "x", "stream_options": []}, "stream_options"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "model": 3}, "model"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 1025}, "n"),
        ({"prompt": "x", "n": True}, "n"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2**31}, "max_tokens"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "x", "min_tokens": -1}, "min_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "min_p": 2}, "min_p"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "presence_penalty": 2.1}, "presence_penalty"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 65}, "stop"),
        ({"prompt": "x", "penstock": 5}, "penstock"),
        ({"prompt": "x", "penstock": {"slow": 5}}, "penstock"),
        ({"prompt": "x", "penstock": {"class": ""}}, "penstock"),
        ({"prompt": "x", "penstock": {"class": "x" * 65}}, "penstock"),
        ({"prompt": "x", "penstock": {"slo": {"ttft": 5}}}, "penstock"),
        ({"prompt": "x", "penstock": {"slo": {"ttft_ms": 0}}}, "penstock"),
        ({"prompt": "x", "penstock": {"slo": {"ttft_ms": True}}}, "penstock"),
        ({"prompt": "x", "penstock": {"slo": {"tpot_ms": "inf"}}}, "penstock"),
        ({"prompt": "x", "penstock": {"slo": {"tpot_ms": 10**400}}}, "penstock"),
        ({"prompt": "x", "kv_transfer_params": {}}, "kv_transfer_params"),
    ],
)
def test_mistakes_are_named(body: Any, param: str | None) -> None:
    try:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    except OverflowError:
        raw = repr(body).replace("'", '"').encode()
    with pytest.raises(BadRequest) as refused:
        read_intake(COMPLETION_PATH, raw, {})
    assert refused.value.status == 400
    if param is not None:
        assert refused.value.param == param


@pytest.mark.parametrize(
    "messages",
    [None, [], {}, "x", [1], [{}], [{"role": 1}], [{"role": "user", "content": 5}], [{"role": "user", "content": [1]}]],
)
def test_messages_must_be_messages(messages: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        read({"messages": messages}, CHAT_PATH)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(("key", "rule"), STAYS.items())
def test_each_rule_has_values_that_pin_and_values_that_do_not(key: str, rule: tuple[tuple[Any, ...], str]) -> None:
    harmless, reason = rule
    further: dict[str, Any] = {"tools": [{}]} if key == "tool_choice" else {}
    for value in harmless:
        if not further:
            assert read({"prompt": "x", key: value}).pinned is None
    value = {"presence_penalty": 1, "frequency_penalty": 1}.get(key, "something")
    assert read({"prompt": "x", key: value, **further}).pinned == reason


def test_what_engines_get_for_a_request_that_goes_on() -> None:
    body = {
        "model": "m",
        "prompt": "x",
        "max_tokens": 30,
        "min_tokens": 10,
        "temperature": 0.5,
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "stream": True,
        "user": "me",
    }
    intake = read(body)
    assert intake.pinned is None
    prefill = intake.prefill_body()
    assert (prefill["max_tokens"], prefill["min_tokens"], prefill["stream"]) == (1, 1, False)
    later = intake.ids_body([1, 2, 3], 4, 26)
    assert later["prompt"] == [1, 2, 3]
    assert (later["max_tokens"], later["min_tokens"]) == (26, 6)
    assert later["temperature"] == 0.5 and later["stop_token_ids"] == [3]
    assert later["include_stop_str_in_output"] is True
    assert "stop" not in later and "stream_options" not in later
    assert "min_tokens" not in intake.ids_body([1], 10, 20)


def test_stop_strings_stay_with_the_gateway() -> None:
    intake = read({"prompt": "x", "stop": ["a", "bc"]})
    assert intake.stop == ["a", "bc"]
    for body in (intake.prefill_body(), intake.opening_body(5), intake.ids_body([1], 0, 5)):
        assert "stop" not in body


def test_one_prompt_in_a_list_is_one_prompt() -> None:
    assert read({"prompt": [[5, 6]]}).prompt_ids == [5, 6]
    one = read({"prompt": ["text"]})
    assert (one.pinned, one.body["prompt"]) == (None, "text")
    assert read({"prompt": [[5], [6]]}).pinned == "several-prompts"
    assert read({"prompt": ["a", "b"]}).in_place


def test_headers_name_class_and_targets() -> None:
    intake = read({"prompt": "x"}, penstock_slo_class="chat", penstock_slo_ttft_ms="100")
    assert intake.slo_class == "chat" and intake.slo is not None and intake.slo.ttft_s == 0.1
    for wrong in ("", "x", "nan", "-1", "1e999"):
        with pytest.raises(BadRequest):
            read({"prompt": "x"}, penstock_slo_tpot_ms=wrong)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stops", [["abab"], ["b", "abc"], ["c", "bc", "abc"], ["é😀"], ["zz"]])
def test_stop_strings_are_found_however_the_text_is_cut(stops: list[str], include: bool) -> None:
    """Fed in pieces of any size, the text that is shown and the stop that is hit are those of the text as a whole."""
    text = "xaabababc é😀 end"
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    end, start, hit = min(ends, default=(len(text), len(text), None))
    for size in range(1, len(text) + 1):
        matcher = StopMatcher(stops, include)
        shown = ""
        for at in range(0, len(text), size):
            shown += matcher.feed(text[at : at + size])
            if matcher.hit is not None:
                break
            assert text.startswith(shown)
        if matcher.hit is None:
            shown += matcher.flush()
        assert matcher.hit == hit
        assert shown == (text[:end] if include or hit is None else text[:start])
