"""Bad input gets one line that says what to change, exit code 2 and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.support import SMALL, penstock

CASES = {
    "simulate --policy lest-kv": "no policy is called 'lest-kv': did you mean least-kv?",
    "simulate --rate -1": "rate -1 requests/s is not positive: give --rate above 0",
    "simulate --rate nan": "rate nan requests/s is not positive",
    "simulate --requests 0": "0 requests: give --requests of 1 or more",
    "simulate --tpot 1ms": "cannot be met: one decode step of llama-3.1-8b on a100-80g takes at least",
    "simulate --ttft 1ms": "TTFT SLO 1.00 ms cannot be met: prefill of the shortest prompt",
    "goodput --tpot 1ms": "(memory bandwidth binds): raise --tpot to ≥",
    "compare --tpot 1ms": "cannot be met",
    "simulate --tpot 0": "is no target",
    "simulate --ttft soon": "is not a time",
    "simulate --model llama-3.1-70b": "GiB of weights",
    "simulate --model lama-3.1-8b": "did you mean llama-3.1-8b",
    "simulate --hardware h1000": "unknown hardware 'h1000': did you mean h100",
    "simulate --trace /dev/null": "is empty: give a trace with rows",
    "simulate --trace /nowhere.csv": "/nowhere.csv does not exist",
    "simulate --synthetic nope": 'workload "nope" is unknown: give azure-conv',
    "simulate --policy least-kv --set horizon=3": "unknown option 'horizon'",
    "simulate --policy ares --set horizn=3": "did you mean horizon",
    "simulate --policy ares --set horizon=far": "is not a number",
    "simulate --policy ares --set xllm.a=3": "is for a policy that does not run",
    "simulate --policy ares --set horizon": "write option=value",
    "simulate --fault boom": "write down:3@120s",
    "simulate --fault slow:1@3s": "needs a factor",
    "simulate --fault down:9@3s": "a fault names instance 9, but there are 4",
    "simulate --policy least-kv --prefill 0": "needs prefill and decode instances, not 0 and 2",
    "simulate --prefill -1": "a number of instances is negative",
    "simulate --prefill 0 --decode 0": "the cluster has no instance",
    "simulate --tp 3": "does not divide 32 attention heads",
    "simulate --max-num-seqs 9999": "must be between 1 and max_num_batched_tokens",
    "simulate --memory-utilization 3": "is not in (0, 1]",
    "simulate --kv-blocks 0": "0 KV blocks",
    "simulate --link-bandwidth 0": "link bandwidth is not positive",
    "simulate --link foo": "unknown link 'foo'",
    "simulate --migration-level fly": "unknown migration level 'fly'",
    "simulate --profile nope": "unknown profile 'nope'",
    "simulate --profile rtx-4090/llama-3.1-8b --decode-tp 2": "describes one kind of instance",
    "simulate --belief-error 0": "belief error 0 is not positive",
    "simulate --noise -1": "noise -1 is out of range",
    "simulate --predictor bad": "unknown predictor 'bad'",
    "simulate --slo chat=1s/1s": "unknown SLO class 'chat'",
    "simulate --slo chat": "write CLASS=TTFT/TPOT",
    "simulate --class chat=lots": "write CLASS=SHARE",
    "simulate --cv -1": "coefficient of variation -1",
    "simulate --seed -1": "seed -1 is negative",
    "simulate --repeat 0": "0 repetitions",
    "simulate --class chat=0.8 --class batch=0.8": "the shares of the classes add up to 1.6",
    "simulate --csv -": "only --json can write to stdout (-): give a path",
    "simulate --report /nowhere/a.html": "cannot write /nowhere/a.html (there is no folder /nowhere)",
    "compare --json /": "cannot write / (it is a folder)",
    "goodput --ttft none --tpot none": "without a target every rate meets the SLO",
    "simulate --duration 0s": "the slice of time is empty",
    "simulate --json /nowhere/x.json": "cannot write /nowhere/x.json",
    "simulate --record /nowhere/x.jsonl": "cannot write /nowhere/x.jsonl",
    "simulate --report /nowhere/x.html": "cannot write /nowhere/x.html",
    "simulate --csv /nowhere/x.csv": "cannot write /nowhere/x.csv",
    "compare --policies least-kv,nope": "no policy is called 'nope'",
    "compare --policies ,": "no policy in ','",
    "compare --rates 4,x": "rate 'x' is not a positive number",
    "goodput --goal 2": "attainment goal 2 is not in (0, 1]",
    "goodput --tolerance 0": "tolerance 0 is not positive",
    "replay /nowhere.jsonl": "cannot read /nowhere.jsonl",
    "trace describe /nowhere.csv": "/nowhere.csv does not exist",
    "trace make nope /tmp/x.jsonl": 'workload "nope" is unknown',
    "trace make 512/128 /nowhere/x.jsonl -n 3": "cannot write /nowhere/x.jsonl",
}


@pytest.mark.parametrize("command", CASES)
def test_one_line_says_what_to_change(command: str) -> None:
    args = command.split()
    small = SMALL if args[0] == "simulate" and not {"--rate", "--requests"} & set(args) else ()
    result = penstock(*args, *small, *(("--quiet",) if args[0] != "trace" else ()))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("penstock: "), result.stderr
    assert CASES[command] in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("args", [("simulate", "--nope"), ("nope",), ("simulate", "--rate", "fast"), ("replay",)])
def test_usage_errors_exit_with_2(args: tuple[str, ...]) -> None:
    result = penstock(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_an_empty_trace_and_a_malformed_row_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    result = penstock("simulate", "--trace", empty)
    assert result.exit_code == 2 and "empty.csv" in result.stderr and len(result.stderr.splitlines()) == 1
    bad = tmp_path / "bad.csv"
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,abc,44\n")
    result = penstock("simulate", "--trace", bad)
    assert result.exit_code == 2 and "bad.csv:2" in result.stderr


def test_interrupt_exits_with_130_and_without_traceback(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'penstock'; from penstock.cli.main import main; main()"
    log = tmp_path / "log.jsonl"
    args = [sys.executable, "-c", code, "simulate", "-n", "300000", "--rate", "18", "--stepping", "-q"]
    process = subprocess.Popen([*args, "--record", log], stderr=subprocess.PIPE, text=True)
    for _ in range(300):  # until the run itself has begun
        if log.exists() and log.stat().st_size > 100_000:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "interrupted" in said
