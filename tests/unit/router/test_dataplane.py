"""The data path from open call to answer, in virtual time: data plane, batchers and pool with fake replicas."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.batcher import Batcher
from router.config import Settings
from router.core.batch import merge, rows_of
from router.core.service_time import MIN_CALLS
from router.core.types import BatchAnswer, BatchKey, Block, Part, Tensor
from router.core.variable import VariableBlock
from router.dataplane import Call, DataPlane
from router.errors import (
    BackendError,
    BackendExhausted,
    BatchTimeout,
    Blame,
    DeadlineExceeded,
    InternalError,
    Malformed,
    ModelFailed,
    NotFound,
    Refused,
    ResourceExhausted,
    StreamLost,
    Unavailable,
)
from router.metrics import Metrics
from tests.builders import decode_texts, encode_texts, make_block, make_key, make_texts
from tests.unit.router.fakes import FakeBackend, RecordingReply, Sent, pool_of

pytestmark = pytest.mark.anyio


class Plane:
    """A data plane over fake replicas, with a short way to make calls."""

    def __init__(
        self, replicas: Sequence[FakeBackend], model: dict[str, Any], limits: dict[str, int], slots: int
    ) -> None:
        settings = Settings(
            backends={"fake": {"addresses": ["fake:1"], "max_in_flight": slots}},  # type: ignore[dict-item]
            models=[{"backend": "fake", "max_batch_size": 4, "max_queue_delay_s": 0, **model}],  # type: ignore[list-item]
            limits=limits,  # type: ignore[arg-type]
        )
        self.metrics = Metrics()
        self.pool = pool_of(*replicas, max_in_flight=slots)
        self.pool.start()
        self.plane = DataPlane(settings, {"fake": self.pool}, self.metrics)
        self.loop = asyncio.get_running_loop()

    def call(self, *blocks: Sequence[float] | tuple[BatchKey, Sequence[float]], timeout_s: float = 60.0) -> "Caller":
        return Caller(self, blocks, timeout_s)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


class Caller:
    """One call of blocks; a block is its rows' values, for the default key or with a key of its own."""

    def __init__(self, plane: Plane, blocks: Sequence[Any], timeout_s: float) -> None:
        keyed = [
            block if isinstance(block, tuple) and isinstance(block[0], BatchKey) else (make_key(), block)
            for block in blocks
        ]
        self.reply = RecordingReply()
        rows = sum(len(values) for _, values in keyed)
        self.call: Call = plane.plane.open(self.reply, rows, timeout_s)
        now = plane.loop.time()
        plane.plane.infer(
            self.call, [self._block(i, key, values, now, now + timeout_s) for i, (key, values) in enumerate(keyed)]
        )

    def _block(self, index: int, key: BatchKey, values: Sequence[float], now: float, deadline: float) -> Block:
        plain = make_block(*values, key=key)
        return Block(key, index, 0, plain.rows, plain.inputs, plain.row_bytes, now, deadline, self.call)

    @property
    def values(self) -> list[float]:
        return [self.reply.values[place] for place in sorted(self.reply.values)]


@asynccontextmanager
async def plane_of(
    *replicas: FakeBackend, model: dict[str, Any] | None = None, limits: dict[str, int] | None = None, slots: int = 1
) -> AsyncIterator[Plane]:
    """A plane that must end empty: no call open, no row queued, nothing in flight, no task left."""
    before = asyncio.all_tasks()
    plane = Plane(replicas, model or {}, limits or {}, slots)
    yield plane
    await plane.plane.aclose()
    await plane.pool.aclose()
    assert "<DataPlane 0 open calls" in repr(plane.plane)
    assert " 0 rows queued" in repr(plane.plane)
    assert all(replica.in_flight == 0 for replica in replicas)
    assert asyncio.all_tasks() == before


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_rows_of_several_callers_share_a_batch_and_each_gets_its_own_answers() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        first, second = plane.call([1, 2]), plane.call([3])
        await settle()
        assert [sent.values for sent in backend.sent] == [[1, 2, 3]]
        backend.sent[0].answer()
        await settle()
        assert first.values == [2, 4]
        assert second.values == [6]
        assert plane.count("router_rows_total") == 3
        assert plane.count("router_batches_total", backend="fake", outcome="answered") == 1
        assert plane.count("router_batch_rows_sum", backend="fake") == 3


