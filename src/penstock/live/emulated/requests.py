"""Bodies of requests, checked as vLLM checks them, and what is wrong with them as vLLM says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from penstock.live.emulated.settings import Plan
from penstock.live.emulated.vocabulary import SIZE, Ids, Prompt, encode, encode_chat

T = TypeVar("T")
_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, param, status)


def error_body(message: str, param: str | None = None, status: int = 500) -> bytes:
    """An error as vLLM shapes it."""
    kind = _TYPES.get(status, "InternalServerError")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``, with vLLM's addition."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class TransferParams(msgspec.Struct):
    """vLLM's ``kv_transfer_params`` of the NixlConnector."""

    do_remote_decode: bool | None = False
    do_remote_prefill: bool | None = False
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_block_ids: list[list[int]] | None = None
    remote_host: str | None = None
    remote_port: int | None = None


class GenerationBody(msgspec.Struct):
    """What completions and chats share; further keys are ignored, as vLLM does."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = 0
    ignore_eos: bool | None = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = False
    return_token_ids: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    use_beam_search: bool | None = False
    prompt_logprobs: int | None = None
    kv_transfer_params: TransferParams | None = None


class CompletionBody(GenerationBody):
    """``/v1/completions``."""

    prompt: Any = None
    prompt_embeds: Any = None
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None


class Message(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: Any = None


class ChatBody(GenerationBody):
    """``/v1/chat/completions``."""

    messages: list[Message] = []
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    add_generation_prompt: bool | None = True


class TokenizeBody(msgspec.Struct):
    """``/tokenize``, of a text or of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool | None = True


class DetokenizeBody(msgspec.Struct):
    """``/detokenize``."""

    tokens: list[int]
    model: str | None = None


class Options(msgspec.Struct, frozen=True):
    """How one request wants its output. ``logprobs`` is the number of alternatives, None for no logprobs at all."""

    stream: bool
    include_usage: bool
    usage_each: bool
    min_tokens: int
    eos_below: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    include_stop: bool
    return_ids: bool
    logprobs: int | None
    pin: bool
    pull: TransferParams | None
    stuck: bool
    """``do_remote_decode`` with remote blocks: stock vLLM without ``bidirectional_kv_xfer`` parks it for ever."""


