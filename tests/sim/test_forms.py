"""The compiled and the interpreted core are one source: they give the same figures, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys

import penstock

DIGEST = """
import hashlib, penstock
from tests.sim.support import case_of
digest = hashlib.sha256()
for seed in range(60):
    _, result = case_of(seed, 12, faults=seed % 2 == 0, hashes=seed % 3 == 0).run(stepping=False)
    for column in vars(result.requests).values():
        digest.update(column.tobytes())
print(penstock.FORM, digest.hexdigest())
"""


def digest(**environment: str) -> list[str]:
    out = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return out.stdout.split()


def test_interpreted_equals_the_form_in_use() -> None:
    form, here = digest()
    interpreted_form, interpreted = digest(PENSTOCK_INTERPRETED="1")
    assert form == penstock.FORM
    assert interpreted_form == "interpreted"
    assert here == interpreted
