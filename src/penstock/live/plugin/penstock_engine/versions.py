"""Which vLLM versions the plugin works in, and a check that everything it uses there exists.

The check needs no engine: a method is looked up on its class, an instance attribute among the names that the class's
``__init__`` stores. So an engine learns at its start what would otherwise fail under a request.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

TESTED = ("0.32",)  # with real engines
READ = ("0.33",)  # against the source
ANYWAY = "PENSTOCK_ANY_VLLM"
"""Environment variable: "1" lets the check alone decide about versions that are in neither list."""

_NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl."
_WRAPPER = "vllm.v1.worker.worker_base:WorkerWrapperBase"

NEEDED: Mapping[str, tuple[str, ...]] = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1": (
        "bind_kv_cache_manager",
        "build_connector_worker_meta",
        "has_pending_push_work",
        "on_new_request",
        "get_transfer_results",
        "update_connector_output",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorWorkerMetadata": ("aggregate",),
    _NIXL + "connector:NixlPullConnector": (
        "build_connector_meta",
        "request_finished_all_groups",
        "start_load_kv",
        "connector_scheduler",
        "connector_worker",
    ),
    _NIXL + "pull_scheduler:NixlPullConnectorScheduler": (
        "get_num_new_matched_tokens",
        "request_finished",
        "side_channel_host",
        "block_size",
        "use_host_buffer",
        "_reqs_in_batch",
        "_reqs_not_processed",
        "_reqs_need_send",
    ),
    _NIXL + "pull_worker:NixlPullConnectorWorker": (
        "_reqs_to_process",
        "_reqs_to_send",
        "consumer_notification_counts_by_req",
        "expected_consumer_notifications_by_req",
    ),
    "vllm.v1.request:Request": (
        "request_id",
        "status",
        "max_tokens",
        "kv_transfer_params",
        "num_prompt_tokens",
        "num_output_tokens",
        "num_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_preemptions",
        "use_structured_output",
        "resumable",
        "mm_features",
        "prompt_embeds",
        "sampling_params",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ("get_blocks", "block_pool"),
    "vllm.v1.core.block_pool:BlockPool": ("touch", "free_blocks", "get_num_free_blocks", "num_gpu_blocks"),
    "vllm.v1.core.sched.output:SchedulerOutput": ("num_scheduled_tokens", "preempted_req_ids"),
}
"""Class to attributes that connector and scheduler side use."""

NEEDED_BY_HEAD: Mapping[str, tuple[str, ...]] = {_WRAPPER: ("init_worker",)}
"""The same for the predictor; what it needs of the model runner is looked for when that exists (`tap.py`)."""


def refusal(version: str, any_version: bool = False, find: Callable[[str], Any] | None = None) -> str | None:
    """Why the plugin must stay off in this vLLM, as one line with a remedy; ``None`` if it works.

    Parameters
    ----------
    version : str
        vLLM's own, for instance "0.32.0+cpu".
    any_version : bool
        Whether a version that nobody has looked at may pass if nothing is missing.
    find : callable, optional
        Turns "module:class" into the class, raising ImportError or AttributeError; vLLM's own by default.
    """
    if not any_version and not version.startswith(tuple(f"{known}." for known in TESTED + READ)):
        known = ", ".join(f"{name}.x" for name in TESTED + READ)
        return f"vLLM {version} is none of {known}: run one of these, or set {ANYWAY}=1 to go by a check of its parts"
    if absent := missing(NEEDED, find or _find):
        return f"vLLM {version} lacks {', '.join(absent)}: run a version of {', '.join(TESTED)}.x"
    return None


def missing(needed: Mapping[str, Iterable[str]], find: Callable[[str], Any] | None = None) -> list[str]:
    """What of ``needed`` does not exist, as "Class" or "Class.attribute"."""
    absent: list[str] = []
    for path, names in needed.items():
        label = path.rpartition(":")[2]
        try:
            owner = (find or _find)(path)
        except (ImportError, AttributeError):
            absent.append(label)
            continue
        there = _attributes(owner)
        absent += [f"{label}.{name}" for name in names if name not in there]
    return absent


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _attributes(owner: type) -> set[str]:
    names = set(dir(owner))
    for base in owner.__mro__:
        names |= set(getattr(base, "__annotations__", ()))  # fields of dataclasses and structs
        code = getattr(base.__dict__.get("__init__"), "__code__", None)
        if isinstance(code, CodeType):
            names |= set(code.co_names)
    return names