def read(raw: bytes, kind: type[T]) -> T:
    """Decode a body; raises ApiError."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(str(error)) from None


def check_model(name: str | None, plan: Plan) -> None:
    """Raises ApiError (404) for a model that is not served here."""
    if name and name != plan.model:
        raise ApiError(f"The model `{name}` does not exist.", "model", 404)


def options_of(body: GenerationBody, plan: Plan, logprobs: int | None) -> Options:
    """Check the sampling options; raises ApiError."""
    if body.stream_options is not None and not body.stream:
        raise ApiError("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.use_beam_search:
        raise ApiError("beam search is not supported by the emulated engine", "use_beam_search")
    if body.prompt_logprobs is not None:
        raise ApiError("prompt_logprobs are not supported by the emulated engine", "prompt_logprobs")
    if body.n is not None and not 1 <= body.n <= 128:
        raise ApiError(f"n must be between 1 and 128, got {body.n}.", "n")
    if body.temperature is not None and body.temperature < 0.0:
        raise ApiError(f"temperature must be non-negative, got {body.temperature}.", "temperature")
    if body.top_p is not None and not 0.0 < body.top_p <= 1.0:
        raise ApiError(f"top_p must be in (0, 1], got {body.top_p}.", "top_p")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in stop:
        raise ApiError("stop cannot contain an empty string.", "stop")
    if logprobs is not None and not 0 <= logprobs <= 20:
        raise ApiError(f"Requested sample logprobs of {logprobs}, which is not between 0 and 20.", "logprobs")
    wanted = body.stream_options or StreamOptions()
    params = body.kv_transfer_params or TransferParams()
    pull = params if params.do_remote_prefill else None
    if pull is not None and not (pull.remote_engine_id and pull.remote_request_id and pull.remote_block_ids):
        pull = None  # vLLM logs "Got invalid KVTransferParams" and computes by itself
    return Options(
        stream=bool(body.stream),
        include_usage=bool(wanted.include_usage),
        usage_each=bool(wanted.continuous_usage_stats),
        min_tokens=body.min_tokens or 0,
        eos_below=0 if body.ignore_eos else plan.eos_below,
        stop=stop,
        stop_ids=frozenset(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        return_ids=bool(body.return_token_ids),
        logprobs=logprobs,
        pin=bool(params.do_remote_decode),
        pull=pull,
        stuck=bool(params.do_remote_decode and params.remote_block_ids and pull is None),
    )


def check_length(ids: Ids, plan: Plan) -> None:
    """Raises ApiError for a prompt that leaves no room for output."""
    most = plan.max_model_len
    if len(ids) >= most:
        raise ApiError(
            f"This model's maximum context length is {most} tokens. However, your request has {len(ids)} input tokens. "
            "Please reduce the length of the input messages.",
            "input_tokens",
        )


def output_limit(body: GenerationBody, prompt: int, default: int | None, plan: Plan) -> int:
    """Tokens that may be generated; raises ApiError where prompt and output are longer than the model allows."""
    most = plan.max_model_len
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if wanted is not None and wanted < 1:
        raise ApiError(f"max_tokens must be at least 1, got {wanted}.", "max_tokens")
    wanted = default if wanted is None else wanted
    limit = most - prompt if wanted is None else wanted
    if prompt + limit > most:
        raise ApiError(
            f"'max_tokens' or 'max_completion_tokens' is too large: {limit}. This model's maximum context length is "
            f"{most} tokens and your request has {prompt} input tokens ({limit} > {most} - {prompt}).",
            "max_tokens",
        )
    if body.min_tokens is not None and not 0 <= body.min_tokens <= limit:
        raise ApiError(f"min_tokens must be between 0 and max_tokens={limit}, got {body.min_tokens}.", "min_tokens")
    return limit


def prompts_of(body: CompletionBody, plan: Plan) -> list[Prompt]:
    """The prompts of a completion; raises ApiError."""
    if body.echo:
        raise ApiError("echo is not supported by the emulated engine", "echo")
    if body.suffix:
        raise ApiError("suffix is not currently supported", "suffix")
    if body.prompt_embeds is not None:
        raise ApiError("prompt embeds are not supported by the emulated engine", "prompt_embeds")
    prompt = body.prompt
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return [_prompt(part, plan) for part in (prompt if several else [prompt])]


def _prompt(prompt: Any, plan: Plan) -> Prompt:
    if isinstance(prompt, str):
        ids = encode(prompt)
    elif isinstance(prompt, list):
        ids = ids_of(prompt)
    else:
        raise ApiError("prompt must be a string, a list of token ids, or a list of these", "prompt")
    if not len(ids):
        raise ApiError("The decoder prompt cannot be empty", "prompt")
    check_length(ids, plan)
    return Prompt(ids, plan.spec.block_size)


def ids_of(tokens: Sequence[Any]) -> Ids:
    """Token ids from JSON; raises ApiError."""
    for token in tokens:
        if type(token) is not int or not 0 <= token < SIZE:
            raise ApiError(f"Token id {token!r} is out of vocabulary", "prompt")
    return np.array(tokens, np.uint16)


def chat_prompt(messages: Sequence[Message], answer: bool, plan: Plan) -> Prompt:
    """The rendered prompt of a chat; raises ApiError."""
    ids = encode_chat([(m.role, _content(m.content)) for m in messages], answer)
    check_length(ids, plan)
    return Prompt(ids, plan.spec.block_size)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if all(isinstance(p, str) for p in parts):
            return "\n".join(str(p) for p in parts)
    raise ApiError("content must be a string or a list of text parts: this is not a multimodal model", "messages")
