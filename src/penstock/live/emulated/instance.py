"""One emulated engine: a port, an engine model that runs in real time, and the faults that a test may cause."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

from penstock.live.emulated.api import Api
from penstock.live.emulated.clock import Clock
from penstock.live.emulated.driver import Driver
from penstock.live.emulated.fabric import Fabric
from penstock.live.emulated.metrics import Counters
from penstock.live.emulated.plugin import EmulatedPlugin
from penstock.live.emulated.settings import Plan
from penstock.live.emulated.transfers import Transfers
from penstock.live.http.server import HttpServer, Reply


class EmulatedEngine:
    """An instance of a fleet.

    ``alive`` until it is killed (or crashes, as stock vLLM does over a list of blocks that is too short), ``hung``
    between ``hang`` and ``resume``. ``failures`` requests to come are answered with status 500.
    """

    def __init__(self, index: int, plan: Plan, fabric: Fabric) -> None:
        self.index = index
        self.plan = plan
        self.fabric = fabric
        self.host = "127.0.0.1"
        self.port = 0
        self.alive = False
        self.hung = False
        self.failures = 0
        self.down_reason = ""
        self.driver: Driver
        self.transfers: Transfers
        self._api = Api(self)
        self._server = HttpServer(self._handle)
        self._asleep: list[Callable[[], None]] = []
        self._closing: asyncio.Task[None] | None = None
        self._plugin: EmulatedPlugin | None = None
        self._plugin_port = 0
        self._requests = 0

    @property
    def url(self) -> str:
        """Its origin."""
        return f"http://{self.host}:{self.port}"

    @property
    def plugin_address(self) -> str | None:
        """Where its plugin is, if it has one."""
        return f"tcp://{self.host}:{self._plugin_port}" if self.plan.settings.plugin else None

    async def start(self, host: str, port: int) -> str:
        """Begin to serve; return the URL.

        Raises
        ------
        PenstockError
            The port is taken.
        """
        self.host = host
        self.driver = Driver(self.index, self.plan, Clock(self.plan.settings.speed), Counters())
        self.port = await self._server.start(host, port)
        self.transfers = Transfers(str(uuid.uuid4()), self.index, self.plan, self.fabric, self.driver, self)
        self.alive, self.hung, self.failures, self.down_reason = True, False, 0, ""
        if self.plan.settings.plugin:
            self._plugin = EmulatedPlugin(self.plan, self.driver, self.transfers, self.fabric, self)
            self._plugin_port = await self._plugin.start(host, self._plugin_port)
        return self.url

    def next_request(self) -> int:
        """A number for the engine model."""
        self._requests += 1
        return self._requests

    def when_awake(self, what: Callable[[], None]) -> None:
        """Call ``what`` now, or when the instance hangs no more; never if it is dead."""
        if self.hung:
            self._asleep.append(what)
        elif self.alive:
            what()

    # -- faults -----------------------------------------------------------------------------------------------------

    def crash(self, reason: str) -> None:
        """Die, as with SIGKILL: connections break, the port closes, all KV is gone."""
        if not self.alive:
            return
        self.alive, self.hung, self.down_reason = False, False, reason
        self._asleep.clear()
        self.driver.stop()
        for choice in self.driver.choices.values():
            choice.answer.reply.drop()
        self.driver.call_idle()
        self.transfers.leave()
        if self._plugin is not None:
            self._plugin.close()
        self._closing = asyncio.get_running_loop().create_task(self._server.stop())

    async def kill(self) -> None:
        """Die; return when the port is closed."""
        self.crash("killed")
        if self._closing is not None:
            await self._closing

    async def revive(self) -> None:
        """Start again where it was, with nothing but its address left. Does nothing while it lives."""
        if not self.alive:
            if self._closing is not None:
                await self._closing
            await self.start(self.host, self.port)

    def hang(self) -> None:
        """Stand still, as with SIGSTOP: connections are accepted and nothing is ever sent."""
        if self.alive and not self.hung:
            self.driver.advance()
            self.driver.stop()
            self.driver.clock.freeze()
            self.hung = True

    def resume(self) -> None:
        """Go on, as with SIGCONT."""
        if self.hung:
            self.hung = False
            self.driver.clock.thaw()
            waiting, self._asleep = self._asleep, []
            for what in waiting:
                self.when_awake(what)
            if self.alive:
                self.driver.arm()

    def slow(self, factor: float) -> None:
        """Run ``factor`` times slower from the next step on."""
        self.driver.set_slow(factor)

    def delay_plugin(self, seconds: float) -> None:
        """Have its plugin do commands only after so many real seconds, from now on; until it is started again."""
        if self._plugin is not None:
            self._plugin.delay_s = seconds

    def fail_next(self, count: int) -> None:
        """Answer this many generation requests to come with status 500."""
        self.failures = count

    def fail_running(self, message: str = "EngineCore encountered an issue.") -> None:
        """End every request in progress with an error: status 500, or an error event in its stream."""
        if self.alive:
            self.driver.fail_all(message)

    # -- checks -----------------------------------------------------------------------------------------------------

    async def idle(self) -> None:
        """Wait until no request and no pinned KV is left; at once for an instance that is dead."""
        if self.alive:
            done = asyncio.get_running_loop().create_future()
            self.driver.on_idle.append(lambda: None if done.done() else done.set_result(None))
            self.driver.advance()
            self.driver.arm()
            await done

    def integrity(self) -> list[str]:
        """What is left behind on an instance that should be idle; nothing for a dead one."""
        if not self.alive:
            return []
        driver, engine = self.driver, self.driver.engine
        driver.advance()
        driver.arm()
        found = []
        if driver.choices:
            found.append(f"{len(driver.choices)} requests in progress")
        if self.transfers.pins:
            found.append(f"{len(self.transfers.pins)} requests pinned")
        if self.transfers.pulls:
            found.append(f"{len(self.transfers.pulls)} pulls waiting")
        if engine.free != engine.capacity_blocks:
            found.append(f"{engine.capacity_blocks - engine.free} blocks in use")
        if engine.cache is not None and len(engine.cache.idle) != len(engine.cache.references):
            found.append(f"{len(engine.cache.references) - len(engine.cache.idle)} cached blocks still referenced")
        return [f"instance {self.index}: {problem}" for problem in found]

    async def stop(self) -> None:
        """Stop serving; streams in progress are cut off."""
        await self.kill()

    def _handle(self, reply: Reply) -> None:
        if self.alive:
            self.when_awake(lambda: self._api.handle(reply))
        else:
            reply.drop()
