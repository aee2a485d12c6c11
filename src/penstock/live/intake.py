"""What a client asks: checked, judged movable or not, and turned into the bodies that engines get."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from penstock.core.types import Slo
from penstock.live.wire import HANDOVER, Json

COMPLETION_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"


class BadRequest(Exception):
    """The client's mistake: ``status`` and OpenAI's ``param``; ``str`` is the message."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class Pinned:
    """Why a running decode stays where it is. Data, so that the header, metrics and docs say the same."""

    SEVERAL_CHOICES = "several-choices"
    SEVERAL_PROMPTS = "several-prompts"
    ECHO = "echo"
    GUIDED = "guided-decoding"
    PENALTY = "penalty"
    SEED = "seed"
    LOGPROBS = "logprobs"
    BAD_WORDS = "bad-words"
    TOOLS = "tools"
    PARSED = "parsed-output"
    CONTENT_PARTS = "content-parts"
    CONTINUED_MESSAGE = "continued-message"
    STOP_WITH_MIN_TOKENS = "stop-with-min-tokens"
    UNKNOWN_PARAMETER = "unknown-parameter"


# Sampling parameters that mean the same in a completion that continues from token ids.
CARRIED = frozenset(
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",  # decides whether the text of a stop token is shown
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "logit_bias",
        "allowed_token_ids",
        "priority",
        "user",
    ]
)
# Read by the gateway, or meaningless after the first engine has rendered the prompt.
HANDLED = frozenset(
    [
        "model",
        "prompt",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "stop",
        "n",
        "return_token_ids",
        "add_special_tokens",
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "store",
        "metadata",
        "service_tier",
    ]
)
# Key -> (values that change nothing, why a request with another value stays in place).
STAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((None, 1), Pinned.SEVERAL_CHOICES),
    "use_beam_search": ((None, False), Pinned.SEVERAL_CHOICES),
    "echo": ((None, False), Pinned.ECHO),
    "suffix": ((None, ""), Pinned.ECHO),
    "prompt_logprobs": ((None,), Pinned.LOGPROBS),
    "logprobs": ((None, False), Pinned.LOGPROBS),
    "top_logprobs": ((None, 0), Pinned.LOGPROBS),
    "presence_penalty": ((None, 0, 0.0), Pinned.PENALTY),
    "frequency_penalty": ((None, 0, 0.0), Pinned.PENALTY),
    "seed": ((None,), Pinned.SEED),
    "bad_words": ((None, []), Pinned.BAD_WORDS),
    "tools": ((None, []), Pinned.TOOLS),
    "tool_choice": ((None, "none", "auto"), Pinned.TOOLS),
    "parallel_tool_calls": ((None, True, False), Pinned.TOOLS),
    "response_format": ((None, {"type": "text"}), Pinned.GUIDED),
    "structured_outputs": ((None,), Pinned.GUIDED),
    "guided_json": ((None,), Pinned.GUIDED),
    "guided_regex": ((None,), Pinned.GUIDED),
    "guided_choice": ((None,), Pinned.GUIDED),
    "guided_grammar": ((None,), Pinned.GUIDED),
    "continue_final_message": ((None, False), Pinned.CONTINUED_MESSAGE),
}
# These cannot even be split after the prefill: one claim is good for one sequence.
ONE_ENGINE = frozenset(
    {Pinned.SEVERAL_CHOICES, Pinned.SEVERAL_PROMPTS, Pinned.ECHO, Pinned.CONTENT_PARTS, Pinned.UNKNOWN_PARAMETER}
)


