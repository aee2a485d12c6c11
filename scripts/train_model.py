"""Train the bundled model on the problems of ``penstock.workload.problems``; a few hours on two cores.

    PYTHONPATH=src .venv-engine/bin/python scripts/train_model.py --out build/model --hours 2
    PYTHONPATH=src .venv-engine/bin/python scripts/train_model.py --out build/model --resume --hours 1

Needs torch and transformers (the environment of ``make engine-cpu`` has them). A Qwen3 of 2.9 million parameters reads
whole solutions, short ones first: every step of a solution follows from a few characters before it, so what is learnt
on short ones holds for long ones once they have been seen. Reading the prompt happens once in a solution, so many are
cut off after a few characters, which makes it a larger share of what is learnt. The loss counts solutions only, and
what comes between numbers more than the rest: it says whether a search is over.
A checkpoint is written every five minutes; ``scripts/ship_model.py`` makes the package's files of the last one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from penstock.workload.problems import FAMILIES, Problem, draw

END, USER, TURN = 256, 257, 258  # <|endoftext|>, <|im_start|>, <|im_end|>
VOCABULARY = 259
SAVE_S = 300.0
CHAT_SHARE = 0.3
"""Share of the prompts in the chat template."""
WEIGHTS = {ord(","): 4.0, ord(";"): 6.0, TURN: 8.0}
"""Weight of what comes between numbers and at the end, where any other character counts 1."""
CUT = (4, 40)
"""Characters of a solution that is cut off."""


@dataclass
class Diet:
    """Documents of up to ``longest`` tokens, a share of them cut off after a few characters of the solution."""

    longest: int
    cut_share: float


def config() -> Qwen3Config:
    """The network's shape."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=TURN,
        pad_token_id=END,
    )


def prompt_ids(problem: Problem, chat: bool) -> list[int]:
    """The prompt as it reaches the engine, by ``/v1/completions`` or through the chat template."""
    if not chat:
        return list(problem.prompt.encode())
    question = problem.prompt.rstrip("\n").encode()
    return [USER, *b"user\n", *question, TURN, *b"\n", USER, *b"assistant\n"]


def document(problem: Problem, chat: bool) -> tuple[list[int], int]:
    """Ids of prompt and solution, and where the solution begins."""
    prompt = prompt_ids(problem, chat)
    return [*prompt, *problem.solution.encode(), TURN], len(prompt)


def batches(source: random.Random, tokens: int, diet: Diet) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, ``int64[n, length]`` each of about ``tokens``; the diet may change meanwhile.

    Documents of like length are padded to the same one; -100 marks the targets that do not count.
    """
    names = tuple(FAMILIES)
    while True:
        pool: list[tuple[list[int], int]] = []
        held = 0
        while held < 24 * tokens:
            problem = draw(source, source.choice(names))
            ids, begin = document(problem, source.random() < CHAT_SHARE)
            if source.random() < diet.cut_share:
                ids = ids[: begin + source.randint(*CUT)]
            if len(ids) <= diet.longest:
                pool.append((ids, begin))
                held += len(ids)
        pool.sort(key=lambda entry: len(entry[0]))
        groups: list[list[tuple[list[int], int]]] = [[]]
        for entry in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(entry[0]) > tokens:
                groups.append([])
            groups[-1].append(entry)
        source.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group) - 1
            x = torch.full((len(group), length), END)
            y = torch.full((len(group), length), -100)
            for row, (ids, begin) in enumerate(group):
                x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                y[row, begin - 1 : len(ids) - 1] = torch.tensor(ids[begin:])
            yield x, y


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings and norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    muon = torch.optim.Muon(inside, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def train(arguments: argparse.Namespace) -> None:
    """Train until the time is over; the rate falls to nothing over the last third."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # sharp attention is full of numbers too small to matter, and slow to compute with
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    model = Qwen3ForCausalLM(config())
    if arguments.resume:
        model.load_state_dict(torch.load(out / "last.pt"))
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    run = torch.compile(model.model, dynamic=True) if arguments.compile else model.model
    opts = optimizers(model, arguments.rate)
    # 510 tokens at first: the rules. Then all: attention over thousands of tokens.
    diet = Diet(arguments.first_length, 0.5)
    source = random.Random(arguments.seed + time.time_ns() % 1000 if arguments.resume else arguments.seed)
    stream = batches(source, arguments.tokens, diet)
    began, saved, seen, step = time.monotonic(), time.monotonic(), 0, 0
    total_s = arguments.hours * 3600
    recent: list[float] = []
    weights = torch.ones(VOCABULARY)
    for token, weight_of_it in WEIGHTS.items():
        weights[token] = weight_of_it
    while True:
        past = (time.monotonic() - began) / total_s
        if past >= 1.0:
            break
        if past >= arguments.short_share:
            diet.longest, diet.cut_share = 4096, 0.3
        x, y = next(stream)
        scale = min(1.0, (step + 1) / 100, 3.0 * (1.0 - past) + 0.01)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = arguments.rate * scale
        with torch.autocast("cpu", torch.bfloat16):
            hidden = run(input_ids=x, use_cache=False).last_hidden_state
            counted = y >= 0
            logits = model.lm_head(hidden[counted])
        weight = weights[y[counted]]
        losses = torch.nn.functional.cross_entropy(logits.float(), y[counted], reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += x.numel()
        step += 1
        recent.append(loss.item())
        if step % arguments.every == 0:
            spent = time.monotonic() - began
            mean = sum(recent) / len(recent)
            print(
                f"{spent:7.0f} s  step {step:6d}  {seen / 1e6:7.2f} M tokens  {seen / spent:6.0f}/s  loss {mean:.5f}",
                flush=True,
            )
            recent = []
        if time.monotonic() - saved > SAVE_S:
            torch.save(model.state_dict(), out / "last.pt")
            saved = time.monotonic()
    torch.save(model.state_dict(), out / "last.pt")
    print(json.dumps({"steps": step, "tokens": seen, "seconds": time.monotonic() - began}))


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/model")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--short-share", type=float, default=0.5, help="share of the time on short solutions only")
    parser.add_argument("--first-length", type=int, default=400, help="what counts as short, in tokens")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
