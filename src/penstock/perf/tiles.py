"""Tile steps: matrix products work on whole tiles of the batch, so a decode batch costs what its last full tile does.

VoltanaLLM (arXiv 2509.04827) routes by the jumps of decode time at multiples of 128 requests. A roofline is smooth
there; this wraps one, so that the simulator's truth can have what a policy's single line cannot know.
"""

from __future__ import annotations

from penstock.perf.step import StepModel

TILE = 128
"""Requests of one tile (VoltanaLLM's code)."""


class TiledStepModel(StepModel):
    """``base``, whose pure decode steps cost ``share`` of what the batch rounded up to whole tiles would.

    The rest (1 - ``share``) is charged for the batch as it is. The context is never rounded: attention reads each
    request's own KV. In steps with prompts the chunks outweigh a tile and nothing is rounded.
    """

    def __init__(self, base: StepModel, tile: int = TILE, share: float = 1.0) -> None:
        self.base = base
        self.tile = tile
        self.share = share

    def rounded(self, decodes: int) -> int:
        """The batch in whole tiles."""
        return -(-decodes // self.tile) * self.tile

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`."""
        plain = self.base.step_s(decodes, context, chunk_new, chunk_past)
        if len(chunk_new) > 0 or decodes == 0:
            return plain
        return plain + self.share * (self.base.step_s(self.rounded(decodes), context, [], []) - plain)

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`. Two lines in the context, mixed: a line up to where the first of them bends."""
        intercept, slope, limit = self.base.decode_affine(decodes, context)
        if decodes == 0:
            return intercept, slope, limit
        tiled_intercept, tiled_slope, tiled_limit = self.base.decode_affine(self.rounded(decodes), context)
        return (
            intercept + self.share * (tiled_intercept - intercept),
            slope + self.share * (tiled_slope - slope),
            min(limit, tiled_limit),
        )
