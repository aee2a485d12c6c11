"""Hidden states along a model's own outputs.

An output that can be guessed needs no decoding: one pass over prompt and guess gives the model's first choice after
every token, and if that is the guess everywhere, the guess *is* the greedy output. Where they part, decoding goes on
from there, and another pass gives the states.
"""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from penstock.core.errors import PenstockError
from penstock.live.plugin.penstock_engine.fingerprint import fingerprint
from penstock.predict.learned.samples import About, Samples, positions, save_samples, split
from penstock.predict.learned.tasks import Collect, Tell
from penstock.predict.learned.worker.decode import decode
from penstock.predict.learned.worker.model import Model, best_and_entropy, load
from penstock.predict.learned.worker.prompts import Ask, puzzles, read_prompts

_TOKENS_AT_ONCE = 8192


class Seen(NamedTuple):
    """One request's samples. ``hidden`` float16[k, d] and ``entropy`` float32[k] at ``generated``; ``pooled``
    float16[d] over the prompt.
    """

    output: list[int]
    generated: list[int]
    hidden: Any
    entropy: Any
    pooled: Any


def collect(task: Collect, tell: Tell) -> list[str]:
    """Do it, and write ``samples.npz``; returns what the user should know.

    Raises
    ------
    PenstockError
        The model or the prompts cannot be read, or no output ended.
    """
    try:
        mark = fingerprint(task.model)
    except ValueError as error:
        raise PenstockError(str(error), "give --model a folder in the Hugging Face layout") from None
    model = load(task.model)
    end = min(model.ends)
    if task.prompts is None:
        asks = puzzles(model.tokenizer, end, task.requests, task.seed, task.chat_share)
    else:
        asks = read_prompts(task.prompts, model.tokenizer, task.requests)
    seen, verified = observe(model, asks, task, tell)
    kept = [i for i, s in enumerate(seen) if s is not None]
    if not kept:
        raise PenstockError(
            f"none of {len(asks)} outputs ended within {task.longest} tokens", "raise --longest, or train the model"
        )
    about = About(
        model=mark,
        name=task.model.rstrip("/").rpartition("/")[2],
        every=task.every,
        seed=task.seed,
        temperature=task.temperature,
        longest=task.longest,
        requests=len(kept),
        verified=verified,
        cut=len(asks) - len(kept),
    )
    samples = _packed(about, [asks[i] for i in kept], [s for s in seen if s is not None])
    save_samples(task.out, samples)
    notes = [f"{len(kept):,} requests, {len(samples.request):,} samples, {verified:,} outputs needed no decoding"]
    if about.cut:
        notes.append(f"{about.cut:,} outputs did not end within {task.longest:,} tokens and were left out")
    return notes


def observe(model: Model, asks: list[Ask], task: Collect, tell: Tell) -> tuple[list[Seen | None], int]:
    """Outputs and samples of all requests (None where the output did not end), and how many guesses were right."""
    found: list[Seen | None] = [None] * len(asks)
    known: dict[int, list[int]] = {}
    guessed = [i for i, ask in enumerate(asks) if task.temperature == 0 and _may_be(ask.guess, model, task)]
    total = len(asks)
    verified = 0
    for group in _groups(guessed, lambda i: len(asks[i].ids) + len(asks[i].guess)):
        for i, agreed, seen in _pass(model, group, asks, [asks[i].guess for i in group], task):
            if agreed == len(asks[i].guess):
                found[i] = seen
                verified += 1
            else:
                known[i] = asks[i].guess[:agreed]
        tell("reading outputs", verified + len(known), total)
    todo = [i for i in range(total) if found[i] is None]
    begun = [asks[i].ids + known.get(i, []) for i in todo]
    most = [task.longest - len(known.get(i, [])) for i in todo]
    said = decode(model, begun, most, task.temperature, task.seed, lambda n: tell("decoding", n, len(todo)))
    outputs = {i: known.get(i, []) + new for i, new in zip(todo, said, strict=True)}
    ended = [i for i in todo if outputs[i][-1] in model.ends]
    done = 0
    for group in _groups(ended, lambda i: len(asks[i].ids) + len(outputs[i])):
        for i, _, seen in _pass(model, group, asks, [outputs[i] for i in group], task):
            found[i] = seen
        done += len(group)
        tell("reading decoded outputs", done, len(ended))
    return found, verified


