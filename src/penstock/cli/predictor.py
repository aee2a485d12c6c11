"""``penstock predictor``: train a remaining-length predictor for a model, and see how good it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import OUTPUT, JsonFile, Quiet, ReportFile

if TYPE_CHECKING:
    from rich.table import Table

    from penstock.cli.show import Show
    from penstock.predict.learned.evaluate import Evaluation
    from penstock.predict.learned.tasks import Task, Tell

app = typer.Typer(no_args_is_help=True, help="Train a remaining-length predictor on hidden states, and judge it.")

SAMPLES, TRAINING = "Samples", "Training"

Work = Annotated[str, typer.Option("--out", help="Work folder: samples, head, rivals.", metavar="FOLDER")]
Model = Annotated[
    str | None, typer.Option("--model", help="Folder in the Hugging Face layout; the bundled model.", metavar="DIR")
]
Requests = Annotated[
    int,
    typer.Option("--requests", "-n", help="70 % train, 15 % validate, 15 % test.", min=10, rich_help_panel=SAMPLES),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help='JSONL of "prompt" or "prompt_token_ids"; puzzles by default.', metavar="FILE", rich_help_panel=SAMPLES
    ),
]
Temperature = Annotated[float, typer.Option(help="Of the outputs; 0 = greedy.", min=0, rich_help_panel=SAMPLES)]
Longest = Annotated[
    int, typer.Option(help="Outputs of more tokens are left out.", min=1, metavar="TOKENS", rich_help_panel=SAMPLES)
]
Every = Annotated[
    int, typer.Option(help="Output tokens between two samples.", min=1, metavar="TOKENS", rich_help_panel=SAMPLES)
]
Seed = Annotated[int, typer.Option(help="Of prompts, split and weights.")]
Threads = Annotated[int, typer.Option(help="Of torch; 0 = its own choice.", min=0)]
Python = Annotated[
    str | None, typer.Option("--python", help="Interpreter with torch and transformers.", metavar="PATH")
]

WORK, REQUESTS, LONGEST, STRIDE = "predictor", 14_000, 4096, 20


@app.command()
def collect(
    model: Model = None,
    out: Work = WORK,
    requests: Requests = REQUESTS,
    prompts: Prompts = None,
    temperature: Temperature = 0.0,
    longest: Longest = LONGEST,
    every: Every = STRIDE,
    seed: Seed = 0,
    threads: Threads = 0,
    python: Python = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Let a model answer, and keep its hidden states and how many tokens were still to come.

    penstock predictor collect --requests 14000 --out predictor

    penstock predictor collect --model ~/models/qwen --prompts prompts.jsonl --temperature 0.7 --out predictor
    """
    from penstock.cli.show import Show
    from penstock.predict.learned.samples import FILE, load_samples
    from penstock.predict.learned.tasks import Collect

    show = Show(quiet, json)
    folder = _model_folder(model)
    task = Collect(folder, out, requests, seed, prompts, temperature, every, longest, threads=threads)
    _run(show, task, python)
    show.wrote(f"{out}/{FILE}")
    show.json(load_samples(out).about)


