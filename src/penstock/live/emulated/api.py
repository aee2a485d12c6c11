"""The HTTP surface of stock vLLM, as far as gateways, load generators and operators use it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.live.emulated.answer import Answer
from penstock.live.emulated.choice import Choice
from penstock.live.emulated.metrics import Page
from penstock.live.emulated.requests import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    chat_prompt,
    check_model,
    ids_of,
    options_of,
    output_limit,
    prompts_of,
    read,
)
from penstock.live.emulated.shapes import ChatShape, CompletionShape
from penstock.live.emulated.vocabulary import Prompt, decode, encode
from penstock.live.http.server import Reply

if TYPE_CHECKING:
    from penstock.live.emulated.instance import EmulatedEngine

VERSION = "0.33.0+emulated"
COMPLETION_TOKENS = 16  # OpenAI's default


class Api:
    """Routes of one instance."""

    def __init__(self, engine: EmulatedEngine) -> None:
        self.engine = engine
        self.created = int(time.time())
        self.routes: dict[str, dict[str, Callable[[Reply], None]]] = {
            "/v1/completions": {"POST": self.completions},
            "/v1/chat/completions": {"POST": self.chat},
            "/tokenize": {"POST": self.tokenize},
            "/detokenize": {"POST": self.detokenize},
            "/reset_prefix_cache": {"POST": self.reset_prefix_cache},
            "/v1/models": {"GET": self.models},
            "/health": {"GET": _empty},
            "/ping": {"GET": _empty, "POST": _empty},
            "/version": {"GET": lambda reply: _json(reply, {"version": VERSION})},
            "/metrics": {"GET": self.metrics},
        }

    def handle(self, reply: Reply) -> None:
        """Answer a request."""
        methods = self.routes.get(reply.request.path)
        if methods is None:
            _json(reply, {"detail": "Not Found"}, 404)
            return
        method = "GET" if reply.request.method == "HEAD" else reply.request.method
        handler = methods.get(method)
        if handler is None:
            _json(reply, {"detail": "Method Not Allowed"}, 405)
            return
        try:
            handler(reply)
        except ApiError as error:
            reply.send(error.status, error.body)

    # -- generation -------------------------------------------------------------------------------------------------

    def completions(self, reply: Reply) -> None:
        """POST /v1/completions."""
        self._injected()
        body = read(reply.request.body, CompletionBody)
        plan = self.engine.plan
        check_model(body.model, plan)
        self._generate(reply, body, prompts_of(body, plan), body.logprobs, False)

    def chat(self, reply: Reply) -> None:
        """POST /v1/chat/completions."""
        self._injected()
        body = read(reply.request.body, ChatBody)
        plan = self.engine.plan
        check_model(body.model, plan)
        if not body.messages:
            raise ApiError("messages must not be empty", "messages")
        prompt = chat_prompt(body.messages, body.add_generation_prompt is not False, plan)
        self._generate(reply, body, [prompt], (body.top_logprobs or 0) if body.logprobs else None, True)

    def _injected(self) -> None:
        """Fail as an engine with a bug does, if a test asked for that."""
        if self.engine.failures > 0:
            self.engine.failures -= 1
            raise ApiError("EngineCore encountered an issue. See stack trace for the root cause.", None, 500)

    def _generate(
        self, reply: Reply, body: GenerationBody, prompts: list[Prompt], logprobs: int | None, chat: bool
    ) -> None:
        engine = self.engine
        plan = engine.plan
        options = options_of(body, plan, logprobs)
        limits = [output_limit(body, len(p), None if chat else COMPLETION_TOKENS, plan) for p in prompts]
        given = reply.request.headers.get("x-request-id") or uuid.uuid4().hex
        shape = (ChatShape if chat else CompletionShape)(given, int(time.time()), plan.model)
        answer = Answer(reply, shape, chat, options, prompts, plan.spec.block_size)
        for prompt, limit in zip(prompts, limits, strict=True):
            for _ in range(body.n or 1):
                answer.choices.append(
                    Choice(answer, len(answer.choices), prompt, limit, options, engine.next_request())
                )
        reply.on_disconnect = lambda: engine.when_awake(lambda: self._abort(answer))
        for choice in answer.choices:
            engine.driver.submit(choice)

    def _abort(self, answer: Answer) -> None:
        for choice in answer.choices:
            self.engine.driver.abort(choice)

    # -- the rest ---------------------------------------------------------------------------------------------------

    def tokenize(self, reply: Reply) -> None:
        """POST /tokenize."""
        body = read(reply.request.body, TokenizeBody)
        plan = self.engine.plan
        check_model(body.model, plan)
        if body.messages is not None:
            ids = chat_prompt(body.messages, body.add_generation_prompt is not False, plan).ids
        elif body.prompt is not None:
            ids = encode(body.prompt)
        else:
            raise ApiError("give a prompt or messages", "prompt")
        tokens = ids.tolist()
        _json(
            reply,
            {"count": len(tokens), "max_model_len": plan.max_model_len, "tokens": tokens, "token_strs": None},
        )

    def detokenize(self, reply: Reply) -> None:
        """POST /detokenize."""
        body = read(reply.request.body, DetokenizeBody)
        check_model(body.model, self.engine.plan)
        _json(reply, {"prompt": decode(ids_of(body.tokens).tolist())})

    def reset_prefix_cache(self, reply: Reply) -> None:
        """POST /reset_prefix_cache: 200 also where blocks in use forbid it, as vLLM."""
        self.engine.driver.reset_prefix_cache()
        _empty(reply)

    def models(self, reply: Reply) -> None:
        """GET /v1/models."""
        plan = self.engine.plan
        card = {
            "id": plan.model,
            "object": "model",
            "created": self.created,
            "owned_by": "penstock-emulated",
            "root": plan.model,
            "parent": None,
            "max_model_len": plan.max_model_len,
            "permission": [],
        }
        _json(reply, {"object": "list", "data": [card]})

    def metrics(self, reply: Reply) -> None:
        """GET /metrics."""
        reply.send(200, metrics_page(self.engine), "text/plain; version=0.0.4; charset=utf-8")


def metrics_page(engine: EmulatedEngine) -> bytes:
    """The text of ``/metrics``."""
    plan, driver, counters = engine.plan, engine.driver, engine.driver.counters
    now = driver.advance()
    load = driver.engine.load(now)
    driver.arm()
    spec = plan.spec
    running = len(driver.running) + sum(1 for s in driver.engine.chunks if s.request not in driver.running)
    page = Page({"model_name": plan.model, "engine": "0"})
    page.add("vllm:num_requests_running", "gauge", running)
    page.add("vllm:num_requests_waiting", "gauge", len(driver.choices) - running)
    page.add("vllm:kv_cache_usage_perc", "gauge", (spec.capacity_blocks - load.free_blocks) / spec.capacity_blocks)
    for name, value in (
        ("num_preemptions", driver.engine.preemptions),
        ("prompt_tokens", counters.prompt_tokens),
        ("generation_tokens", counters.generation_tokens),
        ("prefix_cache_queries", counters.prefix_queries),
        ("prefix_cache_hits", counters.prefix_hits),
        ("external_prefix_cache_queries", counters.external_queries),
        ("external_prefix_cache_hits", counters.external_hits),
        ("nixl_num_failed_transfers", counters.failed_pulls),
        ("nixl_num_failed_notifications", 0),
        ("nixl_num_kv_expired_reqs", counters.expired),
        ("nixl_num_notifications_after_expiry", counters.late_notifications),
    ):
        page.add(f"vllm:{name}_total", "counter", value)
    for reason, count in counters.finished.items():
        page.add("vllm:request_success_total", "counter", count, f'finished_reason="{reason}"')
    page.histogram("vllm:time_to_first_token_seconds", counters.ttft_s)
    page.histogram("vllm:request_time_per_output_token_seconds", counters.tpot_s)
    page.histogram("vllm:e2e_request_latency_seconds", counters.e2e_s)
    page.add(
        "vllm:cache_config_info",
        "gauge",
        1,
        f'block_size="{spec.block_size}",cache_dtype="auto",enable_prefix_caching="{spec.prefix_caching}",'
        f'num_gpu_blocks="{spec.capacity_blocks}"',
    )
    page.add("penstock:emulated_poisoned_pulls_total", "counter", counters.poisoned)
    return page.text()


def _json(reply: Reply, value: Any, status: int = 200) -> None:
    reply.send(status, msgspec.json.encode(value))


def _empty(reply: Reply) -> None:
    reply.send(200, b"")
