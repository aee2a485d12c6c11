"""The front door: OpenAI-compatible routes, keys, the queue, and who answers what."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import re
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.types import Slo
from penstock.live.carried import CarriedSession, too_long
from penstock.live.http.messages import Call, Head, HttpFault
from penstock.live.http.server import Reply
from penstock.live.instance import Health, Instance
from penstock.live.intake import CHAT_PATH, COMPLETION_PATH, BadRequest, Intake, read_intake
from penstock.live.output import ClientOutput, error_body
from penstock.live.relayed import RelayedSession
from penstock.live.session import Session
from penstock.live.world import LiveWorld

PASSED_ON = re.compile(r"/tokenize|/detokenize|/version|/v1(/[\w-][\w.:-]*)+", re.ASCII)
"""Paths that one engine answers for all. Nothing else of an engine can be reached from outside, also not by escapes,
dots or slashes that an engine might read in another way.
"""
NOT_PASSED_ON = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Operators' paths of vLLM that lie between the users'."""
JSON = "application/json"


class GatewaySettings(msgspec.Struct, frozen=True):
    """``max_inflight`` requests are with engines at a time, ``max_queue`` more wait at the door; the next gets 429.

    ``slos`` names the SLO classes; ``default`` is for requests that name none.
    """

    api_keys: tuple[str, ...] = ()
    max_inflight: int = 16384
    max_queue: int = 2048
    slos: dict[str, Slo] = msgspec.field(default_factory=lambda: {"default": Slo()})
    served_name: str | None = None


