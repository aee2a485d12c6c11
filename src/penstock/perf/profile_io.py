"""Step-model profiles as JSON files: coefficients or tables, their units, residuals, machine, versions and date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from penstock.core.errors import PenstockError
from penstock.perf.fitted import COEFFICIENT_UNITS, FittedStepModel
from penstock.perf.lookup import unknown_name
from penstock.perf.operators import AttentionTable, OperatorStepModel
from penstock.perf.step import LinearStepModel, StepModel

SCHEMA = "penstock.profile/1"
_LINEAR = ("base_s", "per_decode_s", "per_context_s", "per_prefill_s", "per_pair_s")
_OPERATOR = ("layers", "dense_s", "once_s", "rows_s", "moe_layers", "experts_s", "pad", "overhead_s", "eager_gap_s")
_TABLE = (
    "n_axis",
    "kv_axis",
    "decode_s",
    "chunk_axis",
    "past_axis",
    "prefill_s",
    "mixed_n_axis",
    "mixed_s",
    "skew_pure",
    "skew_mixed",
)


@dataclass(frozen=True)
class Profile:
    """A step model with what a reader must know to trust it.

    ``machine`` and ``versions`` are free key-value pairs (GPU, driver; engine, torch), ``date`` is ISO, ``residuals``
    maps a kind of step to error statistics (relative, 0.01 = 1 %), ``source`` says where the measurements are from.
    """

    model: StepModel
    name: str = ""
    source: str = ""
    date: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    residuals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write ``profile`` as JSON (UTF-8, about 1 KiB fitted, 200 KiB as operator tables). Overwrites.

    Raises :class:`PenstockError` for a step model that has no file form (a roofline needs none: it is its two
    catalogue entries).
    """
    kind, body, units = _encode(profile.model)
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "name": profile.name,
        "source": profile.source,
        "date": profile.date,
        "machine": dict(profile.machine),
        "versions": dict(profile.versions),
        "residuals": {key: dict(value) for key, value in profile.residuals.items()},
        "units": units,
        kind: body,
    }
    indent = None if kind == "operators" else 1
    Path(path).write_text(json.dumps(content, indent=indent) + "\n")


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile in a JSON file, or the one shipped with the package under that name (``rtx-4090/llama-3.1-8b``).

    Raises :class:`PenstockError` naming the file and what is wrong with it, or close matches of an unknown name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _decode(path.read_text(), str(path))
    name = str(name_or_path).lower()
    if name not in builtin_profiles():
        raise unknown_name("profile", str(name_or_path), builtin_profiles(), "or give the path of a profile JSON")
    return _decode((_folder() / (name.replace("/", "--") + ".json")).read_text(), name)


def builtin_profiles() -> list[str]:
    """Names of the profiles shipped with the package: ``hardware/model`` or ``hardware/model/tpN``, sorted."""
    return sorted(p.name[:-5].replace("--", "/") for p in _folder().iterdir() if p.name.endswith(".json"))


def _folder() -> Any:
    return files("penstock.perf").joinpath("profiles")


def _encode(model: StepModel) -> tuple[str, dict[str, Any], dict[str, str]]:
    if isinstance(model, FittedStepModel):
        return "fitted", dict(model.coefficients), COEFFICIENT_UNITS
    if isinstance(model, LinearStepModel):
        return "linear", {key: getattr(model, key) for key in _LINEAR}, dict.fromkeys(_LINEAR, "s")
    if isinstance(model, OperatorStepModel):
        body = {key: getattr(model, key) for key in _OPERATOR}
        body["attention"] = {key: getattr(model.attention, key) for key in _TABLE}
        units = {"*_s": "s", "*_axis": "tokens or sequences", "pad": "tokens", "skew_*": "1"}
        return "operators", body, units
    raise PenstockError(f"a {type(model).__name__} has no profile file", "save a fitted or an operator model")


def _decode(text: str, where: str) -> Profile:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PenstockError(f"{where}:{error.lineno}: not JSON ({error.msg})", "give a profile JSON") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise PenstockError(f"{where}: schema is {found!r}, not {SCHEMA!r}", "write it anew with save_profile")
    kind = content.get("kind")
    try:
        body = content[kind]
        if kind == "fitted":
            unknown = [key for key in body if key not in COEFFICIENT_UNITS]
            if unknown:
                raise unknown_name("coefficient", unknown[0], list(COEFFICIENT_UNITS), f"in {where}")
            model: StepModel = FittedStepModel(body)
        elif kind == "linear":
            model = LinearStepModel(**{key: float(body[key]) for key in _LINEAR})
        elif kind == "operators":
            table = AttentionTable(**{key: body["attention"][key] for key in _TABLE})
            model = OperatorStepModel(attention=table, **{key: body[key] for key in _OPERATOR})
        else:
            raise PenstockError(f"{where}: unknown kind {kind!r}", "known are fitted, linear and operators")
    except (KeyError, TypeError, ValueError) as error:
        raise PenstockError(f"{where}: the {kind} profile lacks or garbles {error}", "write it anew") from error
    return Profile(
        model=model,
        name=str(content.get("name", "")),
        source=str(content.get("source", "")),
        date=str(content.get("date", "")),
        machine=content.get("machine", {}),
        versions=content.get("versions", {}),
        residuals=content.get("residuals", {}),
    )
