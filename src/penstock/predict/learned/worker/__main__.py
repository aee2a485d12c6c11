"""One task from stdin; says on stdout how it goes. Started by :mod:`penstock.predict.learned.run`."""

from __future__ import annotations

import os
import sys

import msgspec

from penstock.core.errors import PenstockError
from penstock.predict.learned.tasks import Collect, Done, Failed, Progress, Said, Task


def main() -> None:
    """Do it; exit code 2 if the user must mend something."""
    # Libraries that print must not disturb the protocol.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(said: Said) -> None:
        out.write(msgspec.json.encode(said) + b"\n")

    try:
        notes = _do(msgspec.json.decode(sys.stdin.buffer.read(), type=Task), say)
    except PenstockError as error:
        say(Failed(error.problem, error.remedy))
        raise SystemExit(2) from None
    say(Done(notes))


def _do(task: Task, say: object) -> list[str]:
    import torch

    if task.threads:
        torch.set_num_threads(task.threads)

    def tell(what: str, done: int, total: int) -> None:
        assert callable(say)
        say(Progress(what, done, total))

    if isinstance(task, Collect):
        from penstock.predict.learned.worker.collect import collect

        return collect(task, tell)
    from penstock.predict.learned.worker.train import train

    return train(task, tell)


if __name__ == "__main__":
    main()
