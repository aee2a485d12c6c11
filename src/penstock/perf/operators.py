"""Step model made of measured operators: dense layers by tokens, attention by shape, experts, and a cost per sequence.

The measurements come from a profile of a one-layer copy of the model (``operator_profile`` reads it); here they are
plain lists, interpolated linearly. Compiled with mypyc.

What a step costs::

    layers x (dense(tokens) + attention) + moe layers x (experts(tokens) + exchange) + once(tokens) + rows(sequences)

Units: every table holds seconds.
"""

from __future__ import annotations

from penstock.perf.step import StepModel


def locate(axis: list[int], value: float) -> int:
    """Index ``i`` of the segment ``axis[i] .. axis[i + 1]`` that holds ``value``; the outer ones extend for ever."""
    low, high = 0, len(axis) - 2
    while low < high:
        middle = (low + high + 1) // 2
        if axis[middle] <= value:
            low = middle
        else:
            high = middle - 1
    return low


class AttentionTable:
    """Measured attention time of one layer, seconds, over a grid.

    ``decode_s[i][j]``: ``n_axis[i]`` decodes of ``kv_axis[j]`` tokens each. ``prefill_s[a][b]``: one chunk of
    ``chunk_axis[a]`` tokens after ``past_axis[b]``. ``mixed_s[a][b][i][j]``: both in one batch, over the shorter
    ``mixed_n_axis``. ``skew_pure`` (over ``n_axis``) and ``skew_mixed`` (over ``mixed_n_axis``): how much longer a
    batch of unequal decodes takes than one of equal decodes with the same total, 1 where unknown.
    """

    def __init__(
        self,
        n_axis: list[int],
        kv_axis: list[int],
        decode_s: list[list[float]],
        chunk_axis: list[int],
        past_axis: list[int],
        prefill_s: list[list[float]],
        mixed_n_axis: list[int],
        mixed_s: list[list[list[list[float]]]],
        skew_pure: list[float],
        skew_mixed: list[float],
    ) -> None:
        self.n_axis = n_axis
        self.kv_axis = kv_axis
        self.decode_s = decode_s
        self.chunk_axis = chunk_axis
        self.past_axis = past_axis
        self.prefill_s = prefill_s
        self.mixed_n_axis = mixed_n_axis
        self.mixed_s = mixed_s
        self.skew_pure = skew_pure
        self.skew_mixed = skew_mixed
        # A kernel with next to nothing to do: what each further chunk of a batch does not pay again.
        self.floor_s = prefill_s[0][0]
        self._curves: dict[int, list[float]] = {}

    def decode_curve(self, decodes: int) -> list[float]:
        """Seconds over ``kv_axis`` for a batch of ``decodes`` (between two measured sizes: linear), skew included."""
        known = self._curves.get(decodes)
        if known is not None:
            return known
        i = locate(self.n_axis, decodes)
        n0, n1 = self.n_axis[i], self.n_axis[i + 1]
        w = max((decodes - n0) / (n1 - n0), 0.0)
        skew = (1.0 - w) * self.skew_pure[i] + w * self.skew_pure[i + 1] if w <= 1.0 else self.skew_pure[i + 1]
        low, high = self.decode_s[i], self.decode_s[i + 1]
        curve = [skew * ((1.0 - w) * low[j] + w * high[j]) for j in range(len(low))]
        self._curves[decodes] = curve
        return curve

    def prefill_alone_s(self, new: float, past: float) -> float:
        """Seconds of one chunk alone in the batch; beyond the grid the last slope goes on, never below zero."""
        a = locate(self.chunk_axis, new)
        b = locate(self.past_axis, past)
        c0, c1 = self.chunk_axis[a], self.chunk_axis[a + 1]
        p0, p1 = self.past_axis[b], self.past_axis[b + 1]
        u = (new - c0) / (c1 - c0)
        v = (past - p0) / (p1 - p0)
        if u < 0.0:
            u = 0.0
        low = (1.0 - v) * self.prefill_s[a][b] + v * self.prefill_s[a][b + 1]
        high = (1.0 - v) * self.prefill_s[a + 1][b] + v * self.prefill_s[a + 1][b + 1]
        value = (1.0 - u) * low + u * high
        return value if value > 0.0 else 0.0

    def beside_s(self, new: float, past: float, decodes: int, mean_kv: float) -> float:
        """Seconds that ``decodes`` decodes add to a batch with prefill (``new`` tokens after ``past``)."""
        a = locate(self.chunk_axis, new)
        b = locate(self.past_axis, past)
        i = locate(self.mixed_n_axis, decodes)
        j = locate(self.kv_axis, mean_kv)
        u = (new - self.chunk_axis[a]) / (self.chunk_axis[a + 1] - self.chunk_axis[a])
        v = (past - self.past_axis[b]) / (self.past_axis[b + 1] - self.past_axis[b])
        w = (decodes - self.mixed_n_axis[i]) / (self.mixed_n_axis[i + 1] - self.mixed_n_axis[i])
        x = (mean_kv - self.kv_axis[j]) / (self.kv_axis[j + 1] - self.kv_axis[j])
        # Outside the grid the chunk's shape matters little and is clamped; batch and KV go on linearly.
        u = 0.0 if u < 0.0 else (1.0 if u > 1.0 else u)
        v = 0.0 if v < 0.0 else (1.0 if v > 1.0 else v)
        x = 0.0 if x < 0.0 else x
        total = 0.0
        for da in range(2):
            wa = u if da else 1.0 - u
            for db in range(2):
                wb = wa * (v if db else 1.0 - v)
                if wb == 0.0:
                    continue
                cell = self.mixed_s[a + da][b + db]
                low = (1.0 - x) * cell[i][j] + x * cell[i][j + 1]
                high = (1.0 - x) * cell[i + 1][j] + x * cell[i + 1][j + 1]
                total += wb * ((1.0 - w) * low + w * high - self.prefill_s[a + da][b + db])
        skew0, skew1 = self.skew_mixed[i], self.skew_mixed[i + 1]
        total *= skew1 if w > 1.0 else (1.0 - w) * skew0 + w * skew1
        return total if total > 0.0 else 0.0

    def batch_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """Seconds of one layer's attention for a whole batch.

        Several chunks in one batch add up, less the fixed cost of a launch each. The decodes' share in a mixed batch
        is taken beside one chunk of all the new tokens after the chunks' mean past.
        """
        count = len(chunk_new)
        if count == 0:
            if decodes == 0:
                return 0.0
            mean = context / decodes
            curve = self.decode_curve(decodes)
            j = locate(self.kv_axis, mean)
            k0, k1 = self.kv_axis[j], self.kv_axis[j + 1]
            return curve[j] + (curve[j + 1] - curve[j]) * (mean - k0) / (k1 - k0)
        total = self.floor_s
        new = 0
        past_weighted = 0.0
        for i in range(count):
            q = chunk_new[i]
            new += q
            past_weighted += float(q) * chunk_past[i]
            alone = self.prefill_alone_s(q, chunk_past[i])
            if alone > self.floor_s:
                total += alone - self.floor_s
        if decodes:
            total += self.beside_s(new, past_weighted / new if new else 0.0, decodes, context / decodes)
        return total


