"""What an engine says about itself: version, KV capacity, counters (``/version``, ``/metrics``)."""

from __future__ import annotations

import re
from time import perf_counter

import msgspec

from penstock.live.http.client import HttpClient
from penstock.live.http.messages import HttpFault, Response
from penstock.live.load.endpoint import Endpoint

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
PINGS = 21


class Facts(msgspec.Struct, frozen=True):
    """What is known about an engine without timing it. ``round_trip_s`` is the median of a request that does nothing.

    ``blocks`` and ``block_size`` come from ``vllm:cache_config_info``; None where there is no such metric.
    """

    version: str = ""
    blocks: int | None = None
    block_size: int | None = None
    round_trip_s: float = 0.0

    @property
    def capacity_tokens(self) -> int | None:
        """KV tokens that fit."""
        return None if self.blocks is None or self.block_size is None else self.blocks * self.block_size


class _Version(msgspec.Struct):
    version: str = ""


async def facts(client: HttpClient, at: Endpoint) -> Facts:
    """Ask; what the engine does not say stays unknown."""
    version = ""
    answer = await _get(client, at, "/version")
    if answer is not None:
        try:
            version = msgspec.json.decode(answer.body, type=_Version).version
        except msgspec.MsgspecError:
            version = ""
    config = (await samples(client, at)).get("vllm:cache_config_info", [({}, 0.0)])[0][0]
    return Facts(
        version, _integer(config.get("num_gpu_blocks")), _integer(config.get("block_size")), await _ping(client, at)
    )


async def counter(client: HttpClient, at: Endpoint, name: str) -> float | None:
    """The sum of a metric over its labels; None where the engine does not have it."""
    found = (await samples(client, at)).get(name)
    return None if found is None else sum(value for _, value in found)


async def samples(client: HttpClient, at: Endpoint) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample of ``/metrics`` by name; empty where there are none."""
    answer = await _get(client, at, "/metrics")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in answer.body.decode("utf-8", "replace").splitlines() if answer is not None else []:
        match = _LINE.match(line)
        if match is not None:
            try:
                value = float(match["value"])
            except ValueError:
                continue
            found.setdefault(match["name"], []).append((dict(_LABEL.findall(match["labels"] or "")), value))
    return found


async def _ping(client: HttpClient, at: Endpoint) -> float:
    times = []
    for _ in range(PINGS):
        start = perf_counter()
        if await _get(client, at, "/health") is None:
            return 0.0
        times.append(perf_counter() - start)
    return sorted(times)[PINGS // 2]


async def _get(client: HttpClient, at: Endpoint, path: str) -> Response | None:
    try:
        answer = await client.fetch(at.origin, "GET", at.prefix + path, b"", at.headers, 10.0)
    except HttpFault:
        return None
    return answer if answer.status == 200 else None


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and int(text) > 0 else None
