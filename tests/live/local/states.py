"""Run by an engine's Python: last-layer hidden states of a model over tokens, by transformers.

Reads a JSON line [model folder, tokens] and writes the states as JSON, one list for each token.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Answer one question."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found, unused-ignore]

    folder, tokens = json.loads(sys.stdin.readline())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        print(json.dumps(model.model(torch.tensor([tokens])).last_hidden_state[0].tolist()))


if __name__ == "__main__":
    main()
