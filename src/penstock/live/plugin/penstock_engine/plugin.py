"""Entry point of ``vllm.general_plugins``: puts the predictor on the model of each worker, once that is loaded.

vLLM calls it in all its processes, of which only workers make a worker. The connector does all the rest.
"""

# mypy: ignore-errors
# (vLLM lives in another environment)

from __future__ import annotations

import os

HEAD = "PENSTOCK_HEAD"
"""Environment variable: folder of the predictor's head. Without it there are no predictions."""


def register() -> None:
    """Called by vLLM, in one process perhaps several times."""
    folder = os.environ.get(HEAD)
    if not folder:
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, "_penstock"):
        return
    stock = WorkerWrapperBase.init_worker

    def init_worker(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        _follow(self.worker, folder)

    WorkerWrapperBase.init_worker = init_worker
    WorkerWrapperBase._penstock = True


def _follow(worker, folder: str) -> None:
    stock = worker.load_model

    def load_model(*args, **kwargs):
        result = stock(*args, **kwargs)
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        if get_tensor_model_parallel_rank() == 0 and get_pp_group().is_last_rank:
            from . import tap
            from .folder import model_folder

            tap.install(worker.model_runner, model_folder(worker.vllm_config.model_config), folder)
        return result

    worker.load_model = load_model
