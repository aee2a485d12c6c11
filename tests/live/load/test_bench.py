"""``penstock bench`` against a scripted server."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.live.http.server import Reply
from penstock.report.schema import RunMetrics

from ...cli.support import document, ok, penstock
from .scripted import Body, Scripted, answer, chunk, serving

SHAPE = ("--synthetic", "20/5", "-n", "30", "--rate", "2000", "--seed", "3")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_follow_from_the_records(tmp_path: Path) -> None:
    save = tmp_path / "r.jsonl"
    with serving() as server:
        found = document("bench", "--url", server.url, *SHAPE, "--save", save, "--report", tmp_path / "r.html")
    rows = records(save)
    assert found["schema"] == "penstock.bench/1"
    # The same object as a simulation's, with nothing in it that the schema does not know.
    run = msgspec.convert({key: found[key] for key in RunMetrics.__struct_fields__}, RunMetrics)
    assert msgspec.to_builtins(run).items() <= found.items()
    assert (found["requests"], found["finished"], found["errors"]) == (30, 30, {})
    ttft = sorted(row["first_token_s"] - row["arrival_s"] for row in rows)
    tpot = [(row["last_token_s"] - row["first_token_s"]) / 4 for row in rows]
    assert found["ttft_s"]["mean"] == pytest.approx(sum(ttft) / 30)
    assert found["ttft_s"]["max"] == pytest.approx(ttft[-1])
    assert found["ttft_s"]["p50"] == pytest.approx((ttft[14] + ttft[15]) / 2)
    assert found["tpot_s"]["mean"] == pytest.approx(sum(tpot) / 30)
    assert found["itl_s"]["count"] == 30 * 4
    assert found["itl_s"]["mean"] == pytest.approx(sum(tpot) / 30)
    assert found["itl_s"]["max"] == pytest.approx(max(row["longest_gap_s"] for row in rows))
    assert found["e2e_s"]["max"] == pytest.approx(max(row["last_token_s"] - row["arrival_s"] for row in rows))
    assert found["output_tokens_per_s"] == pytest.approx(150 / found["simulated_seconds"])
    # What only the inside can count is not made up.
    assert found["instances"] == []
    for key in ("preemptions", "migrations", "migrated_tokens", "flips", "leases_expired", "events", "resident_cv"):
        assert found[key] is None, key
    assert found["queueing_s"]["count"] == 0
    page = (tmp_path / "r.html").read_text()
    assert "measured at the client" in page
    assert "Resident tokens" not in page


def test_what_is_sent(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": t, "input_length": 20, "output_length": 3, "hash_ids": [1, 2 + t]} for t in range(2)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving() as server:
        given = ("--url", server.url, "--trace", trace, "--seed", "1", "--api-key", "k", "--send-slo", "--warmup", "0")
        ok("bench", *given, "--ttft", "250ms", "--tpot", "none", "--body", '{"top_p": 0.9}', "--quiet")
        first = [dict(body) for body in server.bodies]
        server.bodies.clear()
        ok("bench", *given, "--quiet")
        again = [body["prompt"] for body in server.bodies]
        server.bodies.clear()
        ok("bench", *given, "--fresh", "--natural-end", "--quiet")
        fresh = server.bodies
        assert all(headers["authorization"] == "Bearer k" for headers in server.headers)
    assert [len(body["prompt"]) for body in first] == [20, 20]
    assert all(32 <= token < 127 for body in first for token in body["prompt"])
    assert first[0]["prompt"] == first[1]["prompt"]  # both hashes stand for 512 tokens, of which 20 are left
    assert [body["prompt"] for body in first] == again
    assert fresh[0]["prompt"] != first[0]["prompt"]
    assert "ignore_eos" not in fresh[0]
    wanted = {"model": "toy", "max_tokens": 3, "ignore_eos": True, "stream": True, "return_token_ids": True}
    wanted |= {"stream_options": {"include_usage": True}, "top_p": 0.9, "penstock": {"slo": {"ttft_ms": 250.0}}}
    for key, value in wanted.items():
        assert first[0][key] == value, key


def test_open_loop_never_waits_for_answers() -> None:
    """The server answers nobody before everybody has asked; a client that waits for answers would never end."""
    held: list[tuple[Reply, Body]] = []

    def hold(reply: Reply, body: Body, server: Scripted) -> None:
        held.append((reply, body))
        if len(held) == 30:
            for one, its in held:
                answer(one, its, server)

    with serving(hold) as server:
        found = document("bench", "--url", server.url, *SHAPE, "--warmup", "0")
        assert server.most == 30
    assert found["finished"] == 30


def test_a_limit_closes_the_loop_and_says_so(tmp_path: Path) -> None:
    waiting: list[tuple[Reply, Body]] = []

    def in_fours(reply: Reply, body: Body, server: Scripted) -> None:
        """Answer when four wait: with fewer allowed at once this would never end."""
        waiting.append((reply, body))
        assert len(waiting) <= 4
        if len(waiting) == 4:
            for one, its in waiting:
                answer(one, its, server)
            waiting.clear()

    with serving(in_fours) as server:
        save = tmp_path / "r.jsonl"
        shape = ("--synthetic", "20/5", "-n", "32", "--rate", "100000")
        found = document("bench", "--url", server.url, *shape, "--warmup", "0", "--concurrency", "4", "--save", save)
    assert found["finished"] == 32
    assert found["client"]["held"] >= 20
    assert any("waited for a place" in note for note in found["notes"])
    for row in records(save):
        assert row["first_token_s"] >= row["sent_s"] >= row["arrival_s"]


def test_failures_are_counted_by_kind(tmp_path: Path) -> None:
    def mixed(reply: Reply, body: Body, server: Scripted) -> None:
        kind = len(server.bodies) % 6
        if kind == 0:
            reply.send(429, b'{"error": {"message": "queue is full"}}')
        elif kind == 1:
            reply.send(500, b'{"error": {"message": "boom"}}')
        elif kind == 2:
            reply.start()
            reply.write(chunk(choices=[{"text": "x", "token_ids": [1], "finish_reason": None}]))
            reply.drop()
        elif kind == 3:
            reply.start()
            reply.write(chunk(choices=[{"text": "x", "token_ids": [1], "finish_reason": None}]))
            reply.end()
        elif kind == 4:
            server.held.append((reply, body))
        else:
            answer(reply, body, server)

    save = tmp_path / "r.jsonl"
    with serving(mixed) as server:
        result = penstock(
            "bench", "--url", server.url, *SHAPE, "--warmup", "0", "--timeout", "500ms", "--json", "-", "--save", save
        )
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    counts = {kind: failure["count"] for kind, failure in found["errors"].items()}
    assert counts == {"HTTP 429": 5, "HTTP 500": 5, "connection lost": 5, "cut off": 5, "timeout": 5}
    assert found["errors"]["HTTP 429"]["example"] == "queue is full"
    assert (found["finished"], found["rejected"], found["unfinished"]) == (5, 5, 20)
    assert found["reject_reasons"] == {"HTTP 429": 5}
    assert found["attainment"] == pytest.approx(5 / 30)
    # Tokens that came before a stream broke were sent and count as output.
    assert found["output_tokens_per_s"] * found["simulated_seconds"] == pytest.approx(5 * 5 + 10)
    assert "× HTTP 500 (boom)" in result.stderr
    assert sorted(row["error"] or "" for row in records(save)).count("timeout") == 5


def test_a_server_that_takes_only_text_gets_text() -> None:
    def picky(body: Body) -> str | None:
        if isinstance(body["prompt"], list):
            return "prompt must be a string"
        return "return_token_ids is unknown" if "return_token_ids" in body else None

    with serving(refuse=picky) as server:
        found = document("bench", "--url", server.url, "--synthetic", "407/5", "-n", "10", "--rate", "1000")
        # The server counts 7 + 2 tokens a word: 407 tokens are 200 words.
        assert {len(body["prompt"].split()) for body in server.bodies} == {200}
        assert penstock("bench", "--url", server.url, "--prompt", "tokens", *SHAPE).exit_code == 2
    assert (found["server"]["prompt"], found["server"]["returns_token_ids"]) == ("text", False)
    assert found["client"]["counted"] == {"usage": 10}
    assert any("sending text" in note for note in found["notes"])
    assert any("usage" in note for note in found["notes"])


def test_what_a_server_refuses_is_said_with_a_remedy() -> None:
    with serving(refuse=lambda body: "ignore_eos is unknown" if "ignore_eos" in body else None) as server:
        refused = penstock("bench", "--url", server.url, *SHAPE)
        ok("bench", "--url", server.url, *SHAPE, "--natural-end")
    assert refused.exit_code == 2
    assert "--natural-end" in refused.stderr
    with serving(refuse=lambda body: "token id 499 is out of vocabulary") as server:
        refused = penstock("bench", "--url", server.url, *SHAPE, "--prompt", "tokens")
    assert "out of vocabulary" in refused.stderr
    assert "--vocab" in refused.stderr


def test_chat() -> None:
    def chat(reply: Reply, body: Body, server: Scripted) -> None:
        reply.start()
        for i in range(body["max_tokens"]):
            last = i == body["max_tokens"] - 1
            reply.write(chunk(choices=[{"delta": {"content": "x"}, "finish_reason": "length" if last else None}]))
        reply.write(b"data: [DONE]\n\n")
        reply.end()

    with serving(chat) as server:
        found = document("bench", "--url", server.url, "--endpoint", "chat", *SHAPE)
        assert all(body["messages"][0]["role"] == "user" for body in server.bodies)
        assert penstock("bench", "--url", server.url, "--endpoint", "chat", "--prompt", "tokens").exit_code == 2
    assert found["client"]["counted"] == {"chunks": 30}
    assert found["itl_s"]["count"] == 120


def test_requests_longer_than_the_model_are_left_out_and_said() -> None:
    models = {"data": [{"id": "other"}, {"id": "small", "max_model_len": 1000}]}
    with serving(models=models) as server:
        given = ("--url", server.url, "--model", "small", "--synthetic", "100-1500/10", "-n", "40", "--rate", "1000")
        found = document("bench", *given)
        assert 0 < found["requests"] < 40
        assert any(f"left out {40 - found['requests']} of 40" in note for note in found["notes"])
        assert max(len(body["prompt"]) for body in server.bodies) <= 990
        refused = penstock("bench", "--url", server.url, "--model", "small", "--synthetic", "2000/10", "-n", "5")
        assert refused.exit_code == 2
        assert "longer than the 1,000 tokens" in refused.stderr
        unknown = penstock("bench", "--url", server.url, "--model", "none")
        assert "it serves other, small" in unknown.stderr


def test_beside_a_simulation(tmp_path: Path) -> None:
    simulated, measured = tmp_path / "s.json", tmp_path / "m.json"
    ok("simulate", *SHAPE, "--json", simulated, "--quiet")
    with serving() as server:
        result = ok("bench", "--url", server.url, *SHAPE, "--beside", simulated, "--json", measured)
        itself = document("bench", "--url", server.url, *SHAPE, "--beside", measured)
    assert "TTFT p99" in result.stdout
    found, reference = json.loads(measured.read_text()), json.loads(simulated.read_text())
    row = {row["key"]: row for row in found["beside"]["rows"]}["tpot_s.p99"]
    assert row["measured"] == found["tpot_s"]["p99"]
    assert row["reference"] == reference["tpot_s"]["p99"]
    assert row["error"] == pytest.approx(row["reference"] / row["measured"] - 1)
    rows = {row["key"]: row for row in itself["beside"]["rows"]}
    assert rows["finished"]["error"] == 0
    bad = tmp_path / "bad.json"
    for text in ("{", "[1]", '{"ttft_s": {"p50": 1}}'):
        bad.write_text(text)
        assert penstock("bench", "--beside", bad).exit_code == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--url", "http://127.0.0.1:9"), "does not answer"),
        (("--url", "ftp://x"), "--url 'ftp://x'"),
        (("--endpoint", "embeddings"), "give completions or chat"),
        (("--prompt", "ids"), "give tokens, text or auto"),
        (("--vocab", "x"), "range of token ids"),
        (("--body", "[]"), "--body is no JSON object"),
        (("--api-key", "a\nb"), "API key"),
        (("--timeout", "0"), "--timeout"),
    ],
)
def test_bad_input_is_one_line(given: tuple[str, ...], said: str) -> None:
    url = () if "--url" in given else ("--url", "http://127.0.0.1:9")
    result = penstock("bench", *url, *given)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert said in result.stderr


def test_a_server_that_fails_at_once_is_a_bad_input() -> None:
    def broken(reply: Reply, body: Body, server: Scripted) -> None:
        reply.send(500, b'{"error": {"message": "no GPU"}}')

    with serving(broken) as server:
        result = penstock("bench", "--url", server.url, *SHAPE)
    assert result.exit_code == 2
    assert "no GPU" in result.stderr


def test_ctrl_c_ends_early_with_what_was_measured() -> None:
    """The third request makes the interrupt come; two were answered, the rest of the trace was not."""
    import signal

    def third(reply: Reply, body: Body, server: Scripted) -> None:
        if len(server.bodies) < 3:
            answer(reply, body, server)
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with serving(third) as server:
        result = penstock("bench", "--url", server.url, "--synthetic", "20/5", "-n", "30", "--rate", "3",
                          "--cv", "0", "--warmup", "0", "--json", "-")  # fmt: skip
    assert result.exit_code == 130, result.output
    found = json.loads(result.stdout)
    assert found["interrupted"] is True
    assert (found["requests"], found["finished"], found["unfinished"]) == (3, 2, 1)
    assert found["errors"] == {}
