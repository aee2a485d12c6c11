"""EcoRoute: which decode instance gets a request, so that clocks can stay low (VoltanaLLM, arXiv 2509.04827; its code).

``tile_aware`` fills tiles of 128 requests: a step costs what its last full tile does, so the instance whose tile is
fullest takes the request, unless that would open the next tile. ``fadr`` asks EcoPred which instance could take it
without a higher clock. While all batches are below one tile both take the lowest (clock, requests).

Differing from the code: an instance without room for the request is passed over, and ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from penstock.policy.ecopred import EcoPred
from penstock.policy.parts import Choice, DecodePlacement
from penstock.policy.placement import has_room
from penstock.policy.view import ClusterView, RequestRecord

TILE: Final = 128
"""Requests of one tile (code)."""
_GROWTH_NOW: Final = 2
_GROWTH_NEXT: Final = 50
"""Tokens by which each running request is taken to grow, now and with the new one (code)."""

Predict = Callable[[float, float, float], float]
"""Seconds of a decode step from clock in MHz, requests and KV tokens."""


def light_order(clocks: Sequence[int], requests: Sequence[float]) -> list[int]:
    """Instances by (clock level, requests), ascending: the order while all batches are below one tile."""
    return sorted(range(len(requests)), key=lambda i: (clocks[i], requests[i], i))


def tile_order(requests: Sequence[float]) -> list[int]:
    """Instances in the order in which ``tile_aware`` would have them.

    By tile, the fullest first; those whose tile is exactly full (one more opens the next) come last.
    """
    order = sorted(range(len(requests)), key=lambda i: (-(-int(requests[i]) // TILE), -requests[i], i))
    open_ones = [i for i in order if requests[i] == 0 or requests[i] % TILE != 0]
    return open_ones + [i for i in order if i not in open_ones]


def lowest_clock(predict: Predict, mhz: Sequence[float], requests: float, tokens: float, slo_s: float) -> float:
    """The lowest of ``mhz`` (ascending) whose predicted decode step meets ``slo_s``, or the highest."""
    for f in mhz[:-1]:
        if predict(f, requests, tokens) <= slo_s:
            return f
    return mhz[-1]


def fadr_order(
    requests: Sequence[float],
    tokens: Sequence[float],
    new_tokens: float,
    predict: Predict,
    mhz: Sequence[float],
    slo_s: float,
) -> list[int]:
    """Instances in the order in which ``fadr`` would have them.

    An instance's key is the clock it needs: negative if the request would not raise it, positive if it would (or
    needs the highest). Where the highest and the lowest lie more than one level apart, the lowest come first;
    else those that stay where they are, the highest clock among them first, then by tile, the fullest first.
    """
    keys: list[float] = []
    for n, held in zip(requests, tokens, strict=True):
        now = lowest_clock(predict, mhz, n, held + _GROWTH_NOW * n, slo_s)
        after = lowest_clock(predict, mhz, n + 1, held + new_tokens + _GROWTH_NEXT * n, slo_s)
        keys.append(after if after > now or after == mhz[-1] else -now)
    levels = [mhz.index(abs(key)) for key in keys]
    everyone = range(len(keys))
    if max(levels) - min(levels) > 1:
        return sorted(everyone, key=lambda i: (levels[i], i))
    return sorted(everyone, key=lambda i: (keys[i], -(-int(requests[i]) // TILE), -requests[i], i))


def _first_with_room(view: ClusterView, rows: Sequence[int], order: Sequence[int], tokens: float) -> Choice:
    for i in order:
        if has_room(view, rows[i], tokens):
            return Choice(rows[i])
    return Choice(rows[order[0]], False)


class EcoRoute(DecodePlacement):
    """Both smart placements: below one tile by clock and requests, above as the subclass orders."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        rows: list[int] = view.decodes.tolist()
        if not rows:
            return Choice(-1, False)
        requests: list[float] = view.decode_requests(view.decodes).tolist()
        if max(requests) < TILE:
            order = light_order(view.clock[view.decodes].tolist(), requests)
        else:
            order = self.order(request, view, now_s, requests)
        return _first_with_room(view, rows, order, request.context_tokens())

    def order(self, request: RequestRecord, view: ClusterView, now_s: float, requests: list[float]) -> list[int]:
        """Positions in ``view.decodes``, the best first; ``requests`` are theirs."""
        raise NotImplementedError


class TileAware(EcoRoute):
    """Fill tiles (the code's ``tile_aware``)."""

    def order(self, request: RequestRecord, view: ClusterView, now_s: float, requests: list[float]) -> list[int]:
        """See :class:`EcoRoute`."""
        return tile_order(requests)


class Fadr(EcoRoute):
    """Raise no clock (the code's ``fadr``, frequency-aware decode routing)."""

    def __init__(self, predictor: EcoPred, mhz: Sequence[float], slo_s: float) -> None:
        self.predictor = predictor
        self.mhz = list(mhz)
        self.slo_s = slo_s

    def order(self, request: RequestRecord, view: ClusterView, now_s: float, requests: list[float]) -> list[int]:
        """See :class:`EcoRoute`."""
        tokens: list[float] = view.resident_tokens(now_s, view.decodes).tolist()
        predict = self.predictor.decode_s
        return fadr_order(requests, tokens, request.context_tokens(), predict, self.mhz, self.slo_s)