async def test_a_batch_is_formed_when_a_slot_takes_it_and_not_before() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        plane.call([1])
        await settle()
        for value in (2, 3, 4):
            plane.call([value])
            await asyncio.sleep(1)
        assert [sent.values for sent in backend.sent] == [[1]]
        backend.sent[0].answer()
        await settle()
        assert [sent.values for sent in backend.sent] == [[1], [2, 3, 4]]
        backend.sent[1].answer()


async def test_a_call_larger_than_a_batch_is_split_and_its_last_batch_filled_by_the_next_call() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend) as plane:
        large, small = plane.call(range(6)), plane.call([10, 11, 12])
        await asyncio.sleep(10)
        assert [sent.values for sent in backend.sent] == [[0, 1, 2, 3], [4, 5, 10, 11], [12]]
        assert large.values == [0, 2, 4, 6, 8, 10]
        assert small.values == [20, 22, 24]


async def test_different_keys_never_mix_and_take_the_models_slots_in_turn() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend) as plane:
        one, two = make_key(agent_type="one"), make_key(agent_type="two")
        plane.call((one, range(12)))
        plane.call((two, [100, 101]))
        caller = plane.call((one, [12]), (two, [102]))
        await asyncio.sleep(10)
        assert [sent.batch.key.agent_type for sent in backend.sent] == ["one", "one", "two", "one", "one"]
        assert [len(sent.values) for sent in backend.sent] == [4, 4, 3, 4, 1]
        assert caller.reply.values == {(0, 0): 24.0, (1, 0): 204.0}


async def test_models_have_slots_of_their_own() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend, slots=2) as plane:
        for _ in range(3):
            plane.call((make_key(model="slow"), [1, 2, 3, 4]))
        plane.call((make_key(model="other"), [1]))
        await settle()
        assert [sent.batch.key.model_name for sent in backend.sent] == ["slow", "slow", "other"]
        await asyncio.sleep(5)
        assert backend.most_in_flight == 3


async def test_a_key_with_one_row_waits_for_one_batch_of_the_key_that_floods_its_model() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        for value in range(100):
            plane.call([value])
        await settle()
        plane.call((make_key(agent_type="lone"), [1000]))
        await settle()
        for sent in range(2):
            backend.sent[sent].answer()
            await settle()
        assert [sent.values for sent in backend.sent] == [[0, 1, 2, 3], [4, 5, 6, 7], [1000]]


class NarrowBackend(FakeBackend):
    """One stream, whatever the models; it is handed on when it is free, as replica.Replica does."""

    @property
    def is_ready(self) -> bool:
        return self.in_flight < 1

    def free(self) -> None:
        super().free()
        self._on_change()


async def test_models_that_share_a_replicas_streams_take_them_in_turn() -> None:
    backend = NarrowBackend()
    async with plane_of(backend) as plane:
        for _ in range(3):
            for model in ("a", "b", "c"):
                plane.call((make_key(model=model), [1, 2, 3, 4]))
        await settle()
        for _ in range(9):
            backend.sent[-1].answer()
            await settle()
        # The first came to a free stream and so took no turn.
        assert [sent.batch.key.model_name for sent in backend.sent] == ["a", *"abcabc", *"bc"]


async def test_batches_go_to_the_replica_with_the_least_in_flight() -> None:
    one, two = FakeBackend("one:1", service_s=1.0), FakeBackend("two:1", service_s=1.0)
    async with plane_of(one, two, slots=2) as plane:
        plane.call(range(16))
        await asyncio.sleep(5)
        assert (len(one.sent), len(two.sent)) == (2, 2)


async def test_an_idle_model_with_a_known_service_time_waits_for_a_burst() -> None:
    backend = FakeBackend(service_s=5.0)
    async with plane_of(backend, model={"max_queue_delay_s": 0.002}) as plane:
        plane.call([1])
        await asyncio.sleep(10)
        plane.call([2])
        await asyncio.sleep(0.001)
        plane.call([3])
        await asyncio.sleep(0.0005)
        assert len(backend.sent) == 1
        await asyncio.sleep(0.0006)
        assert [sent.values for sent in backend.sent] == [[1], [2, 3]]
        await asyncio.sleep(10)


