"""The interface of a step model: what one forward pass of an engine costs.

Compiled with mypyc together with the simulator, so it is plain Python floats: no arrays on this path.
"""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from penstock.core.errors import PenstockError


@mypyc_attr(allow_interpreted_subclasses=True)
class StepModel:
    """Cost of one forward pass of one instance, in seconds.

    A step processes ``decodes`` running decodes (one query token each) that together read ``context`` KV tokens, and
    a list of prefill chunks, given as parallel lists: new tokens ``chunk_new[i]`` after ``chunk_past[i]`` tokens of
    the same request whose KV is already there.
    """

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """Seconds of one step. ``context`` counts the KV of the ``decodes`` requests, each one's new token included."""
        raise NotImplementedError

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """A pure decode step as a straight line in its context, around ``context``.

        Returns
        -------
        intercept_s, slope_s, limit : float
            A step over ``c`` KV tokens takes ``intercept_s + slope_s * c`` seconds for every ``c`` from ``context``
            up to and including ``limit`` (``inf`` if the line never bends). This is what lets the simulator leap.
        """
        raise NotImplementedError

    def sms(self) -> int:
        """Streaming multiprocessors of one GPU; 0 where the model does not know."""
        return 0

    def part(self, compute: float, bandwidth: float) -> StepModel:
        """The same steps where only these shares of the chip's FLOP/s and memory bandwidth can be had.

        Raises
        ------
        PenstockError
            The model does not tell one from the other.
        """
        raise PenstockError(
            f"a {type(self).__name__} cannot say what a part of the GPU costs", "use the roofline: drop --profile"
        )


class LinearStepModel(StepModel):
    """Step time linear in the batch, its context and its prefill tokens (quadratic in a prompt's length).

    ``step = base + per_decode * B + per_context * N + sum over chunks (per_prefill * q + per_pair * q * (c + q / 2))``

    This is the family Arrow, xLLM, Llumnix and WAIT plan with (Arrow v2 section 3.1; WAIT section 2), and the one the
    queueing tests use, because its answers are known in closed form.
    """

    def __init__(
        self,
        base_s: float,
        per_decode_s: float = 0.0,
        per_context_s: float = 0.0,
        per_prefill_s: float = 0.0,
        per_pair_s: float = 0.0,
    ) -> None:
        self.base_s = base_s
        self.per_decode_s = per_decode_s
        self.per_context_s = per_context_s
        self.per_prefill_s = per_prefill_s
        self.per_pair_s = per_pair_s

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`."""
        total = self.base_s + self.per_decode_s * decodes + self.per_context_s * context
        for i in range(len(chunk_new)):
            q = chunk_new[i]
            total += self.per_prefill_s * q + self.per_pair_s * q * (chunk_past[i] + 0.5 * q)
        return total

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`."""
        return self.base_s + self.per_decode_s * decodes, self.per_context_s, float("inf")
