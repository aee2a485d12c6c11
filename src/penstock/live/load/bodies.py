"""Request bodies, made a little ahead of time so that making them never delays sending them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.core.types import Slo
from penstock.live.load.dialect import Dialect, Wishes, common, prompt_field
from penstock.live.load.endpoint import Endpoint
from penstock.live.load.prompts import Prompts
from penstock.workload.trace import Trace

CHAT_TEMPLATE_TOKENS = 64
"""Room for what a chat template adds to a prompt."""


class Bodies:
    """Bodies of a trace's requests.

    Parameters
    ----------
    longest : int, optional
        Tokens of prompt and output of one request that the server takes. Where the trace has the prompts' texts and
        the model ends its output by itself, this is the only limit: the trace's output length is what the right answer
        needs, not what anybody would ask for.
    slos : mapping of class name to Slo, optional
        Sent along as ``penstock: {"slo": {"ttft_ms": ..., "tpot_ms": ...}}``.
    """

    def __init__(
        self,
        at: Endpoint,
        dialect: Dialect,
        wishes: Wishes,
        trace: Trace,
        prompts: Prompts,
        slos: Mapping[str, Slo] | None = None,
        longest: int | None = None,
    ) -> None:
        self._at = at
        self._dialect = dialect
        self._trace = trace
        self._prompts = prompts
        self._common = common(wishes, dialect.ids) | {"stream": True, "stream_options": {"include_usage": True}}
        self._longest = longest if wishes.natural_end else None
        self._slos: Sequence[dict[str, Any]] = [{}] * len(trace.class_names)
        if slos is not None:
            self._slos = [_slo_field(slos[name]) for name in trace.class_names]
        self._encode = msgspec.json.Encoder().encode

    def body(self, i: int) -> bytes:
        """The body of request ``i``; 1,000 prompt tokens take some 20 µs."""
        trace, d = self._trace, self._dialect
        prompt: list[int] | str
        limit = int(trace.output_tokens[i])
        if trace.prompts is not None:
            prompt = trace.prompts[i]
            if self._at.kind == "chat":
                prompt = prompt.rstrip("\n")
            if self._longest is not None:
                limit = max(limit, self._longest - int(trace.prompt_tokens[i]) - CHAT_TEMPLATE_TOKENS)
        elif d.form == "tokens":
            prompt = self._prompts.tokens(i)
        else:
            prompt = self._prompts.text(i, d.words(int(trace.prompt_tokens[i])), 1 / d.per_word)
        content = self._common | {"max_tokens": limit} | prompt_field(self._at, prompt)
        return self._encode(content | self._slos[trace.slo_class[i]])


def _slo_field(slo: Slo) -> dict[str, Any]:
    targets = {"ttft_ms": slo.ttft_s * 1e3, "tpot_ms": slo.tpot_s * 1e3}
    finite = {name: value for name, value in targets.items() if math.isfinite(value)}
    return {"penstock": {"slo": finite}} if finite else {}
