"""The NixlConnector of one instance: KV pinned under a lease for others, KV pulled from others.

As in stock vLLM (docs/live.md): whoever pulls reads the blocks it was told of, whatever they hold by then. A claim
that was used, has expired or names the wrong blocks therefore yields wrong text and HTTP 200, and poisons the
puller's prefix cache; a list of blocks that is too short ends the puller's process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from penstock.live.emulated.choice import Choice
from penstock.live.emulated.driver import Driver
from penstock.live.emulated.fabric import Fabric
from penstock.live.emulated.requests import TransferParams
from penstock.live.emulated.settings import Plan
from penstock.sim.network import Flow


class Host(Protocol):
    """The process that an engine lives in."""

    alive: bool
    hung: bool
    host: str
    port: int

    def crash(self, reason: str) -> None:
        """Die."""

    def when_awake(self, what: Callable[[], None]) -> None:
        """Call ``what`` now, or when the instance hangs no more."""


class Pin:
    """KV kept for a pull: ``blocks`` hold the first ``computed`` of ``tokens``; ``free`` gives them back."""

    def __init__(self, free: Callable[[], None], blocks: list[int], tokens: list[int], computed: int) -> None:
        self.free = free
        self.blocks = blocks
        self.tokens = tokens
        self.computed = computed
        self.lease: asyncio.TimerHandle


class Pull:
    """A choice that waits for KV."""

    def __init__(self, params: TransferParams) -> None:
        self.params = params
        self.hits = 0
        self.flow: Flow | None = None
        self.handshake: asyncio.TimerHandle | None = None


class Transfers:
    """Pins and pulls of one instance. ``spent`` remembers names of pins that are gone, to count late pulls."""

    def __init__(self, engine_id: str, index: int, plan: Plan, fabric: Fabric, driver: Driver, host: Host) -> None:
        self.engine_id = engine_id
        self.index = index
        self.plan = plan
        self.fabric = fabric
        self.driver = driver
        self.host = host
        self.counters = driver.counters
        self.pins: dict[str, Pin] = {}
        self.pulls: dict[int, Pull] = {}
        self.on_pinned: Callable[[Choice, dict[str, Any]], None] | None = None
        self._next_block = 0
        fabric.members[engine_id] = self
        driver.transfers = self

    # -- KV for others ----------------------------------------------------------------------------------------------

    def pin(self, choice: Choice) -> None:
        """Keep a finished choice's KV under a lease, and answer with how to pull it."""
        tokens = choice.all_tokens()
        free = partial(self.driver.release, choice.request)
        params = self.keep(choice.name, tokens, len(tokens) - 1, free, max(choice.cached, 0))
        if self.on_pinned is not None:
            self.on_pinned(choice, params)
        choice.answer.ended(choice, params)

    def keep(
        self, name: str, tokens: list[int], computed: int, free: Callable[[], None], cached: int = 0
    ) -> dict[str, Any]:
        """Keep the KV of the first ``computed`` of ``tokens`` under a lease; return how to pull it."""
        size = self.plan.spec.block_size
        count = -(-computed // size)
        capacity = self.plan.spec.capacity_blocks
        blocks = [(self._next_block + i) % capacity for i in range(count)]
        self._next_block = (self._next_block + count) % capacity
        pin = Pin(free, blocks, tokens, computed)
        self.pins[name] = pin
        pin.lease = self._lease(name)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [blocks],
            "remote_engine_id": self.engine_id,
            "remote_request_id": name,
            "remote_host": self.host.host,
            "remote_port": self.host.port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": computed,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": cached,
        }

    def drop(self, name: str) -> bool:
        """Free what is kept under ``name``; False if nothing is."""
        pin = self.pins.pop(name, None)
        if pin is None:
            return False
        pin.lease.cancel()
        pin.free()
        return True

    def notify(self, name: str) -> None:
        """A puller has read (or refused) a request's KV: free it."""
        if not self.drop(name):
            self.counters.late_notifications += 1

    def _lease(self, name: str) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(self.plan.settings.lease_s, self.host.when_awake, lambda: self._expire(name))

    def _expire(self, name: str) -> None:
        pin = self.pins.get(name)
        if pin is None:
            return
        if any(member.awaits(self.engine_id, name) for member in self.fabric.members.values()):
            pin.lease = self._lease(name)
            return
        del self.pins[name]
        self.counters.expired += 1
        pin.free()

    # -- KV from others ---------------------------------------------------------------------------------------------

    def arrive(self, choice: Choice) -> None:
        """See :class:`Transferrer`: from now on heartbeats keep the source's lease."""
        if choice.options.stuck:
            choice.parked = True
            return
        assert choice.options.pull is not None
        self.pulls[choice.request] = Pull(choice.options.pull)

    def awaits(self, engine_id: str, name: str) -> bool:
        """Does it send heartbeats for pinned KV?"""
        wanted = (engine_id, name)
        return not self.host.hung and any(
            (p.params.remote_engine_id, p.params.remote_request_id) == wanted for p in self.pulls.values()
        )

    def pull(self, choice: Choice) -> None:
        """Find what the prefix cache has of the prompt, and pull the rest."""
        if choice.parked:
            return
        driver, engine, size = self.driver, self.driver.engine, self.plan.spec.block_size
        params = choice.options.pull
        assert params is not None and params.remote_block_ids is not None
        pull = self.pulls[choice.request]
        wanted = -(-len(choice.prompt) // size)
        if engine.cache is not None:
            driver.share(choice, min(engine.cache.match(choice.prompt.blocks), (len(choice.prompt) - 1) // size))
            pull.hits = len(choice.seq.shared)
        driver.found(choice, pull.hits * size, choice.seq.shared)
        if wanted - pull.hits > len(params.remote_block_ids[0]):
            # base_worker.py: assert num_decode_blocks <= len(prefill_group)
            asyncio.get_running_loop().call_soon(self.host.crash, "fewer remote than local blocks")
            return
        source = self._source_of(choice)
        if source is None:
            asyncio.get_running_loop().call_soon(self._failed, choice)
        elif source.host.hung and not self.fabric.acquainted(source.index, self.index):
            timeout_s = self.plan.settings.handshake_timeout_s
            pull.handshake = asyncio.get_running_loop().call_later(timeout_s, self._failed, choice)
        else:
            bytes_wanted = (wanted - pull.hits) * size * self.plan.kv_bytes_per_token
            self.counters.bytes_pulled += bytes_wanted
            pull.flow = self.fabric.pull(source.index, self.index, bytes_wanted, lambda: self._read(choice))

    def give_up(self, choice: Choice) -> None:
        """See :class:`Transferrer`: the source is told that nobody will come."""
        pull = self.pulls.pop(choice.request, None)
        if pull is None:
            return
        self._cancel(pull)
        source, params = self._source_of(choice), choice.options.pull
        if source is not None and params is not None and params.remote_request_id in source.pins:
            source.host.when_awake(lambda: source.notify(params.remote_request_id or ""))

    def leave(self) -> None:
        """The instance has died: whoever pulls from it finds nobody, its own pulls end."""
        self.fabric.leave(self.engine_id, self.index)
        for pin in self.pins.values():
            pin.lease.cancel()
        self.pins.clear()
        for pull in self.pulls.values():
            self._cancel(pull)
        self.pulls.clear()
        for other in list(self.fabric.members.values()):
            other.lost(self.index)

    def lost(self, source: int) -> None:
        """Instance ``source`` has died."""
        for request, pull in list(self.pulls.items()):
            if pull.flow is not None and pull.flow.source == source and request in self.driver.choices:
                self._cancel(pull)
                self._failed(self.driver.choices[request])

    def _cancel(self, pull: Pull) -> None:
        if pull.flow is not None:
            self.fabric.cancel(pull.flow)
        if pull.handshake is not None:
            pull.handshake.cancel()

    def _source_of(self, choice: Choice) -> Transfers | None:
        params = choice.options.pull
        return None if params is None else self.fabric.members.get(params.remote_engine_id or "")

    def _pin_of(self, choice: Choice) -> Pin | None:
        source, params = self._source_of(choice), choice.options.pull
        return None if source is None or params is None else source.pins.get(params.remote_request_id or "")

    def _read(self, choice: Choice) -> None:
        """All bytes have come: check what they were, tell the source, and go on."""
        right = self._is_right(choice)
        self.host.when_awake(lambda: self._arrived(choice, right))
        source, params = self._source_of(choice), choice.options.pull
        if source is not None and params is not None:
            source.host.when_awake(lambda: source.notify(params.remote_request_id or ""))

    def _arrived(self, choice: Choice, right: bool) -> None:
        if self.pulls.pop(choice.request, None) is None:
            return  # its client has gone meanwhile
        self.counters.pulls += 1
        self.counters.external_queries += len(choice.prompt)
        self.counters.external_hits += len(choice.prompt) - max(choice.cached, 0)
        if not right:
            self.counters.poisoned += 1
            choice.poison()
        self.driver.pulled(choice)

    def _is_right(self, choice: Choice) -> bool:
        """Were the blocks that were read those of this very prompt?"""
        pin, params, pull = self._pin_of(choice), choice.options.pull, self.pulls.get(choice.request)
        if pin is None or pull is None or params is None or params.remote_block_ids is None:
            return False
        size = self.plan.spec.block_size
        length = len(choice.prompt)
        wanted = -(-length // size)
        count = wanted - pull.hits
        read = params.remote_block_ids[0][-count:]  # vLLM aligns the list at its end
        # The last token is computed again, so a block that holds nothing else may hold anything.
        needed = -(-(length - 1) // size)
        if pin.computed < length - 1 or read[: needed - pull.hits] != pin.blocks[pull.hits : needed]:
            return False
        return bool(pin.tokens[: length - 1] == choice.prompt.ids[: length - 1].tolist())

    def _failed(self, choice: Choice) -> None:
        """The source does not answer: vLLM's ``kv_load_failure_policy`` decides."""
        if self.driver.choices.get(choice.request) is not choice:
            return
        self.pulls.pop(choice.request, None)
        self.counters.failed_pulls += 1
        if self.plan.settings.kv_load_failure_policy == "fail":
            choice.answer.fail("KV load failure: the request's KV cache could not be loaded from the remote engine")
            self.driver.abort(choice)
        else:
            choice.cached = -1
            self.driver.recompute(choice)
