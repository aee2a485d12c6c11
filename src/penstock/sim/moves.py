"""Migrations, from the order to the hand-over or the way back.

Four levels (``core.types.MigrationLevel``). HANDOFF: the source stops at its next step boundary and the target pulls
everything. PRECOPY: the target pulls the full blocks while the source goes on, then the source stops and the rest is
pulled. REPROMPT: the source, still decoding, computes the tail of a re-sent prompt; the target pulls that, computes
what was decoded meanwhile, and takes over with its first token. REPLAY: the source forgets, the target computes all.
Whatever goes wrong before the hand-over is rolled back: the source keeps the request, or takes it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.actions import Migrate
from penstock.core.events import MigrationDone, MigrationFailed
from penstock.core.types import MigrationLevel
from penstock.sim.engine import Engine
from penstock.sim.seq import DECODING, PINNED, PREEMPTED, PULL, REPROMPT, REPROMPTED, SERVE, STAGE, Notice, Seq

if TYPE_CHECKING:
    from penstock.sim.world import Flight, World


class Move:
    """A migration in progress. ``copied`` tokens have reached the target; ``extracted``: the source has stopped."""

    def __init__(self, source: int, target: int, level: MigrationLevel, reason: str, start_s: float) -> None:
        self.source = source
        self.target = target
        self.level = level
        self.reason = reason
        self.start_s = start_s
        self.copied = 0
        self.extracted = False


def start(world: World, action: Migrate) -> None:
    i = action.request
    flight = world.flights[i]
    source = world.engines[action.source]
    target = world.engines[action.target]
    seq = source.seqs.get(i)
    if seq is None or seq.state != DECODING or i in target.seqs or not world.up[action.target]:
        _note_failed(world, "not movable any more")
        world.tell(MigrationFailed(i, action.source, action.target, "not movable any more"))
        return
    now = world.now
    move = Move(action.source, action.target, action.level, action.reason, now)
    flight.move = move
    tokens = source.tokens_of(seq, now)
    if action.level == MigrationLevel.PRECOPY:
        full = (tokens - 1) // target.block_size * target.block_size
        if full > 0:
            _stage(world, flight, target, full)
            return
        source.extract(i, now)
    elif action.level == MigrationLevel.REPROMPT:
        source.submit(Seq(-1 - i, REPROMPT, tokens, tokens + 1), now)
    else:
        source.extract(i, now)
    world.arm(source)


def _stage(world: World, flight: Flight, target: Engine, tokens: int) -> None:
    seq = Seq(flight.request, STAGE, tokens, flight.final_tokens)
    seq.job = flight.job
    seq.pace = flight.pace
    target.submit(seq, world.now)
    world.arm(target)


def on_reprompt(world: World, engine: Engine, notice: Notice) -> None:
    """The source has re-computed the tail of a re-sent prompt (or was preempted doing so)."""
    i = -1 - notice.seq.request
    flight = world.flights.get(i)
    if notice.kind == PREEMPTED:
        engine.release(notice.seq.request, world.now)
        if flight is not None and flight.move is not None:
            roll_back(world, flight, "preempted")
    elif notice.kind == REPROMPTED and flight is not None and flight.move is not None:
        target = world.engines[flight.move.target]
        if world.up[target.index]:
            _stage(world, flight, target, notice.seq.tokens)


def on_staged(world: World, flight: Flight, target: Engine) -> None:
    """The first copy is on the target; the source has gone on decoding meanwhile."""
    move = flight.move
    assert move is not None
    i = flight.request
    source = world.engines[move.source]
    staged = target.seqs[i]
    target.pulled(i, world.now)
    move.copied = staged.tokens
    seq = source.seqs[i]
    if move.level == MigrationLevel.REPROMPT:
        staged.last_token_s = -1.0  # the client goes on getting the source's tokens
        target.serve_from(i, source.tokens_of(seq, world.now), world.now)
        world.arm(target)
        return
    source.extract(i, world.now)
    world.arm(source)


def on_extracted(world: World, engine: Engine, seq: Seq) -> None:
    """The source has stopped: let the target pull what it lacks."""
    flight = world.flights[seq.request]
    move = flight.move
    assert move is not None and move.source == engine.index
    target = world.engines[move.target]
    move.extracted = True
    flight.source = engine.index
    flight.pinned_s = world.now
    flight.last_token_s = seq.last_token_s
    flight.generated = seq.tokens - flight.prompt
    world.emitted[seq.request] = flight.generated
    now = world.now
    if move.level == MigrationLevel.REPLAY:
        engine.release(seq.request, now)
        flight.source = -1
        fresh = Seq(seq.request, SERVE, seq.tokens, flight.final_tokens)
        fresh.job = flight.job
        fresh.pace = flight.pace
        fresh.resumed = True
        fresh.last_token_s = seq.last_token_s
        target.submit(fresh, now)
    elif move.copied > 0:
        target.seqs[seq.request].last_token_s = seq.last_token_s
        target.extend(seq.request, seq.tokens, now)
    else:
        fresh = Seq(seq.request, PULL, seq.tokens, flight.final_tokens)
        fresh.job = flight.job
        fresh.pace = flight.pace
        fresh.last_token_s = seq.last_token_s
        target.submit(fresh, now)
    world.arm(target)


def cut_over(world: World, flight: Flight, move: Move, engine: Engine, seq: Seq) -> None:
    """The target's first token is out: it takes over; whatever the source does now is surplus."""
    now = world.now
    i = seq.request
    pause = now - flight.last_token_s
    if move.level == MigrationLevel.REPROMPT:
        source = world.engines[move.source]
        old = source.seqs[i]
        ahead = source.tokens_of(old, now) - seq.tokens
        # Tokens the source is ahead must be decoded again before the client sees a new one.
        pause = max(ahead, 0) * source.last_step_s + source.last_step_s
        source.note_pace(old, now)
        if flight.pace is not None:
            flight.pace.emit(seq.tokens - 1 - flight.prompt, 1, now, 0.0, 0.0)
        source.release(i, now)
        world.arm(source)
    complete(world, flight, move, engine, seq, pause)


