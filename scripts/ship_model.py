"""Check a trained checkpoint on fresh problems, and write the package's model folder from it.

    PYTHONPATH=src .venv-engine/bin/python scripts/ship_model.py --checkpoint build/model/last.pt --problems 3000
    PYTHONPATH=src .venv-engine/bin/python scripts/ship_model.py --checkpoint build/model/last.pt --problems 3000 --ship

Weights are rounded to bfloat16 first: what is checked is what is shipped. A solution counts as right if every one of
its tokens, the end of text included, is the network's first choice given the ones before it; then, and only then,
greedy decoding writes exactly that solution.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from penstock.live.local.bytetokens import tokenizer, tokenizer_config
from penstock.workload.problems import FAMILIES, Problem, draw
from train_model import END, config, document

HOME = Path(__file__).resolve().parents[1] / "src/penstock/live/local/penstock-tiny"
EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def right(model: Qwen3ForCausalLM, problems: list[Problem], chat: bool, tokens: int = 16384) -> list[int]:
    """Index of the first wrong token of each solution; -1 where there is none."""
    documents = [document(problem, chat) for problem in problems]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i][0]))
    found = [-1] * len(documents)
    while order:
        group = [order.pop()]
        length = len(documents[group[0]][0])
        while order and (len(group) + 1) * length <= tokens:
            group.append(order.pop())
        x = torch.full((len(group), length), END)
        for row, index in enumerate(group):
            ids = documents[index][0]
            x[row, : len(ids)] = torch.tensor(ids)
        with torch.no_grad():
            best = model(input_ids=x, use_cache=False).logits.argmax(-1)
        for row, index in enumerate(group):
            ids, begin = documents[index]
            same = best[row, begin - 1 : len(ids) - 1] == x[row, begin : len(ids)]
            wrong = (~same).nonzero()
            found[index] = int(wrong[0]) if len(wrong) else -1
    return found


def card(rows: list[dict[str, object]], lengths: dict[str, list[int]], problems: int) -> str:
    """The model card."""
    count = sum(p.numel() for p in Qwen3ForCausalLM(config()).parameters())
    shape = config()
    lines = [
        "# penstock-tiny",
        "",
        "A small reasoning model for trying and testing Penstock on any machine: it writes out the solution of a",
        "puzzle and stops by itself. How long that takes cannot be read off the prompt, and has a heavy tail.",
        "",
        f"Qwen3 architecture, {shape.num_hidden_layers} layers, width {shape.hidden_size}, {count:,} parameters in",
        "bfloat16, one token a byte. Trained from scratch by `scripts/train_model.py` on problems that",
        "`penstock.workload.problems` makes up; licence Apache-2.0, like everything here. It knows nothing else: what",
        "it answers to other prompts means nothing.",
        "",
        f"Greedy answers to {problems:,} problems that it has not seen (`scripts/ship_model.py`); right means that",
        "every token of the whole written solution is:",
        "",
        "| family | right | right in the chat template | output tokens P50 | P90 | P99 | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spots = " | ".join(str(row[name]) for name in ("p50", "p90", "p99", "max"))
        lines.append(f"| {row['family']} | {row['plain']:.1%} | {row['chat']:.1%} | {spots} |")
    lines += ["", "| output tokens | " + " | ".join(lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for low, high in itertools.pairwise(EDGES):
        cells = [sum(low < n <= high for n in values) for values in lengths.values()]
        lines.append(f"| {low + 1} to {high} | " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", "Examples (a prompt ends with a line break; the chat template takes it without):", "", "```"]
    source = random.Random(5)
    for family in FAMILIES:
        problem = min((draw(source, family) for _ in range(30)), key=lambda p: abs(p.output_tokens - 60))
        lines += [problem.prompt.rstrip("\n"), "  → " + problem.solution]
    return "\n".join([*lines, "```", ""])


def main() -> None:
    """Check, print, and ship if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="build/model/last.pt")
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=10**6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ship", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # sharp attention is full of numbers too small to matter, and slow to compute with
    model = Qwen3ForCausalLM(config())
    weights = torch.load(arguments.checkpoint)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    model.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    model.eval()
    source = random.Random(arguments.seed)
    problems = [draw(source) for _ in range(arguments.problems)]
    wrong = {kind: right(model, problems, chat) for kind, chat in (("plain", False), ("chat", True))}
    lengths: dict[str, list[int]] = defaultdict(list)
    rows: list[dict[str, object]] = []
    for family in [*FAMILIES, "all"]:
        which = [i for i, p in enumerate(problems) if family in ("all", p.family)]
        sizes = sorted(problems[i].output_tokens for i in which)
        lengths[family] = sizes
        share = {kind: sum(wrong[kind][i] < 0 for i in which) / len(which) for kind in wrong}
        spots = {
            name: sizes[int(f * (len(sizes) - 1))]
            for name, f in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        }
        rows.append({"family": family, **share, **spots})
        early = sorted(wrong["plain"][i] for i in which if wrong["plain"][i] >= 0)
        print(rows[-1], "first errors at", early[:: max(1, len(early) // 8)])
    if arguments.ship:
        HOME.mkdir(exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(HOME)
        (HOME / "generation_config.json").unlink(missing_ok=True)
        about = json.loads((HOME / "config.json").read_text())
        del about["transformers_version"]
        about |= {"rope_theta": about["rope_parameters"]["rope_theta"], "torch_dtype": "bfloat16"}  # for older readers
        for name, content in (
            ("config.json", about),
            ("tokenizer.json", tokenizer()),
            ("tokenizer_config.json", tokenizer_config()),
        ):
            (HOME / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (HOME / "README.md").write_text(card(rows, lengths, len(problems)), encoding="utf-8")
        size = (HOME / "model.safetensors").stat().st_size
        print(f"{HOME}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
