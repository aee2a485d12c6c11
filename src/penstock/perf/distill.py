"""From operator tables to the ten coefficients of a :class:`FittedStepModel`, small enough to ship and fast to run.

``python -m penstock.perf.distill FOLDER MODEL NAME OUT`` writes such a profile from an operator profile's folder.
"""

from __future__ import annotations

import random
import sys
from dataclasses import asdict
from pathlib import Path

from penstock.perf.fitted import Fit, fit_step_model
from penstock.perf.models import model_spec
from penstock.perf.operator_profile import load_operator_profile
from penstock.perf.profile_io import Profile, save_profile
from penstock.perf.step import StepModel


def distill(
    model: StepModel,
    max_decodes: int = 256,
    max_batched_tokens: int = 2048,
    max_kv: int = 8192,
    steps: int = 3000,
    seed: int = 0,
) -> Fit:
    """A :class:`FittedStepModel` that imitates ``model`` on random steps, with the residuals of the imitation.

    Half of the steps are pure decode. Batch size and mean KV length (16 … ``max_kv`` tokens) are log-uniform up to
    ``max_decodes`` and ``max_kv``; a step with prefill has one to four chunks within ``max_batched_tokens``. Same
    ``seed``, same fit. Good for dense models (2 % mean error); not for experts, whose decode time bends with the
    number of experts touched (20 %): use the operator tables there.
    """
    rng = random.Random(seed)
    decodes: list[int] = []
    context: list[int] = []
    new: list[list[int]] = []
    past: list[list[int]] = []
    for i in range(steps):
        batch = round(max_decodes ** rng.random())
        chunks: list[int] = []
        if i % 2:
            batch = batch - 1
            room = max_batched_tokens - batch
            for _ in range(rng.randint(1, 4)):
                size = min(rng.randint(16, max_batched_tokens), room)
                if size >= 16:
                    chunks.append(size)
                    room -= size
            chunks = chunks or [16]
        decodes.append(batch)
        context.append(int(batch * 16 * (max_kv / 16) ** rng.random()))
        new.append(chunks)
        past.append([0 if rng.random() < 0.6 else int(rng.random() * max_kv) for _ in chunks])
    seconds = [model.step_s(*row) for row in zip(decodes, context, new, past, strict=True)]
    return fit_step_model(decodes, context, new, past, seconds)


def main(folder: str, model_name: str, name: str, out: str) -> None:
    """Write the fitted profile ``name`` of ``model_name`` from the CSV files in ``folder`` to ``out``.

    Every figure in the file comes from the operator profile; machine and versions from its ``meta.yaml``.
    """
    root = Path(folder)
    meta: dict[str, str] = {}
    for line in (root.parent / "meta.yaml").read_text().splitlines():
        key, _, value = line.partition(":")
        if value.strip() and not key.startswith(" "):
            meta[key] = value.strip().strip("'")
    fit = distill(load_operator_profile(root, model_spec(model_name)))
    profile = Profile(
        model=fit.model,
        name=name,
        source="least squares on steps computed from LLMServingSim's operator profile (MIT) of vLLM, "
        "eager, one layer; no host overhead, no tensor-parallel all-reduce",
        date=meta.get("profiled_at", "")[:10],
        machine={"gpu": meta.get("gpu", "")},
        versions={"vllm": meta.get("vllm_version", ""), "cuda": meta.get("cuda_version", "")},
        residuals={kind: asdict(getattr(fit, kind)) for kind in ("decode", "prefill", "all")},
    )
    save_profile(profile, out)


if __name__ == "__main__":
    main(*sys.argv[1:5])