def _may_be(guess: list[int], model: Model, task: Collect) -> bool:
    """Whether it is worth checking: an output that ends, and in time."""
    return 0 < len(guess) <= task.longest and guess[-1] in model.ends


def _groups(which: list[int], size: Callable[[int], int]) -> Iterator[list[int]]:
    """Requests of like length together, about :data:`_TOKENS_AT_ONCE` tokens in a group, longest first."""
    order = sorted(which, key=size)
    while order:
        group = [order.pop()]
        longest = size(group[0])
        while order and (len(group) + 1) * longest <= _TOKENS_AT_ONCE:
            group.append(order.pop())
        yield group


def _pass(
    model: Model, group: list[int], asks: list[Ask], outputs: list[list[int]], task: Collect
) -> Iterator[tuple[int, int, Seen]]:
    """One pass: of each request its index, how many tokens of the output are the model's first choice before the first
    that is not, and what was seen.
    """
    documents = [asks[i].ids + output for i, output in zip(group, outputs, strict=True)]
    # Filled up at the right: no token sees what comes after it, so no mask is needed.
    x = torch.zeros(len(group), max(map(len, documents)), dtype=torch.long)
    for row, ids in enumerate(documents):
        x[row, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        states = model.body(input_ids=x, use_cache=False).last_hidden_state
        for row, (i, output) in enumerate(zip(group, outputs, strict=True)):
            prompt = len(asks[i].ids)
            mine = states[row, : prompt + len(output) - 1]  # the last token's state is of no use to anybody
            best, entropy = best_and_entropy(model.head, mine)
            wrong = (best[prompt - 1 :] != torch.tensor(output)).nonzero()
            agreed = int(wrong[0]) if len(wrong) else len(output)
            generated = positions(len(output), task.every, _offset(i, task))
            at = torch.tensor(generated) + prompt - 1
            weights = torch.softmax(entropy[:prompt], 0)
            pooled = (weights[:, None] * mine[:prompt]).sum(0)
            yield i, agreed, Seen(output, generated, _half(mine[at]), entropy[at].numpy(), _half(pooled))


def _offset(request: int, task: Collect) -> int:
    return int(np.random.default_rng((task.seed, request)).integers(task.every))


def _half(states: Any) -> Any:
    half = states.half()
    if not bool(torch.isfinite(half).all()):
        raise PenstockError("hidden states beyond what float16 holds (65,504)", "this model cannot be used yet")
    return half.numpy()


def _packed(about: About, asks: list[Ask], seen: list[Seen]) -> Samples:
    families = tuple(sorted({ask.family for ask in asks}))
    counts = [len(s.entropy) for s in seen]
    return Samples(
        about=about,
        families=families,
        prompt_tokens=np.array([len(ask.ids) for ask in asks], np.int32),
        output_tokens=np.array([len(s.output) for s in seen], np.int32),
        part=split([ask.key for ask in asks], about.seed),
        family=np.array([families.index(ask.family) for ask in asks], np.int32),
        pooled=np.stack([s.pooled for s in seen]),
        texts=tuple(ask.text.encode() for ask in asks),
        request=np.repeat(np.arange(len(seen), dtype=np.int32), counts),
        generated=np.array([g for s in seen for g in s.generated], np.int32),
        entropy=np.concatenate([s.entropy for s in seen]).astype(np.float32),
        hidden=np.concatenate([s.hidden for s in seen]),
    )
