"""What engine plugin and gateway say to each other: msgpack over ZeroMQ, this file on both sides.

An engine with the plugin has two addresses, on ports next to each other: a PUB socket for the stream of steps (one
message a step, latest state whole, so that a lost message does no harm) and, one port above, a ROUTER socket for
commands. Every frame on the first is a :class:`Step`; on the second, requests are [b"", number, :class:`Command`] and
answers [b"", number, :class:`Answer`], where ``number`` is any bytes of the caller's choice. Both are arrays in
msgpack, so fields are only ever added at the end, with a default; :data:`PROTOCOL` is raised when that is not enough.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 1

EARLIER = "penstock_output_tokens"
"""Key in a request's ``vllm_xargs``: output tokens that it had on other engines, which are part of its prompt here."""


class Running(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One running request. ``computed_tokens`` of its prompt and output have KV; ``id`` is the engine's own name of it,
    which contains the ``x-request-id`` it was sent with.
    """

    id: str
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int


class Prediction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Remaining output tokens of a request as seen when it had ``output_tokens``: the predictor's quantiles.

    ``remaining`` are the values at the levels that ``Answer.quantiles`` of a hello names, rising.
    """

    id: str
    output_tokens: int
    remaining: tuple[float, ...]


class Step(msgspec.Struct, frozen=True, array_like=True):
    """The state of an engine as it begins a step.

    ``number`` counts its steps, ``time_s`` is its own monotonic clock, ``step_s`` the time since the step before where
    that was busy (else 0). ``preemptions`` counts since the start. ``predictions`` are those made since the message
    before; a running request keeps its last one.
    """

    engine_id: str
    number: int
    time_s: float
    step_s: float
    waiting: int
    free_blocks: int
    total_blocks: int
    preemptions: int
    running: list[Running]
    predictions: list[Prediction]


class Command(msgspec.Struct, frozen=True, array_like=True):
    """``op`` is one of:

    * ``hello``: who are you? Answered at once, also by an idle engine.
    * ``handoff``: stop the running request ``id`` after its next token and keep its KV for one pull. The answer comes
      when it has stopped; its last chunk has finish reason "length".
    * ``hold``: keep the KV of the full blocks that request ``id`` has now, whatever becomes of it, for one pull by
      another engine while it runs on. The answer's ``hold`` names it. It ends with the pull, with ``release``, or
      with the lease.
    * ``release``: end the hold ``id``, or give up the KV of the handed-off request ``id``; not while it is being
      pulled.

    ``id`` of a request is any part of the engine's name of it that occurs in one running request only.
    """

    op: str
    id: str = ""


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """``error`` is empty, or why nothing was done; then the rest means nothing.

    Of a handoff or hold: ``params`` are the ``kv_transfer_params`` for a puller that sends the first ``tokens`` tokens
    of prompt and output; one that has the plugin too may send fewer or more. ``tokens`` of a handoff is all that the
    request has; of a hold, full blocks only.
    Of a hello: versions, the engine's id, what it can do (any of ``handoff``, ``precopy``, ``predict``), the
    predictor's name and levels.
    """

    error: str = ""
    tokens: int = 0
    params: dict[str, object] | None = None
    hold: str = ""
    protocol: int = PROTOCOL
    vllm: str = ""
    engine_id: str = ""
    abilities: tuple[str, ...] = ()
    predictor: str = ""
    quantiles: tuple[float, ...] = ()
