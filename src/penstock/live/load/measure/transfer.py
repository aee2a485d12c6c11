"""KV transfer between two engines: prefill here, first token there (vLLM's ``kv_transfer_params``).

The target computes the last prompt token again, so its time to the first token is what its front end takes, the
transfer, and a step of one token. Transfer parameters are used once, at once: used twice they give another request's
KV.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.live.load.dialect import common
from penstock.live.load.endpoint import ask, refused
from penstock.live.load.measure.probes import Probe
from penstock.live.load.measure.watched import Lost
from penstock.perf.step import StepModel

LENGTHS = 6
REPEATS = 7


class Transfer(msgspec.Struct, frozen=True):
    """A link between two engines: ``latency_s + tokens / tokens_per_s``, and more at first contact.

    ``error_p50_s`` and ``error_p90_s`` are how far, in seconds, that line is from the measured transfers.
    """

    latency_s: float
    tokens_per_s: float
    handshake_s: float
    error_p50_s: float
    error_p90_s: float


class _Answer(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None


async def measure_transfer(
    source: Probe, target: Probe, model: StepModel, front_end_s: float, longest: int, seconds: float
) -> Transfer | None:
    """Move prompts of several lengths up to ``longest`` tokens, for about so many seconds (each length at least twice).

    ``front_end_s`` and ``model`` are those of the target. None if times do not grow with length: too fast to be seen.

    Raises
    ------
    PenstockError
        An engine is not set up for transfers.
    """
    shortest = max(source.facts.block_size or 16, 16)
    lengths = sorted({int(x) for x in np.geomspace(shortest, max(longest, shortest), LENGTHS)})

    async def once(length: int) -> float:
        return await _first_token_s(source, target, length) - front_end_s - model.step_s(1, length, [], [])

    first = await once(lengths[-1])
    found: dict[int, list[float]] = {length: [] for length in lengths}
    start = perf_counter()
    for repeat in range(REPEATS):
        for length in lengths:
            if repeat < 2 or perf_counter() - start < seconds:
                found[length].append(await once(length))
    times = np.array([median(found[length]) for length in lengths])
    return _fit(np.array(lengths, np.float64), times, first - float(times[-1]))


def _fit(lengths: np.ndarray[Any, np.dtype[np.float64]], times: Any, handshake_s: float) -> Transfer | None:
    from scipy.optimize import nnls  # type: ignore[import-untyped, unused-ignore]

    scale = max(float(times.max()), 1e-9)
    (latency, per_token), _ = nnls(np.stack([np.ones(len(lengths)), lengths / lengths[-1]], axis=1), times / scale)
    if per_token <= 0:
        return None
    latency_s, per_token_s = float(latency) * scale, float(per_token) * scale / float(lengths[-1])
    p50, p90 = np.quantile(np.abs(latency_s + per_token_s * lengths - times), [0.5, 0.9]).tolist()
    return Transfer(latency_s, 1 / per_token_s, max(handshake_s, 0.0), p50, p90)


async def _first_token_s(source: Probe, target: Probe, length: int) -> float:
    """Seconds to the first token at the target of a prompt that the source has prefilled."""
    prompt = source.fresh(length)
    content = common(source.wishes, False) | {"prompt": prompt, "max_tokens": 1}
    content["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = await ask(source.client, source.at, "POST", source.at.path, content)
    if answer.status != 200:
        raise refused(source.at, answer)
    try:
        params = msgspec.json.decode(answer.body, type=_Answer).kv_transfer_params
    except msgspec.MsgspecError as error:
        raise Lost(f"prefill answered {error}") from None
    if params is None:
        raise PenstockError(
            f"{source.at.origin} hands out no KV (no kv_transfer_params in its answer)",
            "start both engines with a KV connector (--kv-transfer-config), or drop --to",
        )
    return await target.first_token_s(prompt, kv_transfer_params=params)