async def test_a_hold_for_an_idle_model_lapses_when_another_key_takes_a_slot() -> None:
    backend = FakeBackend(service_s=5.0)
    async with plane_of(backend, model={"max_queue_delay_s": 0.1}, slots=2) as plane:
        held, other = make_key(agent_type="held"), make_key(agent_type="other")
        plane.call((held, [1]))
        await asyncio.sleep(10)
        plane.call((held, [2]))
        await asyncio.sleep(0.01)
        assert len(backend.sent) == 1
        plane.call((other, [3]))
        await settle()
        assert [sent.values for sent in backend.sent] == [[1], [3], [2]]
        await asyncio.sleep(10)


@pytest.mark.parametrize("what", ["the row is cancelled", "another key takes the slot", "the replica is lost"])
async def test_a_hold_that_has_lost_its_reason_rings_no_more(what: str) -> None:
    """The hold's end once stayed the alarm, in the past: the batcher rang for ever and took a whole core."""
    backend = FakeBackend(service_s=5.0)
    async with plane_of(backend, model={"max_queue_delay_s": 0.1}) as plane:
        plane.call([1])
        await asyncio.sleep(10)
        held = plane.call([2])
        await asyncio.sleep(0.01)
        assert len(backend.sent) == 1
        if what == "the row is cancelled":
            held.call.cancel()
        elif what == "another key takes the slot":
            plane.call((make_key(agent_type="other"), range(4)))
        else:
            backend.set_ready(is_ready=False)
        rings = 0
        ring = Batcher._ring  # noqa: SLF001 (what must not happen has no other trace)

        def count(self: Batcher) -> None:
            nonlocal rings
            rings += 1
            assert rings < 100, "it rings over and over"
            ring(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batcher, "_ring", count)
            await asyncio.sleep(0.5)
        backend.set_ready(is_ready=True)
        await asyncio.sleep(20)


async def test_a_backend_without_slot_limit_is_fed_by_a_plain_window() -> None:
    backend = FakeBackend(service_s=5.0)
    async with plane_of(backend, model={"max_queue_delay_s": 0.02, "max_batch_size": 64}, slots=0) as plane:
        for value in range(50):
            plane.call([value])
            await asyncio.sleep(0.0011)
        await asyncio.sleep(20)
        assert [len(sent.values) for sent in backend.sent] == [19, 19, 12]
        assert backend.most_in_flight == 3


async def test_a_row_waiting_at_its_deadline_is_answered_then_and_never_sent() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        plane.call([1])
        await settle()
        late = plane.call([2], timeout_s=0.5)
        patient = plane.call([3])
        await asyncio.sleep(1)
        assert isinstance(late.reply.closed_by, DeadlineExceeded)
        assert late.reply.ended_at == 0.5
        backend.sent[0].answer()
        await settle()
        assert backend.sent[1].values == [3]
        backend.sent[1].answer()
        await settle()
        assert patient.values == [6]


async def test_a_deadline_in_flight_ends_the_call_and_the_batch_goes_on_for_its_neighbours() -> None:
    backend = FakeBackend(service_s=2.0)
    async with plane_of(backend) as plane:
        late, patient = plane.call([1], timeout_s=1.0), plane.call([2])
        await asyncio.sleep(3)
        assert late.reply.ended_at == 1.0
        assert late.values == []
        assert patient.values == [4]
        assert len(backend.sent) == 1


async def test_a_deadline_keeps_the_rows_that_were_answered_and_drops_those_that_wait_elsewhere() -> None:
    fast, slow = make_key(model="fast"), make_key(model="slow")
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        plane.call((slow, [9]))
        both = plane.call((fast, [1]), (slow, [2]), timeout_s=5.0)
        await settle()
        next(sent for sent in backend.sent if sent.batch.key == fast).answer()
        await asyncio.sleep(6)
        assert both.reply.values == {(0, 0): 2.0}
        assert isinstance(both.reply.closed_by, DeadlineExceeded)
        assert " 0 rows queued" in repr(plane.plane)


async def settled(plane: Plane, backend: FakeBackend, service_s: float = 1.0) -> None:
    """Let the key's service time be known: constant, over enough calls."""
    for _ in range(MIN_CALLS):
        await settled_once(plane, backend, service_s)


async def settled_once(plane: Plane, backend: FakeBackend, service_s: float) -> None:
    plane.call([0])
    await settle()
    await asyncio.sleep(service_s)
    backend.sent.pop().answer()
    await settle()