@app.command()
def train(
    model: Model = None,
    out: Work = WORK,
    requests: Requests = REQUESTS,
    prompts: Prompts = None,
    temperature: Temperature = 0.0,
    longest: Longest = LONGEST,
    every: Every = STRIDE,
    name: Annotated[str, typer.Option(help="Name of the head.", rich_help_panel=TRAINING)] = "remaining",
    features: Annotated[
        bool,
        typer.Option("--features", help="Tell the head the tokens generated too.", rich_help_panel=TRAINING),
    ] = False,
    rivals: Annotated[
        bool,
        typer.Option("--rivals/--no-rivals", help="Train what it is compared with too.", rich_help_panel=TRAINING),
    ] = True,
    epochs: Annotated[
        int, typer.Option(help="At most; ends early after 10 without gain.", min=1, rich_help_panel=TRAINING)
    ] = 100,
    seed: Seed = 0,
    threads: Threads = 0,
    python: Python = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Train a head, after collecting samples if the work folder has none; ends with an evaluation.

    The head is in FOLDER/head; penstock serve --predictor FOLDER/head gives it to the engines.

    penstock predictor train --out predictor

    penstock predictor train --model ~/models/qwen --prompts prompts.jsonl --no-rivals
    """
    from pathlib import Path

    from penstock.cli.show import Show
    from penstock.predict.learned.files import head_folder
    from penstock.predict.learned.samples import FILE, load_samples
    from penstock.predict.learned.tasks import Collect, Train

    show = Show(quiet, json)
    folder = _model_folder(model)
    if (Path(out) / FILE).exists():
        about = load_samples(out, _fingerprint(folder)).about
        show.note(f"{out} has samples of {about.requests:,} requests: collecting no more")
    else:
        task = Collect(folder, out, requests, seed, prompts, temperature, every, longest, threads=threads)
        _run(show, task, python)
    wish = Train(out, name, seed, features=int(features), rivals=rivals, epochs=epochs, threads=threads)
    _run(show, wish, python)
    show.wrote(str(head_folder(out)))
    found = _evaluate(show, out, None)
    show.print(_summary(found))
    show.json(found)
    show.print(f"Try: penstock predictor eval --out {out} --report predictor.html")


@app.command("eval")
def evaluate(
    out: Work = WORK,
    head: Annotated[str | None, typer.Option(help="Another head than the folder's own.", metavar="FOLDER")] = None,
    json: JsonFile = None,
    report: ReportFile = None,
    svg: Annotated[
        str | None,
        typer.Option("--svg", help="Draw the error of the longest outputs.", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare the head with its rivals on the requests that none of them was trained on.

    penstock predictor eval --out predictor --report predictor.html --json predictor.json
    """
    from pathlib import Path

    from penstock.cli.show import Show, check_writable, writing

    show = Show(quiet, json)
    check_writable(report, svg)
    found = _evaluate(show, out, head)
    show.print(
        _summary(found),
        _classes(found, "Error by tokens generated", found.generated_from, found.generated_count, "by_generated"),
        _classes(found, "Error by true remaining length", found.remaining_from, found.remaining_count, "by_remaining"),
        _coverage(found),
        _claims(found),
        f"As wrong in simulation: {_noise_flag(found)}",
    )
    if report is not None:
        from penstock.predict.learned.page import page

        with writing(report):
            Path(report).write_text(page(found), encoding="utf-8")
        show.wrote(report)
    if svg is not None:
        from penstock.predict.learned.figures import svg as picture

        with writing(svg):
            Path(svg).write_text(picture(found), encoding="utf-8")
        show.wrote(svg)
    show.json(found)


@app.command("show")
def describe(
    folder: Annotated[str, typer.Argument(help="A head, or a work folder with one.", metavar="FOLDER")] = WORK,
    model: Annotated[
        str | None, typer.Option("--model", help="Check that it belongs to this model.", metavar="DIR")
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Say what a head is: its model, its quantiles, how it was trained.

    penstock predictor show predictor --model ~/models/qwen
    """
    from pathlib import Path

    from rich import box
    from rich.table import Table

    from penstock.cli.show import Show
    from penstock.predict.learned.files import head_folder
    from penstock.predict.learned.head import ABOUT_FILE, load_head

    show = Show(quiet, json)
    place = folder if (Path(folder) / ABOUT_FILE).exists() else str(head_folder(folder))
    head = load_head(place, None if model is None else _fingerprint(model))
    sizes = " → ".join(str(n) for n in (head.mlp.mean.size, *(b.size for b in head.mlp.biases)))
    facts: dict[str, Any] = {
        "name": head.name,
        "model": head.model,
        "layers": sizes,
        "parameters": head.parameters,
        "quantiles": list(head.quantiles),
        "every": head.every,
        "features": head.features,
        **head.trained,
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for key, value in facts.items():
        words = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), words)
    show.print(table)
    show.json(facts)


def _model_folder(model: str | None) -> str:
    if model is not None:
        return model
    from penstock.live.local.model import bundled_model

    return str(bundled_model())


def _fingerprint(folder: str) -> str:
    from penstock.core.errors import PenstockError
    from penstock.live.plugin.penstock_engine.fingerprint import fingerprint

    try:
        return fingerprint(folder)
    except ValueError as error:
        raise PenstockError(str(error), "give --model a folder in the Hugging Face layout") from None


def _run(show: Show, task: Task, python: str | None) -> None:
    from penstock.predict.learned.run import run_task

    with _telling(show) as tell:
        notes = run_task(task, tell, python)
    for note in notes:
        show.note(note)


@contextmanager
def _telling(show: Show) -> Iterator[Tell]:
    """A function that shows the progress of one part after the other, a bar each."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        bar: Any = None
        shown = ""

        def tell(what: str, done: int, total: int) -> None:
            nonlocal bar, shown
            if what != shown:
                stack.pop_all().close()
                bar, shown = stack.enter_context(show.bar(what, total)), what
            bar(done)

        yield tell


def _evaluate(show: Show, work: str, folder: str | None) -> Evaluation:
    import os

    # Predictions are timed, and one thread is what an engine can spare; it counts if numpy is not loaded yet.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from penstock.predict.learned.evaluate import evaluate
    from penstock.predict.learned.files import head_folder
    from penstock.predict.learned.head import load_head
    from penstock.predict.learned.methods import all_methods
    from penstock.predict.learned.samples import load_samples

    samples = load_samples(work)
    head = load_head(head_folder(work) if folder is None else folder, samples.about.model)
    methods = all_methods(work, head, samples)
    with show.bar("evaluating", len(methods)) as bar:
        return evaluate(samples, head, methods, lambda done, _: bar(done))


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _summary(e: Evaluation) -> Table:
    table = _table(
        f"{e.requests:,} held-out requests, {e.predictions:,} predictions; errors in tokens",
        ("Predictor", "MAE", "95 % interval", "first", "by request", "parameters", "µs alone", "µs of 32", "reads"),
    )
    for s in e.scores:
        table.add_row(
            s.name,
            f"{s.mae.value:,.1f}",
            f"{s.mae.low:,.1f} to {s.mae.high:,.1f}",
            f"{s.first:,.1f}",
            f"{s.by_request:,.1f}",
            f"{s.parameters:,}",
            f"{s.us_1:,.1f}",
            f"{s.us_32:,.2f}",
            s.reads,
        )
    return table


def _classes(e: Evaluation, title: str, begins: list[int], counts: list[int], field: str) -> Table:
    table = _table(title, ("from", *(f"{begin:,}" for begin in begins)))
    for s in e.scores:
        values: list[float | None] = getattr(s, field)
        table.add_row(s.name, *("" if value is None else f"{value:,.1f}" for value in values))
    table.add_section()
    table.add_row("predictions", *(f"{count:,}" for count in counts))
    return table


def _coverage(e: Evaluation) -> Table:
    columns = ("quantile", "all", "first", *(f"from {begin:,}" for begin in e.generated_from))
    table = _table("Coverage: true values at or below the head's quantiles, all and by tokens generated", columns)
    for c in e.coverage:
        shares = (c.share, c.first, *c.by_generated)
        table.add_row(f"{c.level:g}", *("" if share is None else f"{share:.1%}" for share in shares))
    return table


def _noise_flag(e: Evaluation) -> str:
    return f"--predictor noisy:{e.noise.sigma_first:.3g},{e.noise.halving_tokens:.3g}"


def _claims(e: Evaluation) -> Table:
    table = _table("Beside the paper (STAR/ARES)", ("", "there", "here"))
    for claim in e.claims:
        table.add_row(claim.what, claim.paper, claim.here)
    return table
