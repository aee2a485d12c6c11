"""``penstock serve`` at run time: engines up, door open, and everything down again, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.experiment.setup import replace
from penstock.live.admin import Admin
from penstock.live.emulated import EmulatedFleet, EmulatedSettings
from penstock.live.gateway import GatewaySettings
from penstock.live.health import Watch
from penstock.live.local.command import EngineSettings
from penstock.live.local.connect import preconnect
from penstock.live.local.install import find_python, inspect
from penstock.live.local.launch import LocalFleet
from penstock.live.local.model import bundled_model
from penstock.live.logs import setup_logging
from penstock.live.plugin.penstock_engine.fingerprint import fingerprint
from penstock.live.serve import Deployment, EngineAddress
from penstock.live.settings import ServeSettings
from penstock.predict.learned.head import load_head

if TYPE_CHECKING:
    from penstock.cli.show import Show

GRACE_S = 10.0
"""Requests in flight may end for so long after the first Ctrl-C; the second one does not wait."""
log = logging.getLogger("penstock.live")


def run(settings: ServeSettings, show: Show) -> None:
    """Serve until interrupted.

    Raises
    ------
    PenstockError
        Engines do not start, addresses are taken, or settings do not fit together.
    """
    settings.setup()  # find mistakes before minutes are spent on starting engines
    secrets = [key for key in (*settings.api_keys, settings.engine_key, settings.admin_key) if key]
    setup_logging(settings.log_json, settings.log_level, secrets=secrets)
    # Each stream takes two sockets, its client's and its engine's.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if soft != hard:
        log.debug("open files: %d instead of %d", hard, soft)
    uvloop.run(_serve(settings, show))


async def _serve(settings: ServeSettings, show: Show) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        addresses = await _until(stop, _engines(settings, show, stack))
        if addresses is None:
            return
        await serve_over(settings, addresses, show, stop)


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, list[EngineAddress]]) -> list[EngineAddress] | None:
    """The result of ``work``, or None if the user has had enough first."""
    task = asyncio.create_task(work)
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return None


async def serve_over(settings: ServeSettings, addresses: list[EngineAddress], show: Show, stop: asyncio.Event) -> None:
    """Open gateway and admin API over engines that run, until ``stop``."""
    setup = settings.setup()
    slos = {"default": Slo(settings.ttft_s, settings.tpot_s), **settings.slos}
    gateway = GatewaySettings(settings.api_keys, settings.max_inflight, settings.max_queue, slos)
    record = None if settings.record is None else Path(settings.record)
    deployment = Deployment(setup, gateway, record, settings.engine_key, Watch(silence_s=settings.hang_s))
    url = await deployment.start(addresses, settings.host, settings.port)
    admin = Admin(deployment)
    try:
        admin_url = await admin.start("127.0.0.1", settings.admin_port, settings.admin_key)
        show.print(f"OpenAI-compatible API at {url}/v1, metrics at {url}/metrics, policy {settings.policy}")
        show.print(f"penstock ctl talks to {admin_url}; try: penstock ctl instances")
        sys.stdout.flush()
        await stop.wait()
        if deployment.world.sessions:
            log.info("%d requests in flight: waiting %g s for them", len(deployment.world.sessions), GRACE_S)
        stop.clear()
        ending = asyncio.create_task(deployment.gateway.close(GRACE_S))
        again = asyncio.create_task(stop.wait())
        await asyncio.wait({ending, again}, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        ending.cancel()
    finally:
        await admin.stop()
        await deployment.stop()


async def _engines(settings: ServeSettings, show: Show, stack: contextlib.AsyncExitStack) -> list[EngineAddress]:
    """Start engines, or take those that run; they stop with ``stack``."""
    roles = settings.roles()
    if settings.attach:
        return [EngineAddress(a.url, a.role, settings.max_num_seqs, a.plugin) for a in settings.attach]
    if settings.engine == "emulated":
        fleet = EmulatedFleet()
        cluster = replace(settings.setup().cluster, prefill=0, decode=0, mixed=1)
        urls = await fleet.start(EmulatedSettings(cluster=cluster), len(roles))
        plugins = fleet.plugins
        stack.push_async_callback(fleet.stop)
        show.note("engines are emulated: timing is the simulator's, text is made up")
    else:
        if settings.model is None:
            raise PenstockError("there is nothing to serve", "give --attach URL,role=ROLE, or --model PATH (or tiny)")
        arguments = ("--max-num-seqs", str(settings.max_num_seqs), *settings.engine_args)
        model = None if settings.model == "tiny" else settings.model
        head = _head(settings.predictor, str(bundled_model()) if model is None else model)
        installation = inspect(find_python(settings.engine_python))
        local = LocalFleet(installation, model, len(roles), EngineSettings(arguments=arguments, head=head))
        stack.push_async_callback(local.stop)
        urls = await start_local(local, show)
        plugins = [address.plugin for address in local.addresses]
    found = zip(urls, roles, plugins, strict=True)
    return [EngineAddress(url, role, settings.max_num_seqs, plugin) for url, role, plugin in found]


def _head(predictor: str | None, model: str) -> str | None:
    """The predictor's folder as engines take it. Raises PenstockError if there is none, or it is another model's."""
    if predictor is None or predictor == "none":
        return None if predictor is None else ""
    local = Path(model).expanduser()
    load_head(predictor, fingerprint(local) if local.is_dir() else None)
    return str(Path(predictor).absolute())


async def start_local(fleet: LocalFleet, show: Show) -> list[str]:
    """Start local engines with a progress display, and make every pair known to each other."""
    with show.phases(f"starting {len(fleet.engines)} vLLM servers") as say:
        urls = [address.url for address in await fleet.start(say)]
        say(-1, "connecting every pair")
        await preconnect(urls)
    return urls