class Gateway:
    """Turns HTTP requests into sessions. ``handle`` is the server's handler."""

    def __init__(self, world: LiveWorld, settings: GatewaySettings) -> None:
        self.world = world
        self.settings = settings
        self.queue: deque[Session] = deque()
        self.ready = True
        self._keys = [key.encode() for key in settings.api_keys]
        self._ended: deque[float] = deque(maxlen=64)
        self._extra: set[Relayed] = set()
        self._get: dict[str, Callable[[Reply], None]] = {
            "/health": self._health,
            "/ping": self._health,
            "/ready": self._ready,
            "/v1/models": self._models,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }
        world.on_ended = self._one_ended

    @property
    def model(self) -> str:
        """The model that the engines serve."""
        for instance in self.world.attached():
            return self.settings.served_name or instance.abilities.model
        return self.settings.served_name or ""

    def handle(self, reply: Reply) -> None:
        """Answer a request."""
        request = reply.request
        path = request.path
        if path not in ("/health", "/ping", "/ready", "/metrics") and not self._allowed(request.headers):
            error(reply, 401, "the API key is missing or wrong", "AuthenticationError", {"www-authenticate": "Bearer"})
            return
        if request.method == "POST" and path in (COMPLETION_PATH, CHAT_PATH):
            self._generate(reply)
            return
        route = self._get.get(path)
        if route is not None:
            if request.method in ("GET", "HEAD"):
                route(reply)
            else:
                error(reply, 405, f"{path} answers GET", "BadRequestError", {"allow": "GET, HEAD"})
        elif path in (COMPLETION_PATH, CHAT_PATH):
            error(reply, 405, f"{path} answers POST", "BadRequestError", {"allow": "POST"})
        elif PASSED_ON.fullmatch(path) and path not in NOT_PASSED_ON and request.method in ("GET", "POST"):
            self._pass_on(reply)
        else:
            error(reply, 404, f"there is no {path[:200]} here", "NotFoundError")

    # -- generation -------------------------------------------------------------------------------------------------

    def _generate(self, reply: Reply) -> None:
        request = reply.request
        world, metrics = self.world, self.world.metrics
        try:
            intake = read_intake(request.path, request.body, request.headers, world.parser_in_chat)
            self._check(intake)
        except BadRequest as bad:
            kind = "NotFoundError" if bad.status == 404 else "BadRequestError"
            reply.send(bad.status, error_body(bad.status, str(bad), kind, bad.param), JSON)
            return
        if len(world.sessions) + len(world.parked) >= self.settings.max_inflight:
            if len(self.queue) >= self.settings.max_queue:
                metrics.refused_at_door += 1
                wait = str(self._retry_after_s())
                error(reply, 429, "too many requests wait already", "RateLimitError", {"retry-after": wait})
                return
        elif not any(i.health in (Health.UP, Health.SUSPECT) for i in world.instances.values()):
            error(reply, 503, "no model server is available", "ServiceUnavailableError", {"retry-after": "5"})
            return
        name = _request_id(request.headers)
        headers = {"x-request-id": name, "penstock-movable": "yes"}
        if intake.pinned is not None:
            headers["penstock-movable"] = f"no; reason={intake.pinned}"
            metrics.pinned[intake.pinned] += 1
        out = ClientOutput(intake, reply, name, self.model, headers)
        slo = intake.slo or self.settings.slos.get(intake.slo_class) or self.settings.slos["default"]
        session: Session
        if intake.pinned is None:
            session = CarriedSession(world, intake, out, name, slo)
        else:
            session = RelayedSession(world, intake, out, name, slo)
        out.owner = session
        reply.on_disconnect = lambda: self._gone(out)
        if len(world.sessions) + len(world.parked) >= self.settings.max_inflight:
            self.queue.append(session)
        else:
            world.arrive(session)

    def _check(self, intake: Intake) -> None:
        world = self.world
        mine = self.model
        if intake.model and mine and intake.model != mine:
            raise BadRequest(f"the model {intake.model[:100]!r} is not served here", "model", 404)
        # Engines know the model by their own name for it.
        for instance in world.attached():
            intake.model = intake.body["model"] = instance.abilities.model
            break
        wanted, prompt = intake.max_tokens or 1, intake.prompt_ids
        if prompt is not None and len(prompt) + wanted > world.max_model_len:
            raise BadRequest(too_long(world.max_model_len, len(prompt), wanted), "prompt")

    def _gone(self, out: ClientOutput) -> None:
        """The client went away."""
        session: Session = out.owner
        if session.request < 0:
            session.over = True  # it never left the queue
            self.world.metrics.ended(session, "disconnected")
        else:
            session.abort()

    def _one_ended(self) -> None:
        self._ended.append(self.world.now())
        while self.queue and len(self.world.sessions) + len(self.world.parked) < self.settings.max_inflight:
            session = self.queue.popleft()
            if not session.over:
                self.world.arrive(session)

    def _retry_after_s(self) -> int:
        """When the queue will have moved, at the pace at which requests end."""
        if len(self._ended) < 2:
            return 1
        pace = len(self._ended) / max(self.world.now() - self._ended[0], 1e-3)
        return max(1, min(60, math.ceil(len(self.queue) / pace)))

    # -- the other routes -------------------------------------------------------------------------------------------

    def _allowed(self, headers: dict[str, str]) -> bool:
        if not self._keys:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode(errors="replace")
        # All keys are compared, so that time tells nothing.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _health(self, reply: Reply) -> None:
        reply.send(200, b"", "text/plain")

    def _ready(self, reply: Reply) -> None:
        up = [i for i in self.world.instances.values() if i.health is Health.UP]
        if self.ready and up:
            reply.send(200, b'{"ready":true}', JSON)
        else:
            reply.send(503, b'{"ready":false}', JSON, {"retry-after": "1"})

    def _models(self, reply: Reply) -> None:
        limit = self.world.max_model_len
        card = {"id": self.model, "object": "model", "created": 0, "owned_by": "penstock", "max_model_len": limit}
        reply.send(200, msgspec.json.encode({"object": "list", "data": [card]}), JSON)

    def _metrics(self, reply: Reply) -> None:
        text = self.world.metrics.text(self.world, self.model)
        reply.send(200, text, "text/plain; version=0.0.4; charset=utf-8")

    def _openapi(self, reply: Reply) -> None:
        from penstock.live.openapi import description

        reply.send(200, description(), JSON)

    def _pass_on(self, reply: Reply) -> None:
        request = reply.request
        if not (request.query.isascii() and request.query.isprintable()):
            error(reply, 400, "the query holds characters that must be escaped", "BadRequestError")
            return
        if _names_transfer_params(request.body):
            error(reply, 400, "kv_transfer_params are the gateway's own; do not send them", "BadRequestError")
            return
        instance = self._any_instance()
        if instance is None:
            error(reply, 503, "no model server is available", "ServiceUnavailableError", {"retry-after": "5"})
            return
        Relayed(self.world, reply, instance, self._extra)

    def _any_instance(self) -> Instance | None:
        up = [i for i in self.world.instances.values() if i.health is Health.UP and not i.held]
        return min(up, key=lambda i: (i.prefills, i.tokens), default=None)

    async def close(self, grace_s: float) -> None:
        """Take nothing new, and let what runs end."""
        self.ready = False
        deadline = self.world.now() + grace_s
        while self.world.sessions and self.world.now() < deadline:
            await asyncio.sleep(0.05)
        for session in self.queue:
            session.out.fail(503, "the gateway is shutting down", "ServiceUnavailableError", 1)
        self.queue.clear()


