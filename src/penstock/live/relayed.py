"""A request that stays where it is decoded: the engine's own answer is passed on, byte for byte where it can be."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from penstock.core.events import DecodeStarted, PrefillDone
from penstock.core.types import Slo
from penstock.live.claims import ClaimRefused
from penstock.live.http.messages import Call, Head, HttpFault
from penstock.live.instance import Instance
from penstock.live.intake import Intake
from penstock.live.output import ClientOutput
from penstock.live.segment import EngineError, ask
from penstock.live.session import Session
from penstock.live.wire import Json, encode, prompt_ids_of

if TYPE_CHECKING:
    from penstock.live.world import LiveWorld

_COMPLAINT = re.compile(rb'^data: ?\{"error"', re.MULTILINE)
"""An event that reports an error: quotes inside a chunk's text are escaped, so no text looks like this."""


class RelayedSession(Session):
    """Passes an engine's answer on. Prefill and decode may still be on two engines unless it must be in place."""

    def __init__(self, world: LiveWorld, intake: Intake, out: ClientOutput, name: str, slo: Slo) -> None:
        super().__init__(world, intake, out, name, slo)
        self.chunks = 0
        self._relay: _Relay | None = None
        self._claimed_ids: list[int] = []  # whose KV ``claim`` is
        if intake.prompt_ids is not None:
            self.prompt_tokens = len(intake.prompt_ids)

    @property
    def generated(self) -> int:
        """Chunks passed on: an engine sends one a token, or a few where steps are fast."""
        return self.chunks

    @property
    def can_restart(self) -> bool:
        """Only before the client has seen anything: another engine would not say the same."""
        return self.chunks == 0 and not self.out.line_started()

    async def _prefill(self, instance: Instance) -> None:
        body = self.intake.prefill_body()
        try:
            call = ask(self.world.client, instance, self.intake.path, body, self.headers(), self.world.call_timeout_s)
            answer = await call
        except EngineError as error:
            self.task = None
            self.engine_failed(instance, error)
            return
        self.task = None
        self._prefill_over()
        ids = prompt_ids_of(answer) or []
        self.prompt_tokens = len(ids) or self.prompt_tokens
        if self.keep_claim(answer.kv_transfer_params, instance, len(ids)):
            self._claimed_ids = ids
        self.world.tell(PrefillDone(self.request, instance.index, instance.load(), prompt_tokens=self.prompt_tokens))

    def decode(self, instance: Instance) -> None:
        """See :class:`Session`."""
        self._work_at(instance, "waiting for KV")
        body = dict(self.intake.native_body())
        if self.claim is not None and self.claim.custody.owner == instance.index:
            self.release_claim()  # its prefix cache has the KV
        elif self.claim is not None:
            try:
                body["kv_transfer_params"] = self.claim.redeem(self.prompt_tokens, self.world.now())
            except ClaimRefused as refusal:
                self.world.log.info("claim not used", extra={"request": self.name, "reason": str(refusal)})
        self._open(instance, body)

    def serve(self, instance: Instance) -> None:
        """See :class:`Session`."""
        self._work_at(instance, "prefilling")
        self._prefill_began(instance)
        self._open(instance, self.intake.native_body())

    def _open(self, instance: Instance, body: Json) -> None:
        self._relay = _Relay(self, instance)
        self._relay.call = self.world.client.open(
            instance.url, "POST", self.intake.path, self._relay, self.headers(), encode(body)
        )

    def release_claim(self) -> None:
        """See :class:`Session`."""
        claim, self.claim = self.claim, None
        if self._claimed_ids:
            self.world.release(claim, self._claimed_ids)

    def drop_work(self) -> None:
        """See :class:`Session`."""
        super().drop_work()
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    # -- what the relay reports -------------------------------------------------------------------------------------

    def opened(self, instance: Instance) -> None:
        """The engine's answer has begun."""
        self.claim_used()
        if self.stage == "prefilling":
            self._prefill_over()
            self.stage = "decoding"
            self.world.tell(PrefillDone(self.request, instance.index, instance.load()))
        elif self.stage != "decoding":
            self.stage = "decoding"
            self.world.tell(DecodeStarted(self.request, instance.index, instance.load()))

    def passed(self, now_s: float) -> None:
        """A chunk has been passed on."""
        self.chunks += 1
        if self.first_s < 0.0:
            self.first_byte(now_s)
        else:
            self.world.metrics.gap(now_s - self.last_s, 1)
        self.last_s = now_s