class Intake:
    """One checked request.

    ``pinned`` is None for a request that may move; ``in_place`` says that one engine must do both phases.
    ``prompt_ids`` is None until an engine has rendered the prompt, unless the client sent ids. ``max_tokens`` is None
    for "as many as fit" (chat).
    """

    def __init__(self, chat: bool, body: Json) -> None:
        self.chat = chat
        self.body = body
        self.model: str = ""
        self.stream = False
        self.include_usage = False
        self.continuous_usage = False
        self.return_token_ids = False
        self.max_tokens: int | None = None
        self.min_tokens = 0
        self.stop: list[str] = []
        self.include_stop = False
        self.prompt_ids: list[int] | None = None
        self.prompt_chars = 0
        self.slo: Slo | None = None
        self.slo_class = "default"
        self.pinned: str | None = None

    @property
    def path(self) -> str:
        """The engine's path for the native body."""
        return CHAT_PATH if self.chat else COMPLETION_PATH

    @property
    def in_place(self) -> bool:
        """Must one engine do both phases?"""
        return self.pinned in ONE_ENGINE

    @property
    def greedy(self) -> bool:
        """Is the next token a function of the tokens before it?"""
        return self.body.get("temperature") == 0

    def native_body(self) -> Json:
        """The client's body, for an engine that answers for the client."""
        return self.body

    def prefill_body(self) -> Json:
        """The client's prompt with one token asked for and its KV kept."""
        body = {k: v for k, v in self.body.items() if k not in _NOT_IN_PREFILL}
        body["max_tokens"] = 1
        if self.min_tokens:
            body["min_tokens"] = 1
        body["stream"] = False
        body["return_token_ids"] = True
        body["kv_transfer_params"] = HANDOVER
        return body

    def opening_body(self, max_tokens: int) -> Json:
        """The client's prompt, streamed with token ids, for an engine that does both phases of a movable request."""
        body = {k: v for k, v in self.body.items() if k not in _NOT_IN_PREFILL}
        body["max_tokens"] = max_tokens
        if self.min_tokens:
            body["min_tokens"] = self.min_tokens
        body["stream"] = True
        body["return_token_ids"] = True
        return body

    def ids_body(self, ids: list[int], done: int, max_tokens: int, stream: bool = True) -> Json:
        """Go on from token ids: ``done`` of them are output already."""
        body: Json = {k: v for k, v in self.body.items() if k in CARRIED}
        body["model"] = self.model
        body["prompt"] = ids
        body["max_tokens"] = max_tokens
        left = self.min_tokens - done
        if left > 0:
            body["min_tokens"] = min(left, max_tokens)
        body["stream"] = stream
        body["return_token_ids"] = True
        return body


_NOT_IN_PREFILL = frozenset(
    {
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "stop",
        "return_token_ids",
    }
)