async def test_a_row_with_less_time_than_any_call_took_is_answered_at_once_and_never_sent() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        await settled(plane, backend)
        start = plane.loop.time()
        hopeless, hopeful = plane.call([1], timeout_s=0.9), plane.call([2], timeout_s=1.1)
        await settle()
        assert isinstance(error := hopeless.reply.failures[0, 0], DeadlineExceeded)
        assert error.message == "0.9 s are left to the deadline, and a call takes at least 1 s"
        assert hopeless.reply.ended_at == start
        assert [sent.values for sent in backend.sent] == [[2]]
        backend.sent[0].answer()
        await settle()
        assert hopeful.values == [4]


async def test_before_enough_calls_were_measured_a_row_may_try() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        plane.call([1])
        await settle()
        await asyncio.sleep(1)
        backend.sent.pop().answer()
        await settle()
        plane.call([2], timeout_s=0.5)
        await settle()
        assert [sent.values for sent in backend.sent] == [[2]]


async def test_a_row_that_waits_is_given_up_when_a_call_would_be_too_late_and_not_before() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        await settled(plane, backend)
        busy = plane.call([1])
        await settle()
        waiting, waiting_too = plane.call([2], timeout_s=2.0), plane.call([3], timeout_s=60.0)
        await settle()
        start = plane.loop.time()
        await asyncio.sleep(0.99)
        assert waiting.reply.ended_at is None
        await asyncio.sleep(0.02)
        assert waiting.reply.ended_at == pytest.approx(start + 1.0, abs=0.001)
        backend.sent[0].answer()
        await settle()
        assert [sent.values for sent in backend.sent[1:]] == [[3]]
        assert (busy.values, waiting_too.reply.ended_at) == ([2], None)


async def test_only_the_infeasible_rows_of_a_call_fail() -> None:
    slow, fast = FakeBackend("slow:1"), FakeBackend("fast:1")
    other = make_key(model="other")
    async with plane_of(slow, fast) as plane:
        await settled(plane, slow)
        call = plane.call([1], (other, [2]), timeout_s=0.5)
        await settle()
        assert list(call.reply.failures) == [(0, 0)]
        (sent,) = slow.sent + fast.sent
        sent.answer()
        await settle()
        assert call.values == [4]
        assert call.reply.closed_by is None


async def test_with_more_rows_than_seats_those_that_will_probably_be_late_leave_theirs_to_others() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        for service_s in (0.5, 1.0) * (MIN_CALLS // 2):
            await settled_once(plane, backend, service_s)
        plane.call([0])
        await settle()
        tight, loose = plane.call([1, 2, 3], timeout_s=1.7), plane.call([4, 5], timeout_s=60.0)
        await settle()
        await asyncio.sleep(1.0)
        backend.sent.pop().answer()
        await settle()
        assert [sent.values for sent in backend.sent] == [[1, 2, 4, 5]]
        assert list(tight.reply.failures) == [(0, 2)]
        assert "nine times out of ten up to" in tight.reply.failures[0, 2].message
        backend.sent[0].answer()
        await settle()
        assert (tight.values, loose.values) == ([2, 4], [8, 10])


async def test_with_a_seat_for_everybody_a_row_that_will_probably_be_late_may_try() -> None:
    backend = FakeBackend()
    async with plane_of(backend, slots=2) as plane:
        for service_s in (0.5, 1.0) * (MIN_CALLS // 2):
            await settled_once(plane, backend, service_s)
        plane.call([1, 2, 3], timeout_s=0.7)
        plane.call([4, 5], timeout_s=60.0)
        await settle()
        assert [sent.values for sent in backend.sent] == [[1, 2, 3, 4], [5]]


async def test_a_cancelled_call_leaves_the_queue_and_its_neighbours_are_unharmed() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        in_flight, neighbour = plane.call([1]), plane.call([2])
        await settle()
        waiting, waiting_neighbour = plane.call([3]), plane.call([4])
        in_flight.call.cancel()
        waiting.call.cancel()
        assert "1 rows queued" in repr(plane.plane)
        backend.sent[0].answer()
        await settle()
        backend.sent[1].answer()
        await settle()
        assert backend.sent[1].values == [4]
        assert neighbour.values == [4]
        assert waiting_neighbour.values == [8]
        assert (in_flight.values, waiting.values) == ([], [])
        assert in_flight.reply.ended_at is None


async def test_a_lost_batch_runs_again_on_another_replica() -> None:
    one, two = FakeBackend("one:1"), FakeBackend("two:1")
    async with plane_of(one, two) as plane:
        caller = plane.call([1, 2])
        await settle()
        one.sent[0].fail(StreamLost("gone"))
        await settle()
        assert two.sent[0].values == [1, 2]
        two.sent[0].answer()
        await settle()
        assert caller.values == [2, 4]
        assert plane.count("router_requeued_rows_total", backend="fake") == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StreamLost("gone"), Unavailable),
        (BatchTimeout("slow"), Unavailable),
        (BackendExhausted("full"), ResourceExhausted),
    ],
)
async def test_rows_fail_after_their_third_attempt(error: BackendError, told: type[Exception]) -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        caller = plane.call([1])
        for attempt in range(3):
            await asyncio.sleep(1)
            assert len(backend.sent) == attempt + 1
            backend.sent[attempt].fail(error)
        await asyncio.sleep(5)
        assert len(backend.sent) == 3
        assert isinstance(caller.reply.failures[0, 0], told)


