"""A whole measurement: facts, experiments, fit, transfer."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median

from penstock.core.errors import PenstockError
from penstock.live.http.client import HttpClient
from penstock.live.load.dialect import Wishes, find_dialect
from penstock.live.load.endpoint import Endpoint, Served, served_model
from penstock.live.load.measure.campaign import Campaign, Limits, carry_out
from penstock.live.load.measure.facts import Facts, counter, facts
from penstock.live.load.measure.probes import ALONE, Probe, Row
from penstock.live.load.measure.transfer import Transfer, measure_transfer
from penstock.live.load.prompts import Pool
from penstock.perf.fitted import Fit, FittedStepModel, fit_step_model
from penstock.perf.profile_io import Profile

CONNECT_S = 10.0
TRANSFER_SHARE = 0.25
"""Share of the time for the transfer, where it is measured."""
HICCUP, HICCUPS, HICCUP_SHARE = 0.15, 5.0, 0.1
"""A step that is off by more than this, and by more than so many times the median error, was disturbed; if more than
this share of the steps is, it is the model that is wrong, and all count."""


@dataclass(frozen=True)
class Wanted:
    """What to measure. ``to`` is the engine that KV moves to; ``seconds`` the time to spend, about."""

    at: Endpoint
    to: Endpoint | None = None
    model: str | None = None
    vocab: range = range(300, 500)
    seconds: float = 60.0
    batched_tokens: int = 2048
    batch: int = 64
    name: str = ""


@dataclass(frozen=True)
class Measured:
    """What was found. ``front_end_s`` is what a time to the first token has more than its step."""

    served: Served
    facts: Facts
    campaign: Campaign
    fit: Fit
    front_end_s: float
    transfer: Transfer | None
    profile: Profile
    notes: list[str]


async def measure(wanted: Wanted, progress: Callable[[float, int], None] | None = None) -> Measured:
    """Measure the engine on the current event loop; it must have nothing else to do.

    Parameters
    ----------
    progress : callable, optional
        Called with seconds spent and steps measured.

    Raises
    ------
    PenstockError
        An engine is not there, takes no token ids, fails, or gives too little to fit.
    """
    client = HttpClient(connect_s=CONNECT_S)
    try:
        probe, served = await _probe(client, wanted.at, wanted)
        notes = []
        busy = await counter(client, wanted.at, "vllm:num_requests_running")
        if busy:
            notes.append(f"the engine is busy ({busy:.0f} requests are running): the times are not its own")
        limits = Limits(
            wanted.batched_tokens,
            wanted.batch,
            served.max_model_len,
            probe.facts.capacity_tokens,
            probe.facts.block_size or 16,
        )
        seconds = wanted.seconds * (1 - TRANSFER_SHARE * (wanted.to is not None))
        campaign = await carry_out(probe, limits, seconds, progress)
        fit, hiccups = fit_rows(campaign.rows)
        notes += campaign.notes + lacking(campaign.rows)
        if hiccups:
            notes.append(f"{hiccups} of {len(campaign.rows)} measured steps are far from all others and were left out")
        front = front_end_s(campaign.rows, fit.model)
        transfer = None
        if wanted.to is not None:
            target, _ = await _probe(client, wanted.to, wanted)
            share = wanted.seconds * TRANSFER_SHARE
            transfer = await measure_transfer(probe, target, fit.model, front, limits.longest, share)
            if transfer is None:
                notes.append("transfers of more tokens took no longer: the link is too fast to be seen from here")
        profile = as_profile(wanted, served, probe.facts, campaign, fit, front, transfer)
        return Measured(served, probe.facts, campaign, fit, front, transfer, profile, notes)
    finally:
        await client.close()


def fit_rows(rows: list[Row]) -> tuple[Fit, int]:
    """The step model of the rows, and how many it was made without: hiccups, far from what all others say.

    Rows of prompts alone count only where no other steps of a prefill were seen (they include the front end). Where no
    step had several prompts, the cost of a chunk cannot be told from that of a step with prefill: it is all given to
    the step.

    Raises
    ------
    PenstockError
        Too few rows of one kind of step.
    """
    clean = [row for row in rows if row.kind != ALONE]
    if sum(row.decodes == 0 for row in clean) >= 3:
        rows = clean
    pure = sum(not row.chunk_new for row in rows)
    if pure < 3 or len(rows) - pure < 3:
        raise PenstockError(
            f"{pure} decode steps and {len(rows) - pure} steps with prefill are too few to fit", "give more --seconds"
        )
    fit = _fit(rows)
    limit = max(HICCUP, HICCUPS * fit.all.p50)
    kept = [row for row in rows if abs(_predicted(fit.model, row) / row.seconds - 1) <= limit]
    dropped = len(rows) - len(kept)
    if 0 < dropped <= HICCUP_SHARE * len(rows):
        fit = _fit(kept)
    else:
        dropped = 0
    if any(len(row.chunk_new) > 1 for row in rows):
        return fit, dropped
    found = dict(fit.model.coefficients)
    found["prefill_base_s"] += found.pop("per_chunk_s")
    return Fit(FittedStepModel(found), fit.decode, fit.prefill, fit.all), dropped


def _fit(rows: list[Row]) -> Fit:
    return fit_step_model(
        [row.decodes for row in rows],
        [row.context for row in rows],
        [row.chunk_new for row in rows],
        [row.chunk_past for row in rows],
        [row.seconds for row in rows],
    )


def _predicted(model: FittedStepModel, row: Row) -> float:
    return model.step_s(row.decodes, row.context, list(row.chunk_new), list(row.chunk_past))


def front_end_s(rows: list[Row], model: FittedStepModel) -> float:
    """What HTTP, tokenizer and front end add to a time to the first token: the median over prompts alone, at least 0.

    0 as well where those rows made the model, which then has it within ``prefill_base_s``.
    """
    more = [row.seconds - model.step_s(0, 0, list(row.chunk_new), [0]) for row in rows if row.kind == ALONE]
    return max(median(more), 0.0) if more else 0.0


def lacking(rows: list[Row]) -> list[str]:
    """What the engine did not let be measured, and what that does to the model."""
    notes = []
    if not any(sum(row.chunk_past) for row in rows):
        notes.append("no prefill on top of cached tokens was seen: per_past_s is 0")
    if sum(row.decodes == 0 and row.kind != ALONE for row in rows) < 3:
        notes.append("prefill could not be timed apart from the front end: prefill_base_s includes it")
    if not any(len(row.chunk_new) > 1 for row in rows):
        notes.append("no step with several prompts was seen: per_chunk_s is within prefill_base_s")
    return notes


def as_profile(
    wanted: Wanted, served: Served, found: Facts, campaign: Campaign, fit: Fit, front: float, transfer: Transfer | None
) -> Profile:
    """The profile file's content: model, capacity, link, residuals."""
    machine = {"engine": wanted.at.origin, "front_end_s": f"{front:.6g}"}
    if found.blocks is not None and found.block_size is not None:
        machine |= {"kv_blocks": str(found.blocks), "block_size": str(found.block_size)}
    if transfer is not None:
        machine |= {
            "transfer_latency_s": f"{transfer.latency_s:.6g}",
            "transfer_tokens_per_s": f"{transfer.tokens_per_s:.6g}",
            "handshake_s": f"{transfer.handshake_s:.6g}",
        }
    return Profile(
        model=fit.model,
        name=wanted.name or served.id,
        source=f"penstock profile: {len(campaign.rows)} kinds of steps of {served.id}, timed over HTTP",
        date=datetime.now(UTC).date().isoformat(),
        machine=machine,
        versions={"vllm": found.version} if found.version else {},
        residuals={"decode": asdict(fit.decode), "prefill": asdict(fit.prefill), "all": asdict(fit.all)},
    )


async def _probe(client: HttpClient, at: Endpoint, wanted: Wanted) -> tuple[Probe, Served]:
    served = await served_model(client, at, wanted.model)
    wishes = Wishes(served.id, "tokens")
    dialect = await find_dialect(client, at, wishes, wanted.vocab)
    salt = secrets.randbits(63)
    return Probe(client, at, wishes, dialect, await facts(client, at), Pool(wanted.vocab, salt), salt), served