def read_intake(path: str, raw: bytes, headers: dict[str, str], parser_in_chat: bool = False) -> Intake:
    """Check a request body.

    Parameters
    ----------
    path : str
        ``/v1/completions`` or ``/v1/chat/completions``.
    raw : bytes
        JSON.
    headers : dict
        Lower-case names; ``penstock-slo-class``, ``penstock-slo-ttft-ms`` and ``penstock-slo-tpot-ms`` are read.
    parser_in_chat : bool
        Engines parse chat output (tools, reasoning): chats stay in place.

    Raises
    ------
    BadRequest
        With a message for the client.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    if body.get("kv_transfer_params") is not None:
        raise BadRequest("kv_transfer_params are the gateway's own; do not send them", "kv_transfer_params")
    body.pop("kv_transfer_params", None)
    intake = Intake(path == CHAT_PATH, body)
    _read_slo(intake, body.pop("penstock", None), headers)
    intake.model = _typed(body, "model", str, "")
    intake.stream = _typed(body, "stream", bool, False)
    intake.return_token_ids = _typed(body, "return_token_ids", bool, False)
    intake.include_stop = _typed(body, "include_stop_str_in_output", bool, False)
    options = _typed(body, "stream_options", dict, {})
    intake.include_usage = intake.stream and bool(options.get("include_usage"))
    intake.continuous_usage = intake.stream and bool(options.get("continuous_usage_stats"))
    intake.min_tokens = _bounded(body, "min_tokens", 0, 0)
    intake.max_tokens = _max_tokens(body, intake.chat)
    if options and not intake.stream:
        raise BadRequest("stream_options need stream to be true", "stream_options")
    if intake.max_tokens is not None and intake.min_tokens > intake.max_tokens:
        raise BadRequest(f"min_tokens must not be above max_tokens, which is {intake.max_tokens}", "min_tokens")
    intake.stop = _stops(body)
    _ranges(body)
    several = _bounded(body, "n", 1, 1, 1024)
    reason = Pinned.SEVERAL_CHOICES if several > 1 else None
    prompt_reason = _read_messages(intake, body) if intake.chat else _read_prompt(intake, body)
    intake.pinned = reason or prompt_reason or _pinned(body)
    if intake.pinned is None and intake.stop and intake.min_tokens:
        intake.pinned = Pinned.STOP_WITH_MIN_TOKENS
    if intake.pinned is None and intake.chat and parser_in_chat:
        intake.pinned = Pinned.PARSED
    return intake


def _pinned(body: Json) -> str | None:
    """The reason that binds tightest, or None."""
    found: str | None = None
    for key, value in body.items():
        if key in CARRIED or key in HANDLED:
            continue
        rule = STAYS.get(key)
        if rule is None:
            if value is not None:
                return Pinned.UNKNOWN_PARAMETER
            continue
        harmless, reason = rule
        if value in harmless or (key == "tool_choice" and not body.get("tools")):
            continue
        if reason in ONE_ENGINE:
            return reason
        found = reason
    return found


def _read_prompt(intake: Intake, body: Json) -> str | None:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        if not prompt:
            raise BadRequest("prompt is empty", "prompt")
        intake.prompt_chars = len(prompt)
        return None
    if isinstance(prompt, list) and prompt:
        if all(type(token) is int and 0 <= token < 2**31 for token in prompt):
            intake.prompt_ids = prompt
            return None
        if len(prompt) == 1 and isinstance(prompt[0], list) and prompt[0]:
            if all(type(token) is int and 0 <= token < 2**31 for token in prompt[0]):
                intake.prompt_ids = body["prompt"] = prompt[0]
                return None
        elif len(prompt) == 1 and isinstance(prompt[0], str) and prompt[0]:
            body["prompt"] = prompt[0]
            intake.prompt_chars = len(prompt[0])
            return None
        elif all(isinstance(p, str) and p for p in prompt) or all(isinstance(p, list) and p for p in prompt):
            intake.prompt_chars = sum(len(p) for p in prompt)
            return Pinned.SEVERAL_PROMPTS
    raise BadRequest("prompt must be a text, a list of token ids, or a list of these, and not empty", "prompt")


def _read_messages(intake: Intake, body: Json) -> str | None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of messages, and not empty", "messages")
    reason = None
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"messages[{i}] must be an object with a role", "messages")
        content = message.get("content")
        if isinstance(content, str):
            intake.prompt_chars += len(content)
        elif isinstance(content, list):
            for part in content:
                if not isinstance(part, dict):
                    raise BadRequest(f"messages[{i}].content holds something that is no content part", "messages")
                if part.get("type") == "text" and isinstance(part.get("text"), str):
                    intake.prompt_chars += len(part["text"])
                else:
                    reason = Pinned.CONTENT_PARTS
        elif content is not None:
            raise BadRequest(f"messages[{i}].content must be a text or a list of parts", "messages")
    return reason


def _read_slo(intake: Intake, own: Any, headers: dict[str, str]) -> None:
    """``penstock: {"slo": {"ttft_ms": …, "tpot_ms": …}, "class": …}``, or the same as headers."""
    if own is None:
        own = {}
    if not isinstance(own, dict):
        raise BadRequest('penstock must be an object, as {"slo": {"ttft_ms": 500}}', "penstock")
    unknown = set(own) - {"slo", "class"}
    if unknown:
        raise BadRequest(f"penstock knows slo and class, not {sorted(unknown)[0]!r}", "penstock")
    slo = own.get("slo") or {}
    if not isinstance(slo, dict) or set(slo) - {"ttft_ms", "tpot_ms"}:
        raise BadRequest("penstock.slo holds ttft_ms and tpot_ms", "penstock")
    name = own.get("class", headers.get("penstock-slo-class", "default"))
    if not isinstance(name, str) or not 0 < len(name) <= 64:
        raise BadRequest("penstock.class must be a name of at most 64 characters", "penstock")
    intake.slo_class = name
    values = []
    for key in ("ttft_ms", "tpot_ms"):
        value = slo.get(key, headers.get("penstock-slo-" + key.replace("_", "-")))
        if value is None:
            values.append(math.inf)
            continue
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not (number > 0 and math.isfinite(number)):
            raise BadRequest(f"{key} must be a number of milliseconds above 0", "penstock")
        values.append(number / 1000.0)
    if values != [math.inf, math.inf]:
        intake.slo = Slo(*values)


def _typed(body: Json, key: str, kind: type, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        names = {str: "a text", bool: "true or false", dict: "an object"}
        raise BadRequest(f"{key} must be {names[kind]}", key)
    return value


def _bounded(body: Json, key: str, default: int, least: int, most: int = 2**31 - 1) -> int:
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(f"{key} must be a whole number from {least} to {most}", key)
    return value


def _max_tokens(body: Json, chat: bool) -> int | None:
    for key in ("max_completion_tokens", "max_tokens"):
        if body.get(key) is not None:
            return _bounded(body, key, 1, 1)
    return None if chat else 16  # OpenAI's and vLLM's default


def _stops(body: Json) -> list[str]:
    stop = body.get("stop")
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 64 or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest("stop must be a text or a list of at most 64 texts, none of them empty", "stop")
    return stops


def _ranges(body: Json) -> None:
    """The mistakes that clients make most: said here, because engines' own messages are not passed on."""
    for key, least, most in (
        ("temperature", 0.0, 1e6),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 1e-9, 1e6),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ):
        value = body.get(key)
        if value is not None and not (
            isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
        ):
            raise BadRequest(f"{key} must be a number from {least:g} to {most:g}", key)
    if body.get("top_p") == 0:
        raise BadRequest("top_p must be above 0", "top_p")
    top_k = body.get("top_k")
    if top_k is not None and (type(top_k) is not int or top_k < -1):
        raise BadRequest("top_k must be a whole number, -1 or 0 for all tokens", "top_k")