async def test_a_replica_that_failed_pauses_before_it_gets_the_rows_again() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        plane.call([1])
        await settle()
        backend.sent[0].fail(StreamLost("gone"))
        await asyncio.sleep(0.037)
        assert len(backend.sent) == 1
        await asyncio.sleep(0.026)
        assert len(backend.sent) == 2
        backend.sent[1].answer()


async def test_batches_that_are_lost_together_pause_the_replica_once() -> None:
    """The pause once doubled with each batch that was in flight, up to 2 s for one lost connection."""
    backend = FakeBackend()
    async with plane_of(backend, slots=16) as plane:
        plane.call(range(64))
        await settle()
        for sent in list(backend.sent):
            sent.fail(StreamLost("gone"))
        await asyncio.sleep(0.07)
        assert len(backend.sent) == 32
        for sent in backend.sent[16:]:
            sent.answer()
        await settle()


async def test_a_replica_gets_no_more_batches_at_once_than_it_has_room_for() -> None:
    """Room was once counted when a batch's task began, so that one turn of the loop sent any number."""

    class Small(FakeBackend):
        @property
        def is_ready(self) -> bool:
            return self.in_flight < 3

        def free(self) -> None:
            super().free()
            self.set_ready(is_ready=True)

    backend = Small(service_s=1.0)
    async with plane_of(backend, model={"max_batch_size": 1}, slots=0) as plane:
        caller = plane.call(range(10))
        await asyncio.sleep(10)
        assert backend.most_in_flight == 3
        assert len(caller.values) == 10


async def test_a_models_failure_pauses_the_replica_for_that_model_only() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        plane.call((make_key(model="sick"), [1]))
        await settle()
        backend.sent[0].fail(BackendExhausted("full"))
        plane.call((make_key(model="well"), [2]))
        await settle()
        assert [sent.batch.key.model_name for sent in backend.sent] == ["sick", "well"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Refused("unknown", NotFound, Blame.MODEL), NotFound),
        (Refused("no credential", blame=Blame.MODEL), ModelFailed),
        (Malformed("short"), ModelFailed),
    ],
)
async def test_a_models_own_error_reaches_every_row_of_the_batch_at_once(
    error: BackendError, told: type[Exception]
) -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        callers = [plane.call([1]), plane.call([2, 3])]
        await settle()
        backend.sent[0].fail(error)
        await settle()
        errors = [error for caller in callers for error in caller.reply.failures.values()]
        assert [(type(one), one.message) for one in errors] == [(told, error.message)] * 3
        assert len(backend.sent) == 1


async def test_an_answer_with_a_row_too_few_fails_the_batch_and_shifts_nothing() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        caller = plane.call([1, 2, 3])
        await settle()
        backend.sent[0].answer((Tensor("output", "FP32", (2,), bytes(8)),))
        await settle()
        assert caller.values == []
        assert "shape [2] for a batch of 3 rows" in caller.reply.failures[0, 2].message


async def test_without_a_replica_rows_wait_for_one_and_that_is_no_attempt() -> None:
    backend = FakeBackend(is_ready=False)
    async with plane_of(backend) as plane:
        patient, impatient = plane.call([1]), plane.call([2], timeout_s=3.0)
        await asyncio.sleep(20)
        assert backend.sent == []
        assert isinstance(impatient.reply.closed_by, DeadlineExceeded)
        backend.set_ready(is_ready=True)
        await settle()
        assert backend.sent[0].values == [1]
        assert backend.sent[0].batch.parts[0].attempts == 0
        backend.sent[0].answer()
        await settle()
        assert patient.values == [2]