def complete(world: World, flight: Flight, move: Move, engine: Engine, seq: Seq, pause_s: float) -> None:
    now = world.now
    i = seq.request
    flight.move = None
    flight.engine = engine.index
    flight.source = -1
    world.migrated[i] += 1
    world.decode_instance[i] = engine.index
    world.moves.append(
        (move.start_s, now, i, move.source, move.target, seq.tokens, int(move.level), pause_s, move.reason)
    )
    source = world.engines[move.source]
    world.tell(MigrationDone(i, move.source, move.target, source.load(now), engine.load(now)))


def roll_back(world: World, flight: Flight, reason: str) -> None:
    """Roll a migration back: the source keeps the request (or takes it back), the target forgets it."""
    move = flight.move
    assert move is not None
    flight.move = None
    i = flight.request
    now = world.now
    _note_failed(world, reason)
    world.cancel_flow(flight)
    target = world.engines[move.target]
    if world.up[move.target] and i in target.seqs:
        target.release(i, now)
        world.arm(target)
    source = world.engines[move.source]
    source.stay(i)
    if -1 - i in source.seqs:
        source.release(-1 - i, now)
        world.arm(source)
    if move.extracted and world.up[move.source] and i in source.seqs and source.seqs[i].state == PINNED:
        flight.silent = True
        flight.source = -1
        source.adopt(i, flight.final_tokens, now)
        world.arm(source)
    world.tell(MigrationFailed(i, move.source, move.target, reason))


def _note_failed(world: World, reason: str) -> None:
    world.failed_moves[reason] = world.failed_moves.get(reason, 0) + 1
