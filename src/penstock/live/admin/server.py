"""The admin API over HTTP: routes, the key, and errors that say what to do."""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qs, unquote

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.admin import answers as a
from penstock.live.admin import state, views
from penstock.live.admin.answers import Problem, Refused
from penstock.live.admin.operator import Operator
from penstock.live.admin.watch import EventWatch
from penstock.live.http.messages import Limits
from penstock.live.http.server import HttpServer, Reply
from penstock.live.instance import Health

if TYPE_CHECKING:
    from penstock.live.serve import Deployment

LIMITS = Limits(body_bytes=64 * 1024, connections=256)
LISTED = 1000
"""Requests that a list holds unless asked for more: writing it must not hold up the streams."""
LONGEST_WAIT_S = 3600.0
T = TypeVar("T")


class Admin:
    """The operator's API of one running deployment.

    After :meth:`start`, ``url`` and ``key`` say how to reach it, and ``state_file`` where ``penstock ctl`` finds that
    (None if it could not be written).
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.url = ""
        self.key = ""
        self.state_file: Path | None = None
        self._server = HttpServer(self._handle, LIMITS)
        self._work: set[asyncio.Task[None]] = set()
        self._watch: EventWatch
        self._operator: Operator

    async def start(self, host: str = "127.0.0.1", port: int = 0, key: str | None = None) -> str:
        """Listen; return the URL. The deployment must have started. A key is made where none is given.

        Raises
        ------
        PenstockError
            The port is taken, or the key is empty or no plain text.
        """
        if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
            raise PenstockError("the admin key cannot be sent in a header", "use letters and digits, or give none")
        self.key = key if key is not None else secrets.token_urlsafe(24)
        bound = await self._server.start(host, port)
        world = self.deployment.world
        self._watch = EventWatch(world.record)
        world.record = self._watch
        self._operator = Operator(self.deployment, self._watch)
        near = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        self.url = f"http://[{near}]:{bound}" if ":" in near else f"http://{near}:{bound}"
        try:
            # A key that somebody chose is theirs to keep; one that was made is written where its owner finds it.
            self.state_file = state.announce(self.url, self.key if key is None else "", bound)
        except OSError as error:
            world.log.warning("penstock ctl needs --admin and --key", extra={"reason": error.strerror or str(error)})
        return self.url

    async def stop(self) -> None:
        """Stop listening and leave no trace; a deployment may go on without it."""
        if self.state_file is not None:
            state.withdraw(self.state_file)
            self.state_file = None
        for task in self._work:
            task.cancel()
        await self._server.stop(0.0)
        await self._operator.close()
        if self.deployment.world.record is self._watch:
            self.deployment.world.record = self._watch.log

    # -- requests ---------------------------------------------------------------------------------------------------

    def _handle(self, reply: Reply) -> None:
        if not self._allowed(reply.request.headers):
            problem = Problem("the admin key is missing or wrong", "send Authorization: Bearer KEY (ctl: --key)")
            reply.send(401, msgspec.json.encode(problem), headers={"www-authenticate": "Bearer"})
            return
        task = asyncio.create_task(self._respond(reply))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _allowed(self, headers: dict[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(errors="replace"), self.key.encode())
        return right and scheme.lower() == "bearer"

    async def _respond(self, reply: Reply) -> None:
        request = reply.request
        parts = tuple(unquote(part) for part in request.path.strip("/").split("/"))
        log = self.deployment.world.log
        try:
            if request.method in ("GET", "HEAD"):
                answer = self._read(parts, _query(request.query))
            else:
                answer = await self._order(request.method, parts, _query(request.query), request.body)
                extra = {"method": request.method, "path": request.path, "order": request.body.decode(errors="replace")}
                log.info("operator", extra=extra)
            reply.send(200, msgspec.json.encode(answer))
        except Refused as refused:
            reply.send(refused.status, msgspec.json.encode(Problem(refused.problem, refused.remedy)))
        except Exception:
            log.exception("admin request failed")
            reply.send(500, msgspec.json.encode(Problem("a bug in the admin API", "see the gateway's log")))

    def _read(self, parts: tuple[str, ...], query: dict[str, str]) -> object:
        operator, world = self._operator, self.deployment.world
        match parts:
            case ("status",):
                return views.status(self.deployment)
            case ("instances",):
                here = [i for i in world.instances.values() if i.health is not Health.GONE]
                return a.InstanceList(views.instance_rows(world, here, operator.draining))
            case ("instances", number):
                return views.instance_rows(world, [operator.instance(number, gone=True)], operator.draining)[0]
            case ("instances", number, "drain"):
                return operator.progress(operator.instance(number, gone=True))
            case ("requests",):
                return self._requests(query)
            case ("requests", name):
                return views.request_row(operator.request(name), world.now())
            case ("custody",):
                return a.CustodyList(views.custody_rows(world))
        raise _nowhere("GET", parts)

    def _requests(self, query: dict[str, str]) -> a.RequestList:
        limit = _number(query, "limit", LISTED)
        chosen = list(views.sessions(self.deployment))
        if "instance" in query:
            index = self._operator.instance(query["instance"]).index
            chosen = [s for s in chosen if s.where == index]
        chosen.sort(key=lambda s: s.arrived_s)
        now = self.deployment.world.now()
        return a.RequestList(len(chosen), [views.request_row(s, now) for s in chosen[:limit]])

    async def _order(self, method: str, parts: tuple[str, ...], query: dict[str, str], body: bytes) -> object:
        operator = self._operator
        match method, *parts:
            case ["POST", "requests", name, "migrate"]:
                order = _body(body, a.MigrateOrder)
                return await operator.migrate(operator.request(name), _bounded(order))
            case ["POST", "instances"]:
                return await operator.attach(_body(body, a.AttachOrder))
            case ["POST", "instances", number, "drain"]:
                instance = operator.instance(number)
                return await operator.drain(instance, _bounded(_body(body, a.Wait)))
            case ["POST", "instances", number, "undrain"]:
                return operator.undrain(operator.instance(number))
            case ["POST", "instances", number, "flip"]:
                return operator.flip(operator.instance(number), _body(body, a.FlipOrder))
            case ["DELETE", "instances", number]:
                return await operator.detach(operator.instance(number), _bounded(_wait_of(query)))
            case ["POST", "policy"]:
                return operator.policy(_body(body, a.PolicyOrder))
        raise _nowhere(method, parts)


def _nowhere(method: str, parts: tuple[str, ...]) -> Refused:
    path = "/".join(parts)[:100]
    return Refused(404, f"there is no {method} /{path}", "see docs/live.md, or use penstock ctl")


def _body(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise Refused(400, f"the order cannot be read: {error}", "see docs/live.md, or use penstock ctl") from None
    except msgspec.DecodeError:
        raise Refused(400, "the body is no JSON", "send a JSON object") from None


W = TypeVar("W", bound=a.Wait)


def _bounded(order: W) -> W:
    if not (math.isfinite(order.timeout_s) and 0.0 <= order.timeout_s <= LONGEST_WAIT_S):
        raise Refused(400, f"timeout_s {order.timeout_s:g} is out of range", f"use 0 to {LONGEST_WAIT_S:g}")
    return order


def _query(text: str) -> dict[str, str]:
    return {key: values[-1] for key, values in parse_qs(text, keep_blank_values=True).items()}


def _wait_of(query: dict[str, str]) -> a.Wait:
    """``?force=true&wait=true&timeout_s=60``: DELETE has no body."""
    try:
        return msgspec.convert(query, a.Wait, strict=False)
    except msgspec.ValidationError as error:
        raise Refused(400, f"the query cannot be read: {error}", "give force, wait and timeout_s only") from None


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise Refused(400, f"{name}={text[:50]} is no number", "give a whole number")
    return int(text)