async def test_a_bug_in_one_replys_code_does_not_cost_the_neighbours_their_answers() -> None:
    class Broken(RecordingReply):
        def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
            raise ZeroDivisionError

    backend = FakeBackend()
    async with plane_of(backend) as plane:
        broken = plane.call([1])
        broken.reply.__class__ = Broken
        neighbour = plane.call([2])
        await settle()
        backend.sent[0].answer()
        await settle()
        assert isinstance(broken.reply.failures[0, 0], InternalError)
        assert neighbour.values == [4]


async def test_past_the_queues_bound_a_block_is_refused_with_a_time_to_retry_and_counted() -> None:
    backend = FakeBackend()
    async with plane_of(backend, limits={"max_queued_rows": 5}) as plane:
        plane.call([0])
        await settle()
        plane.call([1, 2, 3])
        refused = plane.call([4, 5, 6], (make_key(model="other"), [7]))
        error = refused.reply.failures[0, 0]
        assert isinstance(error, ResourceExhausted)
        assert error.retry_after_s == 1.0
        await settle()
        assert backend.sent[1].values == [7]
        assert plane.count("router_refusals_total", reason="queue_rows") == 3


async def test_past_the_processs_bound_in_bytes_a_block_is_refused_whatever_its_key() -> None:
    async with plane_of(FakeBackend(), limits={"max_queued_bytes": 8}) as plane:
        plane.call([0])
        await settle()
        plane.call([1, 2])
        refused = plane.call((make_key(model="other"), [7]))
        error = refused.reply.failures[0, 0]
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "queue_bytes"
        assert plane.count("router_refusals_total", reason="queue_bytes") == 1


async def measured(plane: Plane, calls: int) -> None:
    """Serve full batches one by one until the key's calls are known."""
    for _ in range(calls):
        plane.call([1, 2, 3, 4])
        await asyncio.sleep(5)
        await settle()


async def test_whoever_would_be_late_behind_the_rows_ahead_is_refused_on_arrival_and_told_when_to_return() -> None:
    async with plane_of(FakeBackend(service_s=5.0)) as plane:
        await measured(plane, 20)
        running, waiting = plane.call([1, 2, 3, 4]), plane.call([1, 2, 3, 4])
        await asyncio.sleep(1)
        in_time, late = plane.call([5], timeout_s=14.1), plane.call([6], timeout_s=13.9)
        error = late.reply.failures[0, 0]
        assert isinstance(error, ResourceExhausted)
        assert error.message == "5 rows wait ahead: about 14 s, 13.9 s are left"
        assert error.retry_after_s == pytest.approx(0.1)
        assert plane.count("router_refusals_total", reason="estimated_wait") == 1
        await asyncio.sleep(14)
        await settle()
        assert [one.reply.failures for one in (running, waiting, in_time)] == [{}, {}, {}]
        assert in_time.values == [10]


async def test_without_a_limit_of_slots_nobody_is_refused_for_what_is_in_flight_or_gathers() -> None:
    async with plane_of(FakeBackend(service_s=5.0), model={"max_queue_delay_s": 0.5}, slots=0) as plane:
        await measured(plane, 20)
        plane.call([1, 2, 3, 4])
        await asyncio.sleep(1)
        waiting, in_time = plane.call([5]), plane.call([6], timeout_s=6.0)
        await asyncio.sleep(6.0)
        assert waiting.values + in_time.values == [10, 12]


async def test_whoever_has_less_time_than_any_call_takes_is_refused_on_arrival() -> None:
    async with plane_of(FakeBackend(service_s=5.0)) as plane:
        await measured(plane, 19)
        taken = plane.call([1], timeout_s=4.9)
        await asyncio.sleep(5)
        assert isinstance(taken.reply.closed_by, DeadlineExceeded)
        await measured(plane, 1)
        refused = plane.call([1], timeout_s=4.9)
        assert isinstance(refused.reply.failures[0, 0], DeadlineExceeded)
        assert plane.count("router_refusals_total", reason="deadline") == 1
        assert "<DataPlane 0 open calls" in repr(plane.plane)


