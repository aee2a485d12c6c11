"""Hand-offs and holds keep their blocks, give them back once, and answer once, whatever happens in between."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from penstock.live.plugin.penstock_engine.messages import Answer
from tests.live.plugin.engine import BLOCK, Engine, Request, Status


class Custody(RuleBasedStateMachine):
    """Requests come and go in an engine with few blocks; somebody hands off, holds, pulls, forgets and releases."""

    names = Bundle("names")
    commands = Bundle("commands")

    @initialize(blocks=st.integers(8, 30), lag=st.integers(0, 1))
    def begin(self, blocks: int, lag: int) -> None:
        self.engine = Engine(blocks, lag)
        self.asked: list[tuple[bytes, str, str]] = []
        self.limits: dict[str, int] = {}
        self.gone: set[str] = set()  # remote ids that may not be read any more
        self.most = blocks * BLOCK

    @rule(target=names, prompt=st.integers(1, 20), count=st.integers(1, 30), stop=st.integers(1, 60))
    def arrive(self, prompt: int, count: int, stop: int) -> str:
        name = f"r{len(self.limits)}."
        count = min(count, self.most - prompt)  # vLLM refuses what can never fit
        self.limits[name] = count
        self.engine.add(Request(name, prompt, count, stop))
        return name

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work:
                self.engine.step()

    @rule(target=commands, name=names, op=st.sampled_from(["handoff", "hold"]))
    def ask(self, name: str, op: str) -> tuple[bytes, str, str]:
        command = (self.engine.command(op, name), op, name)
        self.asked.append(command)
        return command

    def offer(self, number: bytes) -> tuple[str, Answer] | None:
        """What was offered and may still be read."""
        answer = self.engine.port.answers.get(number)
        if answer is None or answer.error:
            return None
        assert answer.params is not None
        remote = str(answer.params["remote_request_id"])
        return None if remote in self.gone else (remote, answer)

    @rule(command=commands)
    def pull(self, command: tuple[bytes, str, str]) -> None:
        if found := self.offer(command[0]):
            self.engine.read(found[1], command[2])
            self.gone.add(found[0])

    @rule(command=commands)
    def release(self, command: tuple[bytes, str, str]) -> None:
        if found := self.offer(command[0]):
            self.engine.command("release", found[0])
            self.gone.add(found[0])

    @rule(command=commands)
    def expire(self, command: tuple[bytes, str, str]) -> None:
        if (found := self.offer(command[0])) and found[0] in self.engine.worker.leased:
            self.engine.worker.expiring.add(found[0])
            self.gone.add(found[0])

    @rule(target=names, name=consumes(names))
    def abort(self, name: str) -> object:
        if name in self.engine.requests:
            self.engine.abort(name)
        return multiple()

    @invariant()
    def blocks_have_as_many_owners_as_references(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        owned = [block for request in engine.requests.values() for block in request.blocks]
        owned += [block for blocks in engine.pinned.values() for block in blocks]
        owned += [block for hold in engine.live._holds.values() for block in hold.blocks]
        assert sum(block.ref_cnt for block in engine.pool.blocks) == len(owned)
        for block in owned:
            assert owned.count(block) == block.ref_cnt

    @invariant()
    def what_is_offered_can_be_read(self) -> None:
        for number, _, name in getattr(self, "asked", ()):
            if found := self.offer(number):
                self.engine.read(found[1], name)
                self.engine.worker.notified.discard(found[0])

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for _ in range(2000):
            if not engine.has_work:
                break
            engine.worker.expiring |= engine.worker.leased
            engine.step()
        assert not engine.has_work
        assert not engine.port.wanted
        assert engine.pool.get_num_free_blocks() == len(engine.pool.blocks)
        assert not engine.worker.known
        assert not engine.worker.late
        assert all(number in engine.port.answers for number, _, _ in self.asked)
        assert engine.steps[-1].free_blocks == engine.steps[-1].total_blocks if engine.steps else True
        handed = {n for number, op, n in self.asked if op == "handoff" and not engine.port.answers[number].error}
        for name, request in engine.ended.items():
            if name in handed:
                assert request.status is Status.FINISHED_LENGTH_CAPPED
                assert request.num_output_tokens < self.limits[name]
            elif request.status is Status.FINISHED_LENGTH_CAPPED:
                assert request.num_output_tokens == self.limits[name]


TestCustody = Custody.TestCase
TestCustody.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def ran(lag: int, prompt: int = 6, limit: int = 20, steps: int = 8, stop: int = 99) -> tuple[Engine, Request]:
    """An engine with one request that has made some steps."""
    engine = Engine(20, lag)
    request = Request("cmpl-a", prompt, limit, stop)
    engine.add(request)
    for _ in range(steps):
        engine.step()
    return engine, request


def test_a_handoff_ends_with_the_next_token() -> None:
    for lag in (0, 1):
        engine, request = ran(lag)
        had = request.num_output_tokens
        number = engine.command("handoff", "cmpl-a")
        engine.step()
        answer = engine.port.answers[number]
        assert request.num_output_tokens == had + 1
        assert answer.tokens == 6 + had + 1
        engine.read(answer, "cmpl-a")
        while engine.has_work:
            engine.step()
        assert engine.pool.get_num_free_blocks() == 20


def test_a_request_that_ends_by_itself_keeps_nothing() -> None:
    for stop, limit in ((9, 20), (99, 9)):
        engine, request = ran(0, limit=limit, stop=stop)
        number = engine.command("handoff", "cmpl-a")
        engine.step()
        assert engine.port.answers[number].error.startswith("the request ended by itself (FINISHED_")
        assert not engine.pinned
        assert request.max_tokens == limit
        while engine.has_work:
            engine.step()
        engine.add(Request("cmpl-b", 3, 1, 99))
        engine.step()
        assert not engine.worker.known


def test_a_preempted_handoff_is_taken_back() -> None:
    # Steps ahead of results: computed anew after a preemption, handed off in that step, preempted before its result.
    engine, request = Engine(20, 1), Request("cmpl-a", 5, 20, 99)
    engine.add(Request("cmpl-b", 4, 30, 99))
    engine.add(request)
    for _ in range(4):
        engine.step()
    assert (request.num_output_tokens, request.num_tokens) == (3, 2 * BLOCK)
    engine.running.remove(request)
    engine._preempt(request)
    number = engine.command("handoff", "cmpl-a")
    rest = engine.pool.allocate(engine.pool.get_num_free_blocks() - 2)
    assert rest is not None
    engine.step()  # takes two blocks, and the limit becomes the next token
    assert request.max_tokens == 4
    assert number not in engine.port.answers
    engine.step()  # the other needs one more
    assert engine.port.answers[number].error == "the request was preempted"
    assert request.status is Status.PREEMPTED
    engine.pool.free_blocks(rest)
    while engine.has_work:
        engine.step()
    assert request.num_output_tokens == 20
    assert request.kv_transfer_params is None
    assert not engine.worker.known


def test_what_is_refused() -> None:
    engine, request = ran(0, prompt=35, steps=1)

    def asked(op: str = "handoff", name: str = "cmpl-a") -> str:
        number = engine.command(op, name)
        engine.step()
        return engine.port.answers[number].error

    assert asked() == "the request is still being prefilled"
    assert asked("steal") == "unknown command 'steal'"
    assert asked(name="") == asked(name="cmpl-z") == "no such request"
    assert asked("release", "cmpl-a") == "no such hold"
    for _ in range(3):
        engine.step()
    for name, value, why in (
        ("use_structured_output", True, "structured output"),
        ("resumable", True, "plain generation"),
        ("mm_features", [1], "other than tokens"),
        ("kv_transfer_params", {"do_remote_decode": True}, "leaves its KV anyway"),
        ("request_id", "0_cmpl-a", "several choices"),
        ("status", Status.WAITING, "not running"),
    ):
        before = getattr(request, name)
        setattr(request, name, value)
        number = engine.command("handoff", "cmpl-a")
        engine.live.step(type("Output", (), {"num_scheduled_tokens": {}, "preempted_req_ids": None}))
        assert why in engine.port.answers[number].error
        setattr(request, name, before)
    engine.add(Request("cmpl-ab", 3, 20, 99))
    engine.step()
    assert asked() == "several requests"


def test_a_failing_command_ends_nothing() -> None:
    engine, request = ran(0)
    engine.live._manager.get_blocks = None
    number = engine.command("hold", "cmpl-a")
    engine.step()
    assert engine.port.answers[number].error.startswith("hold failed: ")
    engine.step()
    assert request.num_output_tokens == 10


def test_an_engine_without_abilities_refuses() -> None:
    engine, _ = ran(0)
    engine.live._abilities = frozenset()
    numbers = [engine.command(op, "cmpl-a") for op in ("handoff", "hold")]
    engine.step()
    assert [engine.port.answers[number].error for number in numbers] == [
        "this engine cannot hand off",
        "this engine cannot hold blocks",
    ]


def test_an_engine_that_only_holds_sends_few_steps() -> None:
    engine, request = ran(0)
    number = engine.command("hold", "cmpl-a")
    while request.request_id in engine.requests:
        engine.step()
    before = len(engine.steps)
    for _ in range(500):  # vLLM takes one every millisecond then
        engine.step()
    assert not engine.port.answers[number].error
    assert len(engine.steps) - before < 20
