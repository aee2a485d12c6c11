"""Many requests that move about on small instances: every token right, every block back."""

from __future__ import annotations

import asyncio
import random

import pytest

from .support import PD, Bench, bench, expected, run, spec

BLOCK = 4


class Walk:
    """One request that is decoded here, moved there, and now and then given up."""

    def __init__(self, b: Bench, seed: int, handovers: asyncio.Semaphore) -> None:
        self.b = b
        self.rnd = random.Random(seed)
        self.handovers = handovers
        # A few openings that many share, so that blocks are shared, found again and evicted.
        opening = bytes([97 + self.rnd.randrange(3)]) * self.rnd.randrange(20)
        self.tokens = [*opening, *self.rnd.randbytes(self.rnd.randrange(1, 12))]
        self.prompt = len(self.tokens)

    async def go(self) -> None:
        """Walk, then compare."""
        for _ in range(self.rnd.randrange(1, 6)):
            await self.rnd.choice((self.decode, self.segment, self.re_prompt, self.leave))()
        assert self.tokens[self.prompt :] == expected(self.tokens[: self.prompt], len(self.tokens) - self.prompt)

    def pick(self) -> int:
        return self.rnd.randrange(len(self.b.urls))

    async def decode(self) -> None:
        """Plainly, somewhere: a replay."""
        self.tokens += await self.b.ids(self.pick(), self.tokens, self.rnd.randrange(1, 30))

    async def leave(self) -> None:
        """Take a few tokens and close the connection."""
        count = self.rnd.randrange(1, 20)
        s = self.b.stream(self.pick(), self.tokens, 40)
        await s.reached(count)
        s.call.abort()
        self.tokens += s.ids[:count]

    async def segment(self) -> None:
        """End here, pinned, and go on there."""
        async with self.handovers:
            found = await self.b.complete(self.pick(), self.tokens, self.rnd.randrange(1, 20), kv_transfer_params=PD)
            self.tokens += found["choices"][0]["token_ids"]
            params = found["kv_transfer_params"]
            blocks = params["remote_block_ids"][0]
            params["remote_block_ids"] = [(blocks + blocks[-1:])[: -(-len(self.tokens) // BLOCK)]]
            count = self.rnd.randrange(1, 20)
            self.tokens += await self.b.ids(self.pick(), self.tokens, count, kv_transfer_params=params)

    async def re_prompt(self) -> None:
        """Make before break."""
        source = self.pick()
        async with self.handovers:
            old = self.b.stream(source, self.tokens, 40)
            count = self.rnd.randrange(1, 20)
            await old.reached(count)
            self.tokens += old.ids[:count]
            params = (await self.b.complete(source, self.tokens, 1, kv_transfer_params=PD))["kv_transfer_params"]
            new = self.b.stream(self.pick(), self.tokens, 20, kv_transfer_params=params)
            await new.reached(1)
            old.call.abort()
            self.tokens += (await new.over()).ids


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("overlapped", [False, True])
def test_requests_that_move_about(seed: int, overlapped: bool) -> None:
    async def main() -> None:
        small = spec(76, BLOCK, max_num_seqs=32, async_scheduling=overlapped)
        async with bench(3, instance=small, max_model_len=300) as b:
            handovers = asyncio.Semaphore(3)  # pinned blocks alone must not fill an instance: stock vLLM deadlocks too
            await asyncio.gather(*(Walk(b, 1000 * seed + i, handovers).go() for i in range(60)))
            assert b.fleet.poisoned == 0
            assert sum([await b.metric(i, "vllm:nixl_num_kv_expired_reqs_total") for i in range(3)]) == 0

    run(main())