async def test_a_trial_of_a_model_that_was_slow_for_long_is_not_given_up_while_it_waits() -> None:
    """Bug: one in twenty hopeless rows was taken on arrival, and given up for the same reason before it was sent."""
    backend = FakeBackend(service_s=5.0)
    async with plane_of(backend) as plane:
        await measured(plane, 20)
        backend.service_s = 1.0
        refused = [plane.call([1], timeout_s=2.0) for _ in range(19)]
        tried = plane.call([7], timeout_s=2.0)
        await asyncio.sleep(1)
        await settle()
        assert all(isinstance(one.reply.failures[0, 0], DeadlineExceeded) for one in refused)
        assert tried.values == [14]
        again = plane.call([8], timeout_s=2.0)
        await asyncio.sleep(1)
        await settle()
        assert again.values == [16]


class Witness(RecordingReply):
    """Notes how many batches had been sent when its answer came."""

    def __init__(self, backend: FakeBackend) -> None:
        super().__init__()
        self.sent_before: list[int] = []
        self._backend = backend

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        self.sent_before.append(len(self._backend.sent))
        super().answered(part, answer, offset, is_last=is_last)


async def test_while_rows_wait_the_next_batch_is_sent_before_answers_are_handed_out() -> None:
    """To hand out 64 answers takes a millisecond, in which the model had nothing to do."""
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        witness = Witness(backend)
        call = plane.plane.open(witness, 4, 60.0)
        block = make_block(1, 2, 3, 4)
        plane.plane.infer(call, [Block(block.key, 0, 0, 4, block.inputs, 4, plane.loop.time(), 60.0, call)])
        await settle()
        plane.call([5, 6, 7, 8])
        await asyncio.sleep(1)
        backend.sent[0].answer()
        await settle()
        assert witness.sent_before == [2]
        backend.sent[1].answer()
        await settle()


async def test_past_the_queues_bound_the_time_to_retry_follows_from_the_drain_rate() -> None:
    async with plane_of(FakeBackend(service_s=5.0), limits={"max_queued_rows": 4}) as plane:
        await measured(plane, 1)
        plane.call([1, 2, 3, 4])
        await settle()
        plane.call([1, 2, 3])
        error = plane.call([4, 5]).reply.failures[0, 0]
        assert isinstance(error, ResourceExhausted)
        assert (error.reason, error.retry_after_s) == ("queue_rows", 2.5)  # two rows at four in 5 s


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_key_bytes": 8}, "key_bytes"),
        ({"max_process_rows": 2}, "process_rows"),
        ({"max_tenant_rows": 2}, "tenant_rows"),
        ({"max_tenant_bytes": 8}, "tenant_bytes"),
    ],
)
async def test_every_bound_that_is_set_refuses_and_counts(limits: dict[str, int], reason: str) -> None:
    backend = FakeBackend()
    async with plane_of(backend, limits=limits) as plane:
        plane.call([0])
        await settle()
        plane.call([1, 2])
        error = plane.call([7]).reply.failures[0, 0]
        assert isinstance(error, ResourceExhausted)
        assert (error.reason, error.retry_after_s) == (reason, 1.0)
        assert plane.count("router_refusals_total", reason=reason) == 1


async def test_past_the_bound_of_keys_a_new_key_is_refused_until_an_idle_one_is_forgotten() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend, limits={"max_keys": 2, "key_idle_s": 600}) as plane:
        plane.call((make_key(model="a"), [1]))
        plane.call((make_key(model="b"), [1]))
        refused = plane.call((make_key(model="c"), [1]))
        error = refused.reply.failures[0, 0]
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "keys"
        await asyncio.sleep(599)
        assert "2 keys" in repr(plane.plane)
        await asyncio.sleep(100)
        assert " 0 keys" in repr(plane.plane)
        later = plane.call((make_key(model="c"), [1]))
        await asyncio.sleep(2)
        assert later.values == [2]


async def test_a_leaving_router_refuses_new_calls_and_finishes_the_open_ones() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend) as plane:
        accepted = plane.call(range(8))
        plane.plane.refuse_new()
        with pytest.raises(Unavailable) as refused:
            plane.call([1])
        assert refused.value.retry_after_s == 1.0
        await plane.plane.wait_until_idle()
        assert accepted.reply.ended_at == 2.0
        assert len(accepted.values) == 8


