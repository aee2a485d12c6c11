"""What happens to the requests when an instance dies, comes back, or slows down."""

from __future__ import annotations

from penstock.core.events import InstanceDown, InstanceSlow
from penstock.core.types import MigrationLevel, Role
from penstock.sim import moves
from penstock.sim.seq import DECODING, PULLING
from penstock.sim.world import World


def take_down(world: World, instance: int) -> None:
    """An instance dies with all its KV.

    Running and queued requests are lost and go elsewhere. KV that it only pinned for somebody else's pull is computed
    again by the puller (vLLM's ``kv_load_failure_policy: recompute``).
    """
    if not world.up[instance]:
        return
    engine = world.engines[instance]
    now = world.now
    world.up[instance] = False
    lost: list[int] = []
    generated: list[int] = []
    moved_on: set[int] = set()

    for flow in world.network.touching(instance):
        world.cancel_flow(world.flights[flow.request])
    for flight in list(world.flights.values()):
        move = flight.move
        if move is None or instance not in (move.source, move.target):
            continue
        if move.target == instance:
            nowhere = move.extracted and flight.source < 0
            moves.roll_back(world, flight, "target went down")
            if nowhere:
                lost.append(flight.request)
                generated.append(flight.generated)
        elif move.extracted:
            moved_on.add(flight.request)
            if flight.source == instance:  # the last copy can no longer be pulled
                world.recompute(flight, world.engines[move.target])
        else:
            moves.roll_back(world, flight, "source went down")

    done = engine.steps_done(now)
    for seq in engine.seqs.values():
        if seq.request < 0 or seq.request in moved_on or seq.request not in world.flights:
            continue
        flight = world.flights[seq.request]
        if flight.engine == instance:
            # A preempted one waits here with more tokens than at its last notice; one that restarts still has those.
            flight.generated = max(flight.generated, engine.tokens_of(seq, now) - flight.prompt)
            if seq.state == DECODING and done > 0:
                flight.last_token_s = engine.time_of(done)
            elif seq.state == DECODING and seq not in engine.joined:
                flight.last_token_s = engine.begin_s
            else:
                flight.last_token_s = seq.last_token_s
            if flight.source == instance:
                flight.source = -1
            world.emitted[seq.request] = flight.generated
            lost.append(seq.request)
            generated.append(flight.generated)
        elif flight.source == instance:
            flight.source = -1
            waiting = world.engines[flight.engine].seqs.get(seq.request)
            if waiting is not None and waiting.state == PULLING:
                world.recompute(flight, world.engines[flight.engine])
    engine.die(now)
    world.network.forget(instance)
    world.tell(InstanceDown(instance, tuple(lost), tuple(generated)))


def bring_up(world: World, instance: int, levels: tuple[MigrationLevel, ...]) -> None:
    """A dead instance is back: empty, at full speed, in the role it had."""
    if world.up[instance]:
        return
    world.up[instance] = True
    world.announce(instance, Role(int(world.controller.view.role[instance])), levels)


def slow_down(world: World, instance: int, factor: float) -> None:
    """An instance runs ``factor`` times slower from its next step on; nothing happens to a dead one."""
    if not world.up[instance]:
        return
    engine = world.engines[instance]
    engine.set_slow(factor, world.now)
    world.arm(engine)
    world.tell(InstanceSlow(instance, factor))