class Relayed:
    """A call that one engine answers for all: passed on as it is, errors without their text."""

    def __init__(self, world: LiveWorld, reply: Reply, instance: Instance, live: set[Relayed]) -> None:
        self.reply = reply
        self.status = 0
        self.type = JSON
        self.live = live
        live.add(self)
        request = reply.request
        path = request.path + (f"?{request.query}" if request.query else "")
        headers = {**world.engine_headers, "content-type": request.headers.get("content-type", JSON)}
        reply.on_disconnect = self._gone
        self.call: Call = world.client.open(instance.url, request.method, path, self, headers, request.body)

    def on_head(self, head: Head) -> None:
        """See ``Sink``."""
        self.status = head.status
        self.type = head.headers.get("content-type", JSON)
        if self.status < 400:
            self.reply.start(self.status, self.type)

    def on_body(self, data: bytes) -> None:
        """See ``Sink``."""
        if self.status < 400:
            self.reply.write(data)

    def on_end(self) -> None:
        """See ``Sink``."""
        self.live.discard(self)
        if self.status < 400:
            self.reply.end()
        elif self.status < 500:
            error(self.reply, self.status, "the model server refused the request", "BadRequestError")
        else:
            error(self.reply, 502, "the model server failed this request", "InternalServerError")

    def on_fault(self, fault: HttpFault) -> None:
        """See ``Sink``."""
        self.live.discard(self)
        if self.reply.started:
            self.reply.drop()
        else:
            error(self.reply, 502, "the model server failed this request", "InternalServerError")

    def _gone(self) -> None:
        self.live.discard(self)
        self.call.abort()


def error(reply: Reply, status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> None:
    """Answer with an error in OpenAI's shape."""
    reply.send(status, error_body(status, message, kind), JSON, headers)


def _names_transfer_params(body: bytes) -> bool:
    """Does a body that goes to an engine as it is hold ``kv_transfer_params``, however deep, escaped or encoded?"""
    if not body:
        return False

    def pairs(found: list[tuple[str, Any]]) -> None:
        if any(key == "kv_transfer_params" for key, _ in found):
            raise _Found

    try:
        json.loads(body, object_pairs_hook=pairs)  # reads what engines read: the same library, so the same encodings
    except _Found:
        return True
    except (ValueError, RecursionError):
        return b"kv_transfer_params" in body  # a form, say
    return False


class _Found(Exception):
    """There they are."""


def _request_id(headers: dict[str, str]) -> str:
    """The client's ``X-Request-Id`` if it is a harmless one, with something of our own that makes it unique."""
    given = headers.get("x-request-id", "")
    own = secrets.token_hex(8)
    if 0 < len(given) <= 64 and all(c.isalnum() or c in "-_.:" for c in given) and given.isascii():
        return f"{given}-{own[:6]}"
    return own