async def test_closing_fails_what_is_still_open() -> None:
    async with plane_of(FakeBackend()) as plane:
        flying, waiting = plane.call([1]), plane.call([2])
        await settle()
        await plane.plane.aclose()
        assert isinstance(flying.reply.closed_by, Unavailable)
        assert isinstance(waiting.reply.closed_by, Unavailable)


async def test_an_idle_key_takes_its_slots_with_it() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend, limits={"key_idle_s": 600}) as plane:
        plane.call([1])
        await asyncio.sleep(700)
        gc.collect()
        plane.call([1])
        await asyncio.sleep(2)
        assert len(backend.sent) == 2


class TextCaller:
    """A call of one block of texts."""

    def __init__(self, plane: Plane, *texts: str, timeout_s: float = 60.0) -> None:
        self.reply = TextReply()
        self.call = plane.plane.open(self.reply, len(texts), timeout_s)
        now = plane.loop.time()
        plain = make_texts(*texts)
        block = VariableBlock(
            plain.key, 0, 0, plain.rows, plain.inputs, 0, now, now + timeout_s, self.call, offsets=plain.offsets
        )
        plane.plane.infer(self.call, [block])


class TextReply(RecordingReply):
    """Remembers texts by row."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[int, str] = {}

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        rows = decode_texts(rows_of(answer.outputs[0], offset, part.rows).data)
        self.texts |= {part.first + number: text for number, text in enumerate(rows)}


def upper(sent: Sent) -> tuple[Tensor, ...]:
    """A model of texts: its answers are as wide as its rows."""
    texts = [text.upper() for text in decode_texts(merge(sent.batch)[0])]
    return (Tensor("out", "BYTES", (len(texts),), encode_texts(*texts)),)


async def test_texts_of_many_callers_share_batches_by_rows_and_bytes_and_come_back_in_their_rows() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model={"max_batch_bytes": 24}) as plane:
        callers = [TextCaller(plane, "a", "", "ccc"), TextCaller(plane, "dd", "e" * 20, "f"), TextCaller(plane, "g")]
        for _ in range(3):
            await settle()
            backend.sent[-1].answer(upper(backend.sent[-1]))
        await settle()
        assert [decode_texts(merge(sent.batch)[0]) for sent in backend.sent] == [
            ["a", "", "ccc", "dd"],
            ["e" * 20],
            ["f", "g"],
        ]
        assert [caller.reply.texts for caller in callers] == [
            {0: "A", 1: "", 2: "CCC"},
            {0: "DD", 1: "E" * 20, 2: "F"},
            {0: "G"},
        ]


async def test_texts_that_are_given_up_free_their_bytes() -> None:
    backend = FakeBackend()
    async with plane_of(backend, limits={"max_queued_bytes": 40}) as plane:
        first = TextCaller(plane, "a")
        await settle()
        waiting = TextCaller(plane, "b" * 30)
        refused = TextCaller(plane, "c" * 30)
        assert isinstance(refused.reply.failures[0, 0], ResourceExhausted)
        waiting.call.cancel()
        late = TextCaller(plane, "d" * 30, timeout_s=1.0)
        await asyncio.sleep(2)
        assert isinstance(late.reply.closed_by, DeadlineExceeded)
        backend.sent[0].answer(upper(backend.sent[0]))
        await settle()
        assert first.reply.texts == {0: "A"}
        assert len(backend.sent) == 1


async def test_lost_texts_are_sent_again_whole() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model={"max_batch_bytes": 12}) as plane:
        caller = TextCaller(plane, "aa", "bb", "cc")
        await settle()
        backend.sent[0].fail(StreamLost("lost"))
        for number in (1, 2):
            await asyncio.sleep(1)
            backend.sent[number].answer(upper(backend.sent[number]))
        await settle()
        assert caller.reply.texts == {0: "AA", 1: "BB", 2: "CC"}


async def test_an_answer_that_holds_other_elements_fails_its_rows_and_no_others() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model={"max_batch_size": 1}) as plane:
        bad, good = TextCaller(plane, "a"), TextCaller(plane, "b")
        await settle()
        backend.sent[0].answer((Tensor("out", "BYTES", (1,), b"\x09\0\0\0x"),))
        await settle()
        backend.sent[1].answer(upper(backend.sent[1]))
        await settle()
        assert isinstance(bad.reply.failures[0, 0], ModelFailed)
        assert "element 0 is cut off" in bad.reply.failures[0, 0].message
        assert good.reply.texts == {0: "B"}
