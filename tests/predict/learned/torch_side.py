"""Functions that the tests call in a Python with torch, by name, with JSON in and out."""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock.predict.learned.baselines.encoder import Encoder, as_bytes
from penstock.predict.learned.head import load_head, rising
from penstock.predict.learned.samples import positions
from penstock.predict.learned.tasks import Collect
from penstock.predict.learned.worker import collect as collecting
from penstock.predict.learned.worker import encoder, losses
from penstock.predict.learned.worker.fit import train_perceptron
from penstock.predict.learned.worker.model import load
from penstock.predict.learned.worker.prompts import Ask

END, VOCABULARY = 15, 16


def make_model(folder: str) -> None:
    """A tiny Qwen3 with random weights that says all sorts of things, and ends after about 16 tokens on average."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    shape = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=1.0,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(shape).save_pretrained(folder)


def trick(folder: str, prompts: list[list[int]], longest: int) -> dict[str, Any]:
    """Outputs and states with right, half right, wrong and no guesses, beside those of transformers' own ``generate``
    and of decoding one token at a time.
    """
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    truth: list[list[int]] = []
    for ids in prompts:
        x = torch.tensor([ids])  # the mask is given, because token 0 counts here
        out = whole.generate(
            x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=longest, pad_token_id=0
        )
        truth.append(out[0, len(ids) :].tolist())
    asks = []
    for i, (ids, said) in enumerate(zip(prompts, truth, strict=True)):
        bent = [*said[: len(said) // 2], (said[len(said) // 2] + 1) % END, *said[len(said) // 2 + 1 :]]
        guess = (said, bent, [], [said[0] % END, END] if said[0] != END else [1, END])[i % 4]
        asks.append(Ask(str(i), "", "", ids, guess))
    task = Collect(folder, "", len(asks), longest=longest, every=5)
    seen, verified = collecting.observe(load(folder), asks, task, lambda *_: None)
    rows = []
    for ids, said, s in zip(prompts, truth, seen, strict=True):
        row: dict[str, Any] = {"truth": said, "output": None if s is None else s.output}
        if s is not None and s.output == said:
            with torch.no_grad():
                layers = whole(torch.tensor([ids + said]), output_hidden_states=True)
            states = layers.hidden_states[-1][0]
            at = [len(ids) - 1 + g for g in s.generated]
            row["off"] = float(np.abs(states[at].detach().numpy() - s.hidden.astype(np.float32)).max())
            row["logits_off"] = float((whole.lm_head(states[at]) - layers.logits[0, at]).abs().max().detach())
            row["generated"] = s.generated
            row["places"] = [positions(len(said), 5, offset) for offset in range(5)]
            row["entropy"] = s.entropy.tolist()
            logs = torch.log_softmax(layers.logits[0], -1)
            every_entropy = -(logs.exp() * logs).sum(-1)
            row["true_entropy"] = every_entropy[at].tolist()
            weights = torch.softmax(every_entropy[: len(ids)], 0)
            pooled = (weights[:, None] * states[: len(ids)]).sum(0).detach().numpy()
            row["pooled_off"] = float(np.abs(pooled - s.pooled.astype(np.float32)).max())
        rows.append(row)
    right = [i for i in range(len(asks)) if i % 4 == 0 and truth[i][-1] == END]
    return {"rows": rows, "verified": verified, "right": len(right)}


def quantiles_of_noise(samples: int) -> dict[str, Any]:
    """Train on y = x + e with e uniform in [0, 1 + x]: the quantiles are known. Returns prediction and truth."""
    source = np.random.default_rng(0)
    levels = (0.1, 0.5, 0.9)

    def draw(n: int) -> tuple[Any, Any]:
        x = source.uniform(0.0, 1.0, n).astype(np.float32)
        y = x + source.uniform(0.0, 1.0, n).astype(np.float32) * (1.0 + x)
        return torch.from_numpy(x[:, None]), torch.from_numpy(y)

    x, y = draw(samples)
    valid_x, valid_y = draw(samples // 4)
    mlp, done = train_perceptron(
        x, y, valid_x, valid_y, (32,), 3, losses.pinball(levels), 40, 10, 0, lambda _: None
    )  # fmt: skip
    at = np.linspace(0.1, 0.9, 9, dtype=np.float32)[:, None]
    true = at + np.array(levels) * (1.0 + at)
    raw = torch.from_numpy(mlp(at))
    with torch.no_grad():
        here = losses.rising(raw).numpy()
    return {
        "predicted": rising(mlp(at)).tolist(),
        "in_torch": here.tolist(),
        "true": true.tolist(),
        "loss": done.loss,
        "epochs": done.epochs,
    }


def loss_values() -> dict[str, float]:
    """Losses of outputs whose loss is known by hand."""
    z, y = torch.tensor([[2.0], [5.0]]), torch.tensor([3.0, 1.0])
    soft = losses.soft_bins(torch.tensor([5.0, 15.0]), 10.0)
    return {
        "median": float(losses.pinball((0.5,))(z, y)),
        "p90": float(losses.pinball((0.9,))(z, y)),
        "both": float(losses.pinball((0.5,), 2.0)(torch.log1p(z), torch.log1p(y))),
        "absolute": float(losses.absolute(z, y)),
        "soft": float(soft(torch.zeros(1, 2), torch.tensor([5.0]))),
    }


def encoders(folder: str) -> float:
    """Greatest difference between the encoder in torch and in numpy."""
    torch.manual_seed(1)
    t = encoder.initial(7, width=16, layers=2)
    with torch.no_grad():
        for tensor in t.values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    texts = [b"sort 3 1 2", b"", b"x" * 600, "ü é".encode(), b"collatz 27\n"]
    with torch.no_grad():
        there = encoder.forward(t, 4, torch.from_numpy(as_bytes(texts))).numpy()
    here = Encoder({name: tensor.detach().numpy() for name, tensor in t.items()}, 4)(texts)
    return float(np.abs(here - there).max())


def head_in_engine(folder: str, model: str) -> dict[str, Any]:
    """What the engine plugin makes of a head's files, beside what we make of them in numpy."""
    from penstock.live.plugin.penstock_engine.head import Head
    from penstock.live.plugin.penstock_engine.predictor import read_card

    ours = load_head(folder, model)
    theirs = Head(folder, read_card(folder, model), torch.device("cpu"))
    source = np.random.default_rng(5)
    hidden = source.normal(size=(50, ours.hidden_size)).astype(np.float32)
    generated = source.integers(0, 3000, 50)
    there = theirs(torch.from_numpy(hidden), torch.from_numpy(generated)).numpy()
    return {"theirs": there.tolist(), "ours": ours.remaining(hidden, generated).tolist()}


def main() -> None:
    """Call the function that the command line names."""
    torch.set_num_threads(1)  # these networks are so small that threads only wait for each other
    _, _, _, function, arguments = sys.argv
    print(json.dumps(globals()[function](*json.loads(arguments))))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[3] / "src"))
    main()
