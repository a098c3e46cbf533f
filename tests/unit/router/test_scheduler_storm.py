"""Everything at once against a book of every row: the scheduler as it runs, with all that can go wrong or be changed.

Calls of several tenants, classes and keys, vectors and texts of many widths, with bad rows among them, come, are
cancelled and run out of time; replicas refuse bad rows and sometimes good ones, lose, stall, have no room, answer
nonsense or NaN, go and come, leave and join, are ejected and tried; settings change while all of it waits and flies.
Then: nobody is told twice, of another's row or by the wrong error; the books of what waits are right to the byte; no
timer spins; and when it is over nothing is left, in no queue, lane, slot or account.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.config import Settings
from router.core.answer import read_answer
from router.core.batch import merge
from router.core.elements import scan
from router.core.types import Batch, BatchAnswer, BatchKey, Block, Outputs, Tensor, TensorSpec
from router.core.variable import VariableBlock
from router.dataplane import Call, DataPlane
from router.errors import (
    BackendError,
    BackendExhausted,
    BatchTimeout,
    Blame,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    Malformed,
    ModelFailed,
    Refused,
    ResourceExhausted,
    RouterError,
    StreamLost,
    Unavailable,
)
from router.metrics import Metrics
from tests.builders import decode_texts, encode_texts, make_block
from tests.unit.router.fakes import FakeBackend, RecordingReply, pool_of
from tests.virtual_time import VirtualTimeLoop

REPLICAS = 3
SERVICE_S = 0.5
STALL_S = 20.0
EJECTION_S = 3.0
KEY_IDLE_S = 100.0
# After the last arrival: attempts, pauses, halves of every batch, a deadline at the latest.
LAST_END_S = 400.0
# What a replica rests after failures in a row at most, and a hold.
LONGEST_PAUSE_S = 3.5
# Turns of the loop in a second that nothing honest needs.
MAX_TURNS = 20_000

BAD_TEXT = "this row is bad"
FALSE_TEXT = "no reason"
TENANTS = ("default", "gold", "quiet")
KEYS = {
    "a": BatchKey("m", "", "a", (TensorSpec("vector", "FP32", (1,)),)),
    "b": BatchKey("m", "", "b", (TensorSpec("vector", "FP32", (2,)),)),
    "same": BatchKey("same", "", "", (TensorSpec("vector", "FP32", (1,)),)),
    "text": BatchKey("text", "", "", (TensorSpec("text", "BYTES", ()),)),
}


class WatchedLoop(VirtualTimeLoop):
    """Fails when something runs on and on while no time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0
        self._second = 0

    def _run_once(self) -> None:
        second = int(self.time())
        self.turns = self.turns + 1 if second == self._second else 0
        self._second = second
        assert self.turns < MAX_TURNS, "something spins"
        super()._run_once()  # type: ignore[misc]


def values_of(batch: Batch) -> list[float]:
    data = merge(batch)[0]
    if batch.key.is_variable:
        return [float(text.split("/")[0]) for text in decode_texts(bytes(data))]
    return [float(value) for value in np.frombuffer(data, "<f4").reshape(batch.rows, -1)[:, 0]]


class Wild(FakeBackend):
    """A replica that refuses bad rows, and whose next batches end as the story says."""

    def __init__(self, address: str, world: "Storm") -> None:
        super().__init__(address)
        self._world = world
        self._out: set[asyncio.Future[None]] = set()

    def abandon(self) -> None:
        for gone in self._out:
            if not gone.done():
                gone.set_exception(StreamLost("abandoned"))

    async def infer(self, batch: Batch) -> BatchAnswer:
        loop = asyncio.get_running_loop()
        sent_at, values = loop.time(), values_of(batch)
        self._world.saw(batch, values)
        outcome = self._world.story.pop(0) if self._world.story else "answer"
        gone: asyncio.Future[None] = loop.create_future()
        self._out.add(gone)
        service_s = STALL_S if outcome == "stall" else self._world.service_s
        try:
            async with asyncio.timeout(service_s):
                await gone
        except TimeoutError:
            pass
        finally:
            self._out.discard(gone)
        if make := FAILURES.get(outcome):
            raise make()
        bad = {row: BAD_TEXT for row, value in enumerate(values) if value in self._world.bad}
        if bad and not self._world.names_bad_rows:
            raise Refused(BAD_TEXT, *self._world.refusal)
        return read_answer(
            batch,
            _outputs(values, has_nan=outcome == "nan"),
            row_errors="{" + ", ".join(f'"{row}": "{text}"' for row, text in bad.items()) + "}" if bad else None,
            replica=self.address,
            dispatched_at=sent_at,
            answered_at=loop.time(),
        )