class _Relay:
    """The sink of one engine's answer."""

    def __init__(self, session: RelayedSession, instance: Instance) -> None:
        self.session = session
        self.instance = instance
        self.call: Call | None = None
        self.status = 0
        self.stream = False
        self.body = bytearray()
        self.part = b""  # of an event that is not all there
        self.ended = False
        self.closed = False
        self.joined = False
        self.size = session.prompt_tokens

    def on_head(self, head: Head) -> None:
        """See ``Sink``."""
        self.status = head.status
        self.stream = head.headers.get("content-type", "").startswith("text/event-stream")

    def on_body(self, data: bytes) -> None:
        """See ``Sink``."""
        if self.closed:
            return
        if self.status != 200 or not self.stream:
            self.body += data
            return
        # Whole events only: an engine's complaint may begin anywhere in what was read, and nobody outside may see it.
        data = self.part + data
        cut = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        data, self.part = data[:cut], data[cut:]
        if not data:
            return
        complaint = _COMPLAINT.search(data)
        if complaint is not None:
            data = data[: complaint.start()]
        if data:
            self._pass(data)
        if complaint is not None and not self.closed:
            self.close()
            self.session.engine_failed(self.instance, EngineError("it reported an error in the stream", 500))

    def _pass(self, data: bytes) -> None:
        session = self.session
        now = session.world.now()
        if not self.joined:
            self.joined = True
            self.instance.joined(self.size, now)
            session.opened(self.instance)
            if session.over:
                return
            session.out.line.start(200, "text/event-stream; charset=utf-8", session.out.headers)
        self.instance.heard_s = now
        self.ended = data.endswith(b"data: [DONE]\n\n")
        session.passed(now)
        session.out.line.write(data)

    def on_end(self) -> None:
        """See ``Sink``."""
        if self.closed:
            return
        session, instance = self.session, self.instance
        if self.status != 200:
            reason = bytes(self.body[:2000]).decode(errors="replace")
            self.close()
            session.engine_failed(instance, EngineError(reason, self.status or 502))
            return
        if self.stream:
            if not self.ended:
                self.close()
                session.engine_failed(instance, EngineError("its stream ended early"))
                return
            self.close(finished=True)
            session.out.line.end()
        else:
            session.opened(instance)
            self.close(finished=True)
            now = session.world.now()
            session.chunks = completion_tokens(bytes(self.body))
            session.first_byte(now)
            session.out.line.send(200, without_claim(bytes(self.body)), "application/json", session.out.headers)
        session.finish(instance)

    def on_fault(self, fault: HttpFault) -> None:
        """See ``Sink``."""
        if not self.closed:
            self.close()
            self.session.engine_failed(self.instance, EngineError(fault.reason))

    def close(self, finished: bool = False) -> None:
        """Stop listening."""
        if self.closed:
            return
        self.closed = True
        if self.joined:
            self.instance.left(self.size, False)
        if self.call is not None and not finished:
            self.call.abort()


def without_claim(body: bytes) -> bytes:
    """An engine's answer without its transfer parameters, which name internal addresses."""
    if b'"kv_transfer_params"' not in body:
        return body
    try:
        answer = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body
    answer.pop("kv_transfer_params", None)
    return msgspec.json.encode(answer)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Counted(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


def completion_tokens(body: bytes) -> int:
    """Output tokens that an answer says it has; 0 where it does not say."""
    try:
        return msgspec.json.decode(body, type=_Counted).usage.completion_tokens
    except msgspec.MsgspecError:
        return 0
