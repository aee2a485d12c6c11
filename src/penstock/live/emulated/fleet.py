"""Many emulated engines on one event loop, a port each, joined by links."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.live.emulated.fabric import Fabric
from penstock.live.emulated.instance import EmulatedEngine
from penstock.live.emulated.settings import EmulatedSettings, plan

ON_ITS_WAY_S = 0.05


class EmulatedFleet:
    """``engines`` by index; each is also the handle for its faults."""

    def __init__(self) -> None:
        self.engines: list[EmulatedEngine] = []
        self._fabric: Fabric | None = None

    async def start(
        self,
        settings: EmulatedSettings | Sequence[EmulatedSettings] | None = None,
        count: int = 1,
        host: str = "127.0.0.1",
        base_port: int = 0,
    ) -> list[str]:
        """Start all instances.

        Parameters
        ----------
        settings : EmulatedSettings or a sequence of them, optional
            Of every instance, or of each; then ``count`` is not read. Speed and link latency of the transfers are
            those of the first.
        count : int
            Instances.
        host, base_port
            They listen on ``base_port``, ``base_port + 1``, …; on free ports where it is 0.

        Returns
        -------
        list of str
            Their URLs.

        Raises
        ------
        PenstockError
            Settings that do not fit together, or a port that is taken; nothing is left running then.
        """
        each = [settings or EmulatedSettings()] * count if not isinstance(settings, Sequence) else list(settings)
        plans = {id(s): plan(s) for s in each}
        rates = [plans[id(s)].spec.link_bytes_per_s for s in each]
        first = plans[id(each[0])]
        fabric = Fabric(rates, first.link_latency_s, first.settings.handshake_s, first.settings.speed)
        self._fabric = fabric
        self.engines = [EmulatedEngine(i, plans[id(s)], fabric) for i, s in enumerate(each)]
        try:
            return [await e.start(host, base_port and base_port + e.index) for e in self.engines]
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop all instances."""
        await asyncio.gather(*(e.stop() for e in self.engines))
        if self._fabric is not None:
            self._fabric.close()

    async def idle(self, timeout_s: float = 10.0) -> None:
        """Wait until no instance has a request or pinned KV left; raises ``TimeoutError``.

        A request whose client has hung up may still lie unread in a socket: idle means idle twice, with a pause between
        for whatever is on its way.
        """
        async with asyncio.timeout(timeout_s):
            for pause_s in (ON_ITS_WAY_S, 0.0):
                for engine in self.engines:
                    await engine.idle()
                await asyncio.sleep(pause_s)

    @property
    def plugins(self) -> list[str | None]:
        """Where each instance's plugin is; None where it has none."""
        return [engine.plugin_address for engine in self.engines]

    @property
    def poisoned(self) -> int:
        """Pulls that read wrong blocks, which no client was told of."""
        return sum(e.driver.counters.poisoned for e in self.engines)

    def integrity(self) -> list[str]:
        """What is left behind when all should be idle."""
        return [problem for engine in self.engines for problem in engine.integrity()]
