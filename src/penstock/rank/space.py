"""Which arrangements there are within a GPU budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from penstock.core.errors import PenstockError
from penstock.perf.hardware import HardwareSpec, hardware_spec
from penstock.perf.kv import kv_capacity
from penstock.perf.lookup import dtype_bytes
from penstock.perf.models import ModelSpec, model_spec
from penstock.rank.arrangement import Arrangement

TPS = (1, 2, 4, 8)
CHUNKS = (512, 2048, 8192)
"""Token budgets of mixed instances: small against interference, vLLM's defaults on smaller and on larger cards."""


class Space(msgspec.Struct, frozen=True):
    """What may be combined.

    ``gpus`` counts cards by hardware; a role runs on one kind. ``chunks`` are the token budgets of mixed instances
    with chunked prefill, ``step_tokens`` is that of prefill and decode instances. ``weight_dtypes`` may hold None (the
    model's own type).
    """

    gpus: dict[str, int]
    tps: tuple[int, ...] = TPS
    chunks: tuple[int, ...] = CHUNKS
    step_tokens: int = 8192
    weight_dtypes: tuple[str | None, ...] = (None,)
    kv_dtypes: tuple[str, ...] = ("bf16",)


def parse_gpus(text: str, hardware: str) -> dict[str, int]:
    """``8`` (of ``hardware``) or ``a100-80g=8,h100=4`` as GPUs by hardware.

    Raises PenstockError for another form, an unknown hardware, or a number below 1.
    """
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, count = part.rpartition("=")
        if not count.strip().isdigit() or int(count) < 1:
            raise PenstockError(f"GPU budget {part!r} cannot be read", "write --gpus 8 or --gpus a100-80g=8,h100=4")
        found[hardware_spec(name if equals else hardware).name] = int(count)
    if not found:
        raise PenstockError(f"no GPU in {text!r}", "write --gpus 8 or --gpus a100-80g=8,h100=4")
    return found


def whole_numbers(text: str, flag: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers; raises PenstockError for what is not a number of 1 or more."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdigit() or int(part) < 1 for part in parts):
        raise PenstockError(f"{flag} {text!r} cannot be read", f"give numbers of 1 or more, as {flag} 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def check_space(space: Space, model_name: str, profile: str | None) -> None:
    """Raises PenstockError where number types do not exist or cannot be had, or a profile contradicts the space."""
    model = model_spec(model_name)
    for dtype in [*space.kv_dtypes, *filter(None, space.weight_dtypes)]:
        dtype_bytes(dtype)
    changed = [dtype for dtype in space.weight_dtypes if dtype is not None]
    if changed and model.weight_dtype not in ("bf16", "fp16"):
        raise PenstockError(
            f"{model.name} is stored in {model.weight_dtype} already, not to be turned into {', '.join(changed)}",
            "drop --weight-dtypes",
        )
    if profile is not None and (len(space.gpus) > 1 or len(space.tps) > 1 or changed or len(space.kv_dtypes) > 1):
        raise PenstockError(
            f"profile {profile} describes one kind of instance",
            "drop --profile, or rank one hardware with one of --tps, without --weight-dtypes and --kv-dtypes",
        )


def arrangements(space: Space) -> Iterator[Arrangement]:
    """All combinations that use no more GPUs than there are, whether the model fits or not.

    Those that leave GPUs idle are included: they cost less, and a budget need not be spent.
    """
    for weight in space.weight_dtypes:
        for kv in space.kv_dtypes:
            yield from _mixed(space, weight, kv)
            yield from _disaggregated(space, weight, kv)


def _mixed(space: Space, weight: str | None, kv: str) -> Iterator[Arrangement]:
    budgets: Sequence[int | None] = (None, *space.chunks)
    for card, there in space.gpus.items():
        for tp in space.tps:
            for count in range(1, there // tp + 1):
                for tokens in budgets:
                    yield Arrangement(0, 0, count, tp, tp, card, card, tokens, weight, kv)


def _disaggregated(space: Space, weight: str | None, kv: str) -> Iterator[Arrangement]:
    for p_card, p_there in space.gpus.items():
        for d_card, d_there in space.gpus.items():
            for p_tp in space.tps:
                for p in range(1, p_there // p_tp + 1):
                    left = d_there - p * p_tp if p_card == d_card else d_there
                    for d_tp in space.tps:
                        for d in range(1, left // d_tp + 1):
                            yield Arrangement(p, d, 0, p_tp, d_tp, p_card, d_card, space.step_tokens, weight, kv)


def hopeless(space: Space, model_name: str, reasons: Mapping[str, int]) -> PenstockError:
    """The error for a space in which nothing can run; ``reasons`` counts what was in the way."""
    model = model_spec(model_name)
    cards = [hardware_spec(name) for name in space.gpus]
    held = sum(card.usable_bytes * space.gpus[card.name] for card in cards)
    budget = ", ".join(f"{count} x {name}" for name, count in space.gpus.items())
    if not any(_fits_somewhere(model, card, space) for card in cards):
        needed = model.weight_bytes()
        return PenstockError(
            f"{model.name} ({needed / 2**30:.0f} GiB of weights) fits no arrangement of {budget} "
            f"({held / 2**30:.0f} GiB together)",
            "give more or larger GPUs, --tps with more cards an instance, or --weight-dtypes fp8",
        )
    why = max(reasons, key=lambda reason: reasons[reason], default="no combination")
    return PenstockError(f"no arrangement of {budget} can run: {why}", "give more GPUs or other --tps")


def _fits_somewhere(model: ModelSpec, card: HardwareSpec, space: Space) -> bool:
    for tp in space.tps:
        try:
            if tp <= space.gpus[card.name]:
                kv_capacity(model, card, tp)
                return True
        except PenstockError:
            continue
    return False
