"""A request that may move: the gateway knows every token, so that any engine can go on from where another stopped."""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING

from penstock.core.events import DecodeStarted, PrefillDone
from penstock.core.types import Slo
from penstock.live.benefit import Benefit
from penstock.live.claims import ClaimRefused
from penstock.live.forecast import Forecast
from penstock.live.instance import Instance
from penstock.live.intake import COMPLETION_PATH, Intake
from penstock.live.link import Link
from penstock.live.output import ClientOutput
from penstock.live.playout import Playout, Shown
from penstock.live.plugin.penstock_engine.messages import EARLIER, Prediction
from penstock.live.segment import EngineError, Segment, ask
from penstock.live.session import Session
from penstock.live.wire import HANDOVER, Choice, prompt_ids_of

if TYPE_CHECKING:
    from penstock.live.moves import Move
    from penstock.live.world import LiveWorld

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class CarriedSession(Session):
    """Tokens in and out by id. ``prompt_ids`` is None until an engine has rendered the prompt."""

    def __init__(self, world: LiveWorld, intake: Intake, out: ClientOutput, name: str, slo: Slo) -> None:
        super().__init__(world, intake, out, name, slo)
        self.prompt_ids = intake.prompt_ids
        self.out_ids: list[int] = []
        self.segment: Segment | None = None
        self.move: Move | None = None
        self.playout: Playout | None = None
        self.mark: Shown | None = None  # wants to know when the next tokens are shown
        self.forecast = Forecast()
        self.benefit: Benefit | None = None
        self._prefill_call: tuple[Link, str] | None = None
        self.unshown: list[int] = []  # tokens of a character that is not whole yet: nobody has seen them
        if self.prompt_ids is not None:
            out.prompt_ids = self.prompt_ids
            self.prompt_tokens = len(self.prompt_ids)

    @property
    def generated(self) -> int:
        """See :class:`Session`."""
        return len(self.out_ids)

    def call_id(self) -> str:
        """Another one for every call, so that a plugin can find just this one."""
        return f"{self.name}-{secrets.token_hex(4)}"

    def limit(self) -> int:
        """Output tokens at most."""
        room = self.world.max_model_len - self.prompt_tokens
        wanted = self.intake.max_tokens
        return room if wanted is None else min(wanted, room)

    def sequence(self) -> list[int]:
        """Prompt and output so far."""
        assert self.prompt_ids is not None
        return self.prompt_ids + self.out_ids

    # -- starting work ----------------------------------------------------------------------------------------------

    async def _prefill(self, instance: Instance) -> None:
        if self.prompt_ids is None or (not self.out_ids and self.intake.prompt_ids is None):
            path, body = self.intake.path, self.intake.prefill_body()
        else:
            path, body = COMPLETION_PATH, self.intake.ids_body(self.sequence(), self.generated, 1, stream=False)
            body["kv_transfer_params"] = HANDOVER
        if self.intake.max_tokens == self.generated + 1:
            del body["kv_transfer_params"]  # there will be nothing to hand over
        call = self.call_id()
        self._watch_prefill(instance.link, call)
        try:
            answer = await ask(self.world.client, instance, path, body, self.headers(call), self.world.call_timeout_s)
        except EngineError as error:
            self.task = None
            self.engine_failed(instance, error)
            return
        self.task = None
        self._prefill_over()
        choice = answer.choices[0]
        rendered = prompt_ids_of(answer)
        # First of all, so that the KV is freed whatever becomes of the request.
        self.keep_claim(answer.kv_transfer_params, instance, len(self.prompt_ids or rendered or ()) + self.generated)
        if not self._learn_prompt(rendered):
            return
        ids = choice.token_ids or []
        text = choice.words()
        if choice.parsed() or (self.intake.chat and choice.message is not None and choice.message.content is None):
            self.world.demote(self, instance)
            return
        ended = choice.finish_reason == "stop" or len(ids) + self.generated >= self.limit()
        # A token that ends within a character is not shown: the decode engine samples it again, with nothing lost.
        shown = ended or (bool(ids) and bool(text) and not text.endswith(REPLACEMENT))
        if shown:
            finish = choice.finish_reason if ended else None
            if self._take(ids, text, finish, choice.stop_reason, self.world.now()):
                self.finish(instance)
                return
        load, left = instance.load(), self.predicted_remaining()
        self.world.tell(PrefillDone(self.request, instance.index, load, left, self.prompt_tokens))

    def _watch_prefill(self, link: Link | None, call: str | None = None) -> None:
        """Listen to predictions from a prefill engine, also after its answer, until the decode engine makes its own."""
        if self._prefill_call is not None:
            self._prefill_call[0].unwatch(self._prefill_call[1])
            self._prefill_call = None
        if link is not None and call is not None:
            self._prefill_call = (link, call)
            link.watch(call, partial(self._predicted, link, self.generated))

    def decode(self, instance: Instance) -> None:
        """See :class:`Session`."""
        self._work_at(instance, "waiting for KV")
        self.open_segment(instance, self._redeem(instance, self.sequence()))

    def _redeem(self, instance: Instance, sequence: list[int]) -> dict[str, object] | None:
        """What the claim is worth on ``instance``: None where the KV is there already, or must be computed again."""
        claim = self.claim
        if claim is None:
            return None
        if claim.custody.owner == instance.index:  # its prefix cache has the KV
            self.release_claim()
            return None
        try:
            return claim.redeem(len(sequence), self.world.now())
        except ClaimRefused as refusal:
            self.world.log.info("claim not used", extra={"request": self.name, "reason": str(refusal)})
            return None

    def serve(self, instance: Instance) -> None:
        """See :class:`Session`."""
        self._work_at(instance, "prefilling")
        self._prefill_began(instance)
        if self.prompt_ids is not None:
            self.open_segment(instance, None)
            return
        segment = Segment(self, instance, self.prompt_tokens, 0, self.world.now())
        self.segment = segment
        body = self.intake.opening_body(self.intake.max_tokens or 0)
        if self.intake.max_tokens is None:
            del body["max_tokens"]
        segment.open(self.world.client, self.intake.path, body, self.headers())

    def open_segment(self, instance: Instance, params: dict[str, object] | None) -> None:
        """Stream from token ids."""
        self.segment = self.new_segment(instance, params)

    def new_segment(self, instance: Instance, params: dict[str, object] | None) -> Segment:
        """Have ``instance`` go on from all that the client has (or has in hand)."""
        sequence = self.sequence()
        body = self.intake.ids_body(sequence, self.generated, self.limit() - self.generated)
        if params is not None:
            body["kv_transfer_params"] = params
        if self.generated and "predict" in instance.abilities.plugin:
            body["vllm_xargs"] = {EARLIER: self.generated}  # the predictor may count the output so far
        segment = Segment(self, instance, len(sequence), self.generated, self.world.now())
        segment.open(self.world.client, COMPLETION_PATH, body, self.headers())
        return segment

    def release_claim(self) -> None:
        """See :class:`Session`."""
        claim, self.claim = self.claim, None
        if self.prompt_ids is not None and claim is not None:
            self.world.release(claim, self.sequence()[: claim.custody.tokens])

    def drop_work(self) -> None:
        """See :class:`Session`."""
        super().drop_work()
        self.unshown = []
        self.mark = None
        self._watch_prefill(None)
        if self.playout is not None:
            if self.over:
                self.playout.cancel()
                self.playout = None
            else:  # what is in hand has been decoded: it is the client's
                self.end_playout()
        if self.move is not None:
            self.move.cancel()
            self.move = None
        if self.segment is not None:
            self.segment.close()
            self.segment = None

    # -- tokens -----------------------------------------------------------------------------------------------------

    def segment_tokens(self, segment: Segment, ids: list[int], choice: Choice) -> None:
        """An engine brought tokens."""
        now = self.world.now()
        first = segment.produced == 0
        segment.account(len(ids), now)
        if segment is not self.segment:
            if self.move is not None:
                self.move.challenger_tokens(segment, ids, choice)
            return
        stopped = choice.finish_reason == "length" and self._cut_short(segment)
        if stopped:
            choice.finish_reason = None
        self._current_tokens(segment, ids, choice, first, now)
        if stopped and self.segment is segment and not self.over:
            self._stopped(segment)

    def _current_tokens(self, segment: Segment, ids: list[int], choice: Choice, first: bool, now: float) -> None:
        if self.move is not None and self.move.keeps(ids, choice):
            return
        # One that goes on where it was after a move has been rolled back is no news.
        if first and self.stage != "decoding" and not self._opened(segment, choice):
            return
        if self._take(ids, choice.words(), choice.finish_reason, choice.stop_reason, now):
            self._ended(segment.instance)
        elif self.move is not None:
            self.move.source_token()

    def _cut_short(self, segment: Segment) -> bool:
        """Did a plugin stop the request, rather than the limit that it was given?"""
        asked = segment.asked or self.limit() - segment.began_at
        return segment.instance.link is not None and 0 < segment.produced < asked

    def _stopped(self, segment: Segment) -> None:
        """Its engine stopped the request for a hand-off. If nobody waits for that (any more), it goes on there."""
        segment.close()
        self.segment = None
        self.unshown = []  # the next engine decodes that character again from its start
        if self.move is not None and self.move.source_stopped():
            return
        self.world.log.info("stopped without need", extra={"request": self.name, "instance": segment.instance.index})
        if self.move is not None:
            self.move.fail("the source stopped")
        if not self.over:
            self.open_segment(segment.instance, None)

    def segment_predicted(self, segment: Segment, prediction: Prediction) -> None:
        """An engine's predictor has a word about the request."""
        link = segment.instance.link
        if segment is self.segment and link is not None:
            self._predicted(link, segment.began_at, prediction)

    def _predicted(self, link: Link, began_at: int, prediction: Prediction) -> None:
        self.world.metrics.forecasts.received += 1
        at = began_at + prediction.output_tokens
        self.forecast.take(at, prediction.remaining, link.median, link.levels)

    def predicted_remaining(self) -> float:
        """Output tokens that are predicted to come, as far as the limit allows; NO_PREDICTION where nothing is."""
        return self.forecast.remaining(self.generated, self.limit())

    def _opened(self, segment: Segment, choice: Choice) -> bool:
        """The first token of an engine: tell the controller where the request decodes now."""
        self.claim_used()
        self._watch_prefill(None)
        index = segment.instance.index
        if self.stage == "prefilling":
            self._prefill_over()
            if choice.parsed() or (choice.delta is not None and choice.delta.content is None):
                self.world.demote(self, segment.instance)
                return False
            if not self._learn_prompt(segment.prompt_ids):
                return False
            self.stage = "decoding"
            load, left = segment.instance.load(), self.predicted_remaining()
            self.world.tell(PrefillDone(self.request, index, load, left, self.prompt_tokens))
        else:
            self.stage = "decoding"
            self.world.tell(DecodeStarted(self.request, index, segment.instance.load()))
        return True

    def _learn_prompt(self, ids: list[int] | None) -> bool:
        """Note the prompt as the engine rendered it. False if the request had to end over it."""
        if self.prompt_ids is None:
            if ids is None:
                message = "the model server does not return token ids"
                self.fail(502, message, "InternalServerError")
                return False
            self.prompt_ids = ids
            self.prompt_tokens = len(ids)
            self.out.prompt_ids = ids
            self.world.learn_chars(self.intake.prompt_chars, len(ids))
            wanted = self.intake.max_tokens
            if wanted is not None and len(ids) + wanted > self.world.max_model_len:
                self.fail(400, too_long(self.world.max_model_len, len(ids), wanted), "BadRequestError")
                return False
        return True

    def _take(self, ids: list[int], text: str, finish: str | None, stop_reason: int | str | None, now_s: float) -> bool:
        """Hand tokens to the client. True: the answer has ended.

        Tokens without text wait for it, so that what the client has always ends with a whole character: wherever the
        request goes on, the next engine decodes that character again from its start, and its text is not lost.
        """
        if not text and finish is None:
            self.unshown += ids
            return False
        if self.unshown:
            ids, self.unshown = self.unshown + ids, []
        self.out_ids += ids
        if self.playout is not None:
            if finish is None:
                shown, self.mark = self.mark, None
                self.playout.push(ids, text, shown)
                return False
            self.end_playout()
            if self.over:  # a stop string was among the tokens in hand
                return False
        return self._show(ids, text, finish, stop_reason, now_s)

    def _show(self, ids: list[int], text: str, finish: str | None, stop_reason: int | str | None, now_s: float) -> bool:
        """The same, without delay."""
        if self.mark is not None:
            shown, self.mark = self.mark, None
            shown(now_s - self.last_s)
        if self.first_s < 0.0:
            self.first_byte(now_s)
        else:
            self.world.metrics.gap(now_s - self.last_s, len(ids))
        self.last_s = now_s
        return self.out.tokens(ids, text, finish, stop_reason)

    def start_playout(self, pace_s: float, want_s: float) -> None:
        """Begin to gather a few tokens, to have some in hand when the engine changes."""
        self.end_playout()
        last_s = self.last_s + self.world.start_s
        self.playout = Playout(pace_s, want_s, last_s, self._play, self._played_out)

    def end_playout(self) -> None:
        """Show what is in hand."""
        playout, self.playout = self.playout, None
        if playout is not None:
            playout.flush()

    def _play(self, ids: list[int], text: str) -> None:
        if not self.over and self._show(ids, text, None, None, self.world.now()):
            self._ended(self.segment.instance if self.segment is not None else self.world.instances[self.where])

    def _played_out(self) -> None:
        self.playout = None

    def show_held(self, held: list[tuple[list[int], Choice]]) -> None:
        """A move was rolled back: the client gets what the source decoded meanwhile."""
        now = self.world.now()
        for ids, choice in held:
            if self._take(ids, choice.words(), choice.finish_reason, choice.stop_reason, now):
                if self.segment is not None:
                    self._ended(self.segment.instance)
                return

    def take_over(self, segment: Segment) -> None:
        """From here on ``segment`` is the one that counts."""
        if self.segment is not None:
            self.segment.close()
        self.segment = segment
        self.where = segment.instance.index

    def _ended(self, instance: Instance) -> None:
        if self.move is not None:
            self.move.source_finished()
        self.finish(instance)

    def note_end(self, outcome: str) -> None:
        """See :class:`Session`."""
        metrics = self.world.metrics
        metrics.benefits.close(self)
        if outcome == "finished":
            metrics.forecasts.finished(self.forecast, self.generated, self.out.finish or "stop")

    def segment_failed(self, segment: Segment, error: EngineError) -> None:
        """An engine's stream broke."""
        if segment is self.segment:
            self.segment = None
            self.engine_failed(segment.instance, error)
        elif self.move is not None:
            self.move.challenger_failed(segment, error)


def too_long(limit: int, prompt: int, wanted: int) -> str:
    """What a client is told whose request cannot fit."""
    return (
        f"This model's maximum context length is {limit} tokens, but the prompt has {prompt} and {wanted} were asked "
        f"for. Shorten the prompt or lower max_tokens."
    )