def _outputs(values: list[float], *, has_nan: bool) -> Outputs:
    answers = 2 * np.array(values, "<f4")
    if has_nan:
        answers[len(values) // 2] = np.nan
    return (Tensor("output", "FP32", (len(values),), answers.tobytes()),)


FAILURES: dict[str, Callable[[], BackendError]] = {
    "lose": lambda: StreamLost("lost"),
    "no room": lambda: BackendExhausted("full"),
    "time out": lambda: BatchTimeout("silent"),
    "nonsense": lambda: Malformed("short"),
    "refuse": lambda: Refused(FALSE_TEXT),
    "refuse rows": lambda: Refused(FALSE_TEXT, InvalidArgument, Blame.ROWS),
    "no model": lambda: Refused(FALSE_TEXT, blame=Blame.MODEL),
}
OUTCOMES = [*FAILURES, "nan", "stall", "answer", "answer"]


@dataclass(eq=False)
class Asked:
    """A call and what its caller was told."""

    call: Call
    reply: RecordingReply
    values: list[list[float]]
    ends_by: float
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.reply.ended_at is not None


class Storm(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(0, 4),
        bounds_tenants=st.booleans(),
        names_bad_rows=st.booleans(),
        is_callers_fault=st.booleans(),
    )
    def start(self, slots: int, *, bounds_tenants: bool, names_bad_rows: bool, is_callers_fault: bool) -> None:
        random.seed(0)
        self.loop = WatchedLoop()
        self.story: list[str] = []
        self.bad: set[float] = set()
        self.names_bad_rows = names_bad_rows
        self.refusal: Any = (InvalidArgument, Blame.ROWS) if is_callers_fault else ()
        self.service_s = SERVICE_S
        self.asked: list[Asked] = []
        self.next_value = 1000
        self.sends: Counter[float] = Counter()
        self.has_failed = self.was_fragile = False
        self.model: dict[str, Any] = {"max_batch_size": 8, "max_batch_bytes": 60, "max_queue_delay_s": 0.05}
        self.limits: dict[str, Any] = {"max_queued_rows": 60, "key_idle_s": KEY_IDLE_S}
        if bounds_tenants:
            self.limits |= {"max_tenant_rows": 40, "max_tenant_bytes": 400}
        self.weights: dict[str, float] = {}
        self.slots = self.most_slots = slots
        self.most_rows = 8
        self.run(self._start())

    async def _start(self) -> None:
        self.backends = [Wild(f"fake:{number}", self) for number in range(REPLICAS)]
        self.pool = pool_of(*self.backends, max_in_flight=self.slots, ejection_s=EJECTION_S)
        self.pool.start()
        self.metrics = Metrics()
        self.plane = DataPlane(self.settings(), {"fake": self.pool}, self.metrics)

    def settings(self) -> Settings:
        model = {"backend": "fake", "allow_nan": False, "batch_class_patience_s": 2.0, **self.model}
        return Settings(
            backends={"fake": {"addresses": ["fake:1"], "max_in_flight": self.slots}},  # type: ignore[dict-item]
            models=[{**model, "match": {"model_name": "same"}, "deterministic": True}, model],  # type: ignore[list-item]
            limits=self.limits,  # type: ignore[arg-type]
            tenant_weights=self.weights,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    def saw(self, batch: Batch, values: list[float]) -> None:
        """A batch at a replica."""
        assert 0 < batch.rows == len(values) <= self.most_rows
        assert {part.block.key for part in batch.parts} == {batch.key}
        self.sends.update(values)

    # -- callers -----------------------------------------------------------------------------------------------------

    @rule(
        blocks=st.lists(
            st.tuples(
                st.sampled_from([*KEYS, "a"]),
                st.lists(st.sampled_from(["good"] * 9 + ["bad"]), min_size=1, max_size=20),
                st.integers(0, 40),
            ),
            min_size=1,
            max_size=3,
        ),
        tenant=st.sampled_from(TENANTS),
        is_batch_class=st.booleans(),
        timeout_s=st.sampled_from([0.0, 0.3, 0.5, 0.51, 1.0, 3.0, 100.0, 100.0, 100.0]),
    )
    def ask(
        self, blocks: list[tuple[str, list[str], int]], tenant: str, timeout_s: float, *, is_batch_class: bool
    ) -> None:
        self.run(self._ask(blocks, tenant, timeout_s, is_batch_class))

    @rule(key=st.sampled_from([*KEYS]), calls=st.integers(5, 30), tenant=st.sampled_from(TENANTS), is_bad=st.booleans())
    def burst(self, key: str, calls: int, tenant: str, *, is_bad: bool) -> None:
        row = "bad" if is_bad else "good"
        for _ in range(calls):
            self.run(self._ask([(key, [row], 3)], tenant, 100.0, False))

    async def _ask(
        self, blocks: list[tuple[str, list[str], int]], tenant: str, timeout_s: float, is_batch_class: bool
    ) -> None:
        now = self.loop.time()
        reply = RecordingReply()
        call = self.plane.open(reply, sum(len(rows) for _, rows, _ in blocks), timeout_s)
        made: list[Block] = []
        values: list[list[float]] = []
        for index, (name, rows, width) in enumerate(blocks):
            key = KEYS[name]
            values.append([self._value(name, row == "bad") for row in rows])
            ends = now, now + timeout_s, call, tenant, is_batch_class
            if name == "text":
                raw = encode_texts(*(f"{int(value)}/{'x' * width}" for value in values[-1]))
                offsets = (scan(raw, len(rows), 1),)
                made.append(VariableBlock(key, index, 0, len(rows), (raw,), 0, *ends, offsets=offsets))
            else:
                like = make_block(*values[-1], key=key)
                made.append(Block(key, index, 0, like.rows, like.inputs, like.row_bytes, *ends))
        self.asked.append(Asked(call, reply, values, now + timeout_s))
        self.plane.infer(call, made)

    def _value(self, name: str, is_bad: bool) -> float:
        """A row of its own; of the model that shares equal rows one of a few."""
        if name == "same":
            value = float(7 if is_bad else self.next_value % 5)
            self.next_value += 1
        else:
            self.next_value += 1
            value = float(self.next_value)
        if is_bad:
            self.bad.add(value)
        return value

    @precondition(lambda self: any(not one.is_over for one in self.asked))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([one for one in self.asked if not one.is_over]))
        one.is_cancelled = True

        async def cancel() -> None:
            one.call.cancel()

        self.run(cancel())

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.05, 0.2, 0.5, 1.0, 3.0, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def settle_times(self) -> None:
        """Enough calls for predictions."""
        for _ in range(25):
            self.run(self._ask([("a", ["good"], 0), ("text", ["good"], 3)], "default", 100.0, False))
            self.run(asyncio.sleep(self.service_s + 0.1))

    # -- replicas ----------------------------------------------------------------------------------------------------

    @rule(outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=6))
    def fail(self, outcomes: list[str]) -> None:
        self.story.extend(outcomes)
        self.has_failed = True

    @rule(service_s=st.sampled_from([0.001, 0.1, SERVICE_S, 2.0]))
    def change_speed(self, service_s: float) -> None:
        self.service_s = service_s

    @rule(number=st.integers(0, REPLICAS - 1), is_ready=st.booleans(), loses=st.booleans())
    def go_or_come(self, number: int, *, is_ready: bool, loses: bool) -> None:
        async def turn() -> None:
            self.backends[number].set_ready(is_ready=is_ready)
            if loses:
                self.has_failed = True
                self.backends[number].abandon()

        self.run(turn())

    @rule(who=st.sets(st.integers(0, REPLICAS - 1), min_size=1))
    def set_addresses(self, who: set[int]) -> None:
        async def change() -> None:
            self.pool.set_addresses([f"fake:{number}" for number in sorted(who)])

        self.run(change())

    # -- settings ----------------------------------------------------------------------------------------------------

    @rule(
        model=st.fixed_dictionaries(
            {},
            optional={
                "max_batch_size": st.sampled_from([1, 3, 8, 16]),
                "max_batch_bytes": st.sampled_from([8, 20, 60, 400]),
                "max_queue_delay_s": st.sampled_from([0.0, 0.05, 0.5]),
                "retries": st.sampled_from([0, 1, 2, 4]),
                "batch_class_patience_s": st.sampled_from([0.0, 2.0]),
            },
        ),
        limits=st.fixed_dictionaries({}, optional={"max_queued_rows": st.sampled_from([5, 60, 200])}),
        weights=st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([0.1, 1.0, 7.0])),
        slots=st.integers(0, 4),
    )
    def change_settings(
        self, model: dict[str, Any], limits: dict[str, Any], weights: dict[str, float], slots: int
    ) -> None:
        self.model |= model
        self.limits |= limits
        self.weights = weights
        self.was_fragile = self.was_fragile or self.model.get("retries", 2) < 2
        self.most_rows = max(self.most_rows, self.model["max_batch_size"])
        self.slots, self.most_slots = slots, max(slots, self.most_slots) if slots and self.most_slots else 0

        async def change() -> None:
            self.pool.set_max_in_flight(slots)
            self.plane.apply(self.settings())

        self.run(change())

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def callers_are_told_the_truth(self) -> None:
        for one in getattr(self, "asked", []):
            reply = one.reply
            for (block, row), value in reply.values.items():
                assert value == 2 * one.values[block][row]
                assert one.values[block][row] not in self.bad
            assert not reply.values.keys() & reply.failures.keys()
            for (block, row), error in reply.failures.items():
                self.check_error(one.values[block][row], error)
            told = len(reply.values) + len(reply.failures)
            if reply.ended_at is not None:
                assert reply.closed_by is not None or told == sum(map(len, one.values))
                assert reply.ended_at <= one.ends_by + 0.001
            if reply.closed_by is not None:
                assert isinstance(reply.closed_by, DeadlineExceeded)

    def check_error(self, value: float, error: RouterError) -> None:
        assert not isinstance(error, InternalError)
        if error.args[0] == BAD_TEXT:
            assert value in self.bad or self.was_fragile, "an innocent row failed as bad"
        elif not isinstance(error, DeadlineExceeded | InvalidArgument) and not (
            isinstance(error, ResourceExhausted) and error.reason != "backend"
        ):
            assert self.has_failed, f"nothing has failed but a row: {error!r}"
            assert isinstance(error, Unavailable | ModelFailed | ResourceExhausted), repr(error)

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "plane"):
            return
        sites = list(self.plane._lanes._all())  # noqa: SLF001
        budget = self.plane._lanes.budget  # noqa: SLF001
        rows, nbytes = 0, 0
        accounts: Counter[str] = Counter()
        for site in sites:
            queue, isolation = site.batcher._queue, site.batcher._recovery._isolation  # noqa: SLF001
            lanes = list(queue._lanes())  # noqa: SLF001
            waiting = [
                part
                for lane in lanes
                for block, parts in lane.waiting.items()
                for part in (parts if parts is not None else [block.whole()])
            ]
            assert sum(part.rows for part in waiting) == queue.rows == sum(lane.rows for lane in lanes)
            assert sum(part.nbytes for part in waiting) == queue.nbytes
            pieces = list(dict.fromkeys(piece for held in isolation._waiting.values() for piece in held))  # noqa: SLF001
            parts = [part for piece in pieces for part in piece.parts]
            assert sum(part.rows for part in parts) == isolation.rows
            seen: Counter[tuple[int, int]] = Counter()
            for part in [*waiting, *parts]:
                assert not part.block.recipient.is_closed
                seen.update((id(part.block), part.first + number) for number in range(part.rows))
                rows, nbytes = rows + part.rows, nbytes + part.nbytes
                accounts[part.block.tenant] += part.rows
            for batch in site.batcher._in_flight:  # noqa: SLF001
                for part in batch.parts:
                    seen.update((id(part.block), part.first + number) for number in range(part.rows))
            assert not seen or max(seen.values()) == 1, "a row is in two places"
        assert (budget.rows, budget.used_bytes) == (rows, nbytes)
        if budget.bounds_tenants:
            assert {name: account.rows for name, account in budget._accounts.items()} == dict(accounts)  # noqa: SLF001

    @invariant()
    def slots_are_kept(self) -> None:
        for backend in getattr(self, "backends", []):
            assert backend.in_flight >= 0
            # Three models share a replica.
            assert not self.most_slots or backend.in_flight <= 3 * self.most_slots

    def teardown(self) -> None:
        if not hasattr(self, "plane"):
            return
        try:
            self.end()
        finally:
            self.run(self._close())
            self.loop.close()

    async def _close(self) -> None:
        await self.plane.aclose()
        await self.pool.aclose()

    def end(self) -> None:
        """Nobody comes any more and the replicas are well: everything ends, and nothing is left."""
        self.story.clear()
        self.service_s = SERVICE_S
        for number in range(REPLICAS):
            self.go_or_come(number, is_ready=True, loses=False)
        give_up_at = self.loop.time() + LAST_END_S
        idle_s = 0.0
        while not all(one.is_over for one in self.asked) and self.loop.time() < give_up_at:
            self.run(asyncio.sleep(0.2))
            is_idle = not any(backend.in_flight for backend in self.backends)
            idle_s = idle_s + 0.2 if is_idle else 0.0
            assert idle_s <= LONGEST_PAUSE_S, "rows wait, and no replica has anything to do"
        self.callers_are_told_the_truth()
        assert not [one for one in self.asked if not one.is_over], "calls without an end"
        self.run(asyncio.sleep(STALL_S + 1.0))
        self.books_are_right()
        assert "0 open calls" in repr(self.plane)
        assert "0 rows queued" in repr(self.plane)
        assert [backend.in_flight for backend in self.backends] == [0] * REPLICAS
        for slots in self.pool._slots.values():  # noqa: SLF001
            assert repr(slots) == "<ModelSlots 0 busy, 0 waiting, 0 held, 0 pieces>"
            assert slots._splits_in_flight == 0  # noqa: SLF001
        turns = self.loop.turns
        self.run(asyncio.sleep(0.5))
        assert self.loop.turns - turns < 100, "timers ring for nobody"
        self.run(asyncio.sleep(3 * KEY_IDLE_S))
        assert ", 0 keys," in repr(self.plane)


Storm.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
TestStorm = Storm.TestCase