class OperatorStepModel(StepModel):
    """Sum of measured operators, see the module's docstring.

    Parameters
    ----------
    layers : int
        Layers of the whole model.
    dense_s, once_s : list of float
        Index = tokens in the step, 0 included: seconds of one layer's dense operators, and of embedding and final
        norm. Beyond the end they go on in proportion.
    rows_s : list of float
        Index = sequences: seconds of classifier and sampler.
    attention : AttentionTable
    moe_layers : int
    experts_s : list of float
        Index = tokens of this rank: seconds of one layer's experts and of the exchange with the other ranks.
    pad : list of int
        Index = tokens: tokens the engine runs instead (vLLM pads to the sizes of its captured CUDA graphs); as long
        as needed, more tokens are not padded.
    overhead_s : float
        Seconds added to each step: the gap between two steps.
    eager_gap_s : float
        Seconds added to a step with prefill, which does not replay a captured graph: the device waits for the host.
    """

    def __init__(
        self,
        layers: int,
        dense_s: list[float],
        once_s: list[float],
        rows_s: list[float],
        attention: AttentionTable,
        moe_layers: int = 0,
        experts_s: list[float] | None = None,
        pad: list[int] | None = None,
        overhead_s: float = 0.0,
        eager_gap_s: float = 0.0,
    ) -> None:
        self.layers = layers
        self.dense_s = dense_s
        self.once_s = once_s
        self.rows_s = rows_s
        self.attention = attention
        self.moe_layers = moe_layers
        self.experts_s = experts_s or [0.0, 0.0]
        self.pad = pad or [0]
        self.overhead_s = overhead_s
        self.eager_gap_s = eager_gap_s

    def padded(self, tokens: int) -> int:
        """Tokens the engine runs for ``tokens`` tokens."""
        return self.pad[tokens] if tokens < len(self.pad) else tokens

    def tokens_s(self, tokens: int) -> float:
        """Seconds of everything that depends only on the tokens of this rank's step, all layers."""
        padded = self.padded(tokens)
        total = self.layers * _at(self.dense_s, padded) + _at(self.once_s, padded)
        if self.moe_layers:
            total += self.moe_layers * _at(self.experts_s, padded)
        return total

    def sequences_s(self, sequences: int) -> float:
        """Seconds of classifier and sampler for that many sequences."""
        return _at(self.rows_s, sequences)

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`. An empty step takes no time."""
        count = len(chunk_new)
        if decodes + count == 0:
            return 0.0
        tokens = decodes
        for i in range(count):
            tokens += chunk_new[i]
        attention = self.layers * self.attention.batch_s(decodes, context, chunk_new, chunk_past)
        gap = self.overhead_s + self.eager_gap_s if count else self.overhead_s
        return gap + self.tokens_s(tokens) + self.sequences_s(decodes + count) + attention

    def lockstep_s(self, batches: list[tuple[int, int, list[int], list[int]]]) -> float:
        """Seconds of one step of a data-parallel group whose ranks wait for each other at every MoE layer.

        ``batches`` holds (decodes, context, chunk_new, chunk_past) of each rank; an idle one runs a dummy token. In
        each layer the slowest rank's attention counts, and experts work on the tokens of all. As in vLLM, all ranks
        are padded to the largest while a captured graph is that large. One rank alone: :meth:`step_s`.
        """
        if len(batches) == 1:
            decodes, context, new, past = batches[0]
            return self.step_s(decodes, context, new, past)
        tokens = [max(decodes + sum(new), 1) for decodes, _, new, _ in batches]
        largest = max(tokens)
        if largest < len(self.pad):
            tokens = [self.pad[largest]] * len(tokens)
        layer, once = 0.0, 0.0
        gap = self.overhead_s
        for n, (decodes, context, new, past) in zip(tokens, batches, strict=True):
            layer = max(layer, _at(self.dense_s, n) + self.attention.batch_s(decodes, context, new, past))
            once = max(once, _at(self.once_s, n) + self.sequences_s(decodes + len(new)))
            if new:
                gap = self.overhead_s + self.eager_gap_s
        mean = (sum(tokens) + len(tokens) - 1) // len(tokens)
        return gap + self.layers * layer + once + self.moe_layers * _at(self.experts_s, mean)

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`. The limit is where the mean KV length leaves its segment of the measured grid."""
        if decodes == 0:
            return 0.0, 0.0, float("inf")
        base = self.overhead_s + self.tokens_s(decodes) + self.sequences_s(decodes)
        axis = self.attention.kv_axis
        curve = self.attention.decode_curve(decodes)
        j = locate(axis, context / decodes)
        slope = (curve[j + 1] - curve[j]) / (axis[j + 1] - axis[j])
        intercept = base + self.layers * (curve[j] - slope * axis[j])
        # The last segment extends for ever; a segment's end belongs to both of its neighbours.
        limit = float("inf") if j == len(axis) - 2 else float(axis[j + 1] * decodes)
        return intercept, self.layers * slope / decodes, limit


def _at(table: list[float], index: int) -> float:
    last = len(table) - 1
    if index <= last:
        return table[index]
    return table[last] * index / last
