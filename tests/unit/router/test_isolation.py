"""Bad rows, lost batches and nonsense on the way from call to answer, in virtual time: batchers and pool with fakes."""

import asyncio
import struct
from collections.abc import Callable

import pytest

from router.core.types import Block, Tensor
from router.errors import (
    BackendError,
    BackendExhausted,
    BatchTimeout,
    Blame,
    DeadlineExceeded,
    InvalidArgument,
    Malformed,
    ModelFailed,
    NotFound,
    Refused,
    ResourceExhausted,
    RouterError,
    StreamLost,
    Unavailable,
)
from tests.builders import make_block, make_key
from tests.unit.router.fakes import FakeBackend, Picky, RecordingReply, Sent
from tests.unit.router.test_dataplane import Caller, Plane, plane_of, settle

pytestmark = pytest.mark.anyio

ROWS = Refused("no such row", InvalidArgument, Blame.ROWS)
UNCLEAR = Refused("boom")
BAD = 666.0
EIGHT = {"max_batch_size": 8}
LARGE = {"max_batch_size": 64}


class Rules(FakeBackend):
    """Does with each batch what a rule says: an error, or None for an answer."""

    def __init__(self, rule: Callable[[Sent], BackendError | None], address: str = "fake:1") -> None:
        super().__init__(address, service_s=1.0)
        self._rule = rule

    def respond(self, sent: Sent) -> None:
        error = self._rule(sent)
        if sent.future.done():
            return
        if error is None:
            sent.answer()
        else:
            sent.fail(error)


def told(caller: Caller) -> tuple[list[float], list[type[RouterError]]]:
    """The values that a caller got, and the kinds of errors."""
    return caller.values, [type(error) for error in caller.reply.failures.values()]


def sizes(*backends: FakeBackend) -> list[int]:
    """Rows per call, in order of time."""
    return [sent.batch.rows for sent in sorted((s for b in backends for s in b.sent), key=lambda sent: sent.at)]


def pieces(plane: Plane) -> str:
    return repr(plane.pool.slots(make_key().model)).rsplit(", ", 1)[1]


# -- bad rows --------------------------------------------------------------------------------------------------------


async def test_one_bad_row_among_eight_costs_only_itself() -> None:
    backend = Picky(bad=[3], error=ROWS)
    async with plane_of(backend, model=EIGHT) as plane:
        callers = [plane.call([value]) for value in range(8)]
        await asyncio.sleep(60)
        assert [told(caller) for caller in callers] == [
            ([], [InvalidArgument]) if value == 3 else ([2 * value], []) for value in range(8)
        ]
        assert callers[3].reply.failures[0, 0].message == "no such row"
        assert len(backend.sent) <= 1 + 9
        assert plane.count("router_poison_rows_total", backend="fake") == 1
        assert plane.count("router_failed_rows_total", backend="fake", reason="poison") == 1
        assert plane.count("router_splits_total", backend="fake") == 3


@pytest.mark.parametrize("slots", [0, 1, 4, 16, 32])
@pytest.mark.parametrize(("rows", "extra"), [(8, 9), (64, 17)])
async def test_a_bad_row_costs_so_many_calls_at_most_wherever_it_stands(slots: int, rows: int, extra: int) -> None:
    for bad in range(0, rows, 7):
        backends = [Picky(f"fake:{number}", bad=[bad], error=UNCLEAR) for number in (1, 2)]
        async with plane_of(*backends, model=LARGE, slots=slots) as plane:
            caller = plane.call(range(rows))
            await asyncio.sleep(60)
            assert caller.values == [2 * row for row in range(rows) if row != bad]
            assert list(caller.reply.failures) == [(0, bad)]
            assert len(sizes(*backends)) <= 1 + extra


async def test_two_bad_rows_and_their_callers_are_found() -> None:
    backend = Picky(bad=[5, 42], error=UNCLEAR)
    async with plane_of(backend, model=LARGE) as plane:
        caller = plane.call(range(64))
        await asyncio.sleep(100)
        assert sorted(caller.reply.failures) == [(0, 5), (0, 42)]
        assert len(caller.values) == 62
        assert len(backend.sent) <= 1 + 2 * 17


async def test_if_all_rows_are_bad_each_gets_its_error() -> None:
    backend = Picky(bad=range(8), error=UNCLEAR)
    async with plane_of(backend, model=EIGHT) as plane:
        caller = plane.call(range(8))
        await asyncio.sleep(100)
        assert told(caller) == ([], [ModelFailed] * 8)
        assert plane.count("router_poison_rows_total", backend="fake") == 8


async def test_a_block_across_batches_loses_its_bad_rows_only() -> None:
    backend = Picky(bad=[10, 63, 64, 150], error=ROWS)
    async with plane_of(backend, model=LARGE, slots=16) as plane:
        caller = plane.call(range(200))
        await asyncio.sleep(100)
        assert sorted(row for _, row in caller.reply.failures) == [10, 63, 64, 150]
        assert len(caller.values) == 196


async def test_a_row_that_is_refused_alone_fails_at_once() -> None:
    backend = Picky(bad=[1], error=ROWS)
    async with plane_of(backend) as plane:
        caller = plane.call([1])
        await asyncio.sleep(10)
        assert told(caller) == ([], [InvalidArgument])
        assert len(backend.sent) == 1
        assert plane.count("router_splits_total", backend="fake") == 0


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UNCLEAR, Malformed("odd")])
async def test_where_the_replica_may_be_to_blame_another_one_gets_exactly_these_rows(error: BackendError) -> None:
    sick, well = Picky("sick:1", bad=[1], error=error), FakeBackend("well:1", service_s=1.0)
    async with plane_of(sick, well, model=EIGHT) as plane:
        caller = plane.call(range(4))
        await asyncio.sleep(10)
        assert caller.values == [0, 2, 4, 6]
        assert [sent.values for sent in well.sent] == [[0, 1, 2, 3]]
        assert well.sent[0].batch.parts[0].attempts == 1
        assert len(sick.sent) == 1


async def test_what_two_replicas_refuse_is_split_and_nonsense_of_two_fails() -> None:
    for error, answered, calls in ((UNCLEAR, [0, 4, 6], 6), (Malformed("odd"), [], 2)):
        backends = [Picky(f"fake:{number}", bad=[1], error=error) for number in (1, 2)]
        async with plane_of(*backends, model=EIGHT) as plane:
            caller = plane.call(range(4))
            await asyncio.sleep(30)
            assert caller.values == answered
            assert len(sizes(*backends)) == calls


async def test_what_every_replica_would_refuse_is_not_shown_to_another() -> None:
    first, second = Picky("a:1", bad=[1], error=ROWS), FakeBackend("b:1", service_s=1.0)
    async with plane_of(first, second, model=EIGHT) as plane:
        plane.call(range(4))
        await asyncio.sleep(1.5)
        assert {len(sent.values) for sent in first.sent[1:] + second.sent} == {2}
        await asyncio.sleep(30)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(Refused("x", NotFound, Blame.MODEL), NotFound), (Refused("x", ModelFailed, Blame.MODEL), ModelFailed)],
)
async def test_where_the_model_is_to_blame_the_rows_fail_at_once(error: BackendError, kind: type[RouterError]) -> None:
    first, second = Picky("a:1", bad=[1], error=error), FakeBackend("b:1")
    async with plane_of(first, second, model=EIGHT) as plane:
        caller = plane.call(range(4))
        await asyncio.sleep(5)
        assert told(caller) == ([], [kind] * 4)
        assert len(sizes(first, second)) == 1
        assert plane.count("router_failed_rows_total", backend="fake", reason="refused") == 4


@pytest.mark.parametrize(
    "error", [UNCLEAR, ROWS, Malformed("odd"), StreamLost("gone"), BatchTimeout("late"), BackendExhausted("full")]
)
async def test_a_model_with_side_effects_sees_a_row_once_whatever_happens(error: BackendError) -> None:
    backends = [Picky(f"fake:{number}", bad=[1], error=error) for number in (1, 2)]
    async with plane_of(*backends, model={**EIGHT, "retries": 0}) as plane:
        caller = plane.call(range(4))
        await asyncio.sleep(30)
        assert len(caller.reply.failures) == 4
        assert len(sizes(*backends)) == 1


async def test_a_row_that_kills_replicas_kills_three_and_its_neighbours_survive() -> None:
    backends = [Picky(f"fake:{number}", bad=[3], error=StreamLost("gone")) for number in (1, 2)]
    async with plane_of(*backends, model=EIGHT) as plane:
        caller = plane.call(range(8))
        await asyncio.sleep(60)
        assert caller.values == [2 * row for row in range(8) if row != 3]
        assert isinstance(caller.reply.failures[0, 3], Unavailable)
        kills = [sent.values for backend in backends for sent in backend.sent if 3 in sent.values]
        assert sorted(len(values) for values in kills) == [1, 8, 8]
        assert plane.count("router_failed_rows_total", backend="fake", reason="lost") == 1


async def test_a_split_piece_that_is_lost_is_sent_again_as_it_is() -> None:
    losses = iter([True])
    backend = Rules(
        lambda sent: (
            ROWS if 7 in sent.values else StreamLost("gone") if len(sent.values) == 4 and next(losses, False) else None
        )
    )
    async with plane_of(backend, model=EIGHT) as plane:
        caller = plane.call(range(8))
        await asyncio.sleep(60)
        assert [sent.values for sent in backend.sent][1:3] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert len(caller.values) == 7
        assert len([sent for sent in backend.sent if sent.values == [0, 1, 2, 3]]) == 2


async def test_back_pressure_without_end_is_tried_again_within_the_budget_only() -> None:
    backend = Picky(bad=[1], error=BackendExhausted("full"), service_s=0.0)
    async with plane_of(backend, model={"max_batch_size": 1}) as plane:
        first, second = plane.call([1]), plane.call([1])
        await asyncio.sleep(20)
        assert told(first) == told(second) == ([], [ResourceExhausted])
        # Three attempts of the first row; the second's retry is the third of the budget.
        assert len(backend.sent) == 5
        assert plane.count("router_retry_budget_refusals_total", backend="fake") == 1
        assert plane.count("router_failed_rows_total", backend="fake", reason="exhausted") == 2


# -- answers with bad rows -------------------------------------------------------------------------------------------


async def test_rows_that_a_backend_names_fail_and_cost_no_call() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        callers = [plane.call([0, 1, 2]), plane.call([3]), plane.call([4, 5])]
        await settle()
        backend.sent[0].answer(row_errors='{"1": "one", "3": "three"}')
        await settle()
        assert [told(caller) for caller in callers] == [
            ([0, 4], [ModelFailed]),
            ([], [ModelFailed]),
            ([8, 10], []),
        ]
        assert callers[0].reply.failures[0, 1].message == "one"
        assert callers[1].reply.failures[0, 0].message == "three"
        assert len(backend.sent) == 1
        assert plane.count("router_failed_rows_total", backend="fake", reason="row_errors") == 2
        assert plane.count("router_poison_rows_total", backend="fake") == 0


async def test_row_errors_that_name_no_row_of_the_batch_are_nonsense() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        caller = plane.call([0, 1])
        await settle()
        backend.sent[0].answer(row_errors='{"2": "whose?"}')
        await settle()
        assert told(caller) == ([], [ModelFailed] * 2)


def nan_at(sent: Sent, *rows: int) -> tuple[Tensor, ...]:
    values = [float("nan") if row in rows else 2 * value for row, value in enumerate(sent.values)]
    return (Tensor("output", "FP32", (len(values),), struct.pack(f"<{len(values)}f", *values)),)


async def test_an_answer_with_nan_where_it_is_forbidden_is_asked_for_elsewhere() -> None:
    sick, well = FakeBackend("sick:1"), FakeBackend("well:1")
    async with plane_of(sick, well, model={**EIGHT, "allow_nan": False}) as plane:
        caller = plane.call([0, 1, 2])
        await settle()
        sick.sent[0].answer(nan_at(sick.sent[0], 1))
        await settle()
        assert told(caller) == ([], [])
        well.sent[0].answer()
        await settle()
        assert caller.values == [0, 2, 4]
        assert plane.count("router_batches_total", backend="fake", outcome="Malformed") == 1


async def test_rows_that_two_replicas_answer_with_nan_fail_alone() -> None:
    first, second = FakeBackend("a:1"), FakeBackend("b:1")
    async with plane_of(first, second, model={**EIGHT, "allow_nan": False}) as plane:
        caller = plane.call([0, 1, 2])
        for backend in (first, second):
            await settle()
            backend.sent[0].answer(nan_at(backend.sent[0], 1))
        await settle()
        assert told(caller) == ([0, 4], [ModelFailed])
        assert "NaN or infinity" in caller.reply.failures[0, 1].message
        assert plane.count("router_failed_rows_total", backend="fake", reason="not_finite") == 1


async def test_nan_is_handed_out_where_it_is_allowed() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        caller = plane.call([0, 1])
        await settle()
        backend.sent[0].answer(nan_at(backend.sent[0], 0))
        await settle()
        assert len(caller.values) == 2


async def test_the_configured_output_may_not_be_missing() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend, model={"vector_output": "score"}) as plane:
        caller = plane.call([0, 1])
        await asyncio.sleep(3)
        assert told(caller) == ([], [ModelFailed] * 2)
        assert plane.count("router_batches_total", backend="fake", outcome="Malformed") == 1


# -- tenants full of bad rows ------------------------------------------------------------------------------------------


def call_of(plane: Plane, tenant: str, *values: float) -> RecordingReply:
    reply, now, plain = RecordingReply(), plane.loop.time(), make_block(*values)
    call = plane.plane.open(reply, plain.rows, 60.0)
    block = Block(plain.key, 0, 0, plain.rows, plain.inputs, plain.row_bytes, now, now + 60.0, call, tenant)
    plane.plane.infer(call, [block])
    return reply


async def tenants_of_next_batches(plane: Plane, backend: FakeBackend) -> list[list[str]]:
    """Let two tenants wait for a slot together, and see how they are sent."""
    call_of(plane, "busy", 1)
    await settle()
    sent = len(backend.sent)
    for tenant in ("good", "bad", "good", "bad"):
        call_of(plane, tenant, 1)
    await asyncio.sleep(5)
    return [sorted({part.block.tenant for part in one.batch.parts}) for one in backend.sent[sent:]]


async def test_a_tenant_full_of_bad_rows_is_batched_with_itself_for_a_minute() -> None:
    backend = Picky(bad=[BAD], error=ROWS)
    async with plane_of(backend, model=EIGHT) as plane:
        for _ in range(4):
            call_of(plane, "bad", BAD)
            await asyncio.sleep(2)
        assert await tenants_of_next_batches(plane, backend) == [["bad", "good"]]
        call_of(plane, "bad", BAD)
        await asyncio.sleep(2)
        apart_since = plane.loop.time() - 1.0
        assert await tenants_of_next_batches(plane, backend) == [["good"], ["bad"]]
        await asyncio.sleep(apart_since + 59.9 - plane.loop.time())
        assert len(await tenants_of_next_batches(plane, backend)) == 1  # it was over when the slot came
        assert plane.count("router_poison_rows_total", backend="fake") == 5


async def test_rows_that_the_backend_names_put_no_tenant_apart() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        for _ in range(6):
            call_of(plane, "bad", BAD)
            await settle()
            backend.sent[-1].answer(row_errors='{"0": "bad"}')
            await settle()
        backend.service_s = 1.0
        assert await tenants_of_next_batches(plane, backend) == [["bad", "good"]]


# -- the lane --------------------------------------------------------------------------------------------------------


async def until_split(backend: FakeBackend) -> None:
    """Refuse the batch that is in flight; afterwards its first half is."""
    await settle()
    backend.sent[-1].fail(ROWS)
    await settle()


async def test_pieces_go_before_the_queue_and_take_a_quarter_of_the_slots() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=LARGE, slots=8) as plane:
        plane.call(range(64))
        await settle()
        for value in range(1000, 1000 + 64 * 9):
            plane.call([value])
        await settle()
        assert plane.count("router_queued_rows") == 64 * 2
        backend.sent[0].fail(ROWS)
        await settle()
        assert [len(sent.values) for sent in backend.sent[8:]] == [32]
        for sent in backend.sent[1:8]:
            sent.answer()
        await settle()
        assert [len(sent.values) for sent in backend.sent[9:]] == [32, 64, 64]
        for sent in backend.sent[8:]:
            sent.answer()
        await settle()


async def test_of_a_single_slot_pieces_take_every_second_batch_while_rows_wait() -> None:
    backend = Rules(lambda sent: ROWS if BAD in sent.values else None)
    async with plane_of(backend, model=EIGHT) as plane:
        bad = plane.call([BAD] * 8)
        await settle()
        others = [plane.call([float(number)] * 8) for number in range(3)]
        await asyncio.sleep(6.5)
        assert [BAD in sent.values for sent in backend.sent] == [True, True, False, True, False, True, False]
        assert [told(other)[0] for other in others[:2]] == [[0.0] * 8, [2.0] * 8]
        await asyncio.sleep(12)
        assert len(bad.reply.failures) == 8
        assert len(backend.sent) == 15 + 3


async def test_rows_in_pieces_are_in_the_bound_of_their_key() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT, limits={"max_queued_rows": 8}) as plane:
        plane.call(range(8))
        await settle()
        backend.sent[0].fail(ROWS)
        await settle()  # four rows of it wait, four are sent
        taken, refused = plane.call(range(10, 14)), plane.call([14])
        assert isinstance(refused.reply.failures[0, 0], ResourceExhausted)
        backend.sent[1].answer()
        await settle()
        later = plane.call([15])
        for _ in range(20):
            await settle()
            for sent in backend.sent:
                if not sent.future.done():
                    sent.answer()
        assert (taken.values, later.values) == ([20, 22, 24, 26], [30])


async def test_without_a_limit_of_slots_sixteen_pieces_fly_at_once() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model={**LARGE, "max_batch_size": 1024}, slots=0) as plane:
        plane.call(range(1024))
        await asyncio.sleep(1)
        await until_split(backend)
        assert [len(sent.values) for sent in backend.sent[1:]] == [128] * 8
        for sent in backend.sent[1:4]:
            sent.fail(ROWS)
        await settle()
        assert [len(sent.values) for sent in backend.sent[9:]] == [16] * 11
        for sent in backend.sent[4:]:
            if not sent.future.done():
                sent.answer()
        for _ in range(30):
            await settle()
            for sent in backend.sent:
                if not sent.future.done():
                    sent.answer()


async def test_a_cancelled_row_leaves_its_piece_at_once_and_what_remains_goes_on() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        callers = [plane.call([value]) for value in range(8)]
        await until_split(backend)
        assert plane.count("router_queued_rows") == 4
        callers[4].call.cancel()
        callers[6].call.cancel()
        assert plane.count("router_queued_rows") == 2
        backend.sent[1].answer()
        await settle()
        assert backend.sent[2].values == [5, 7]
        backend.sent[2].answer()
        await settle()
        assert [told(caller)[0] for caller in callers] == [[0], [2], [4], [6], [], [10], [], [14]]


async def test_a_piece_whose_rows_all_left_is_never_sent() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        stays, leaves = plane.call(range(4)), plane.call(range(4, 8))
        await until_split(backend)
        leaves.call.cancel()
        assert pieces(plane) == "0 pieces>"
        backend.sent[1].answer()
        await settle()
        assert len(backend.sent) == 2
        assert len(stays.values) == 4


async def test_a_call_in_the_lane_is_answered_at_its_deadline() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        patient = plane.call(range(4), timeout_s=60.0)
        waits = plane.call([4, 5], timeout_s=5.0)
        neighbour = plane.call([6, 7], timeout_s=60.0)
        await until_split(backend)
        await asyncio.sleep(10)
        assert waits.reply.ended_at == 5.0
        assert isinstance(waits.reply.closed_by, DeadlineExceeded)
        backend.sent[1].answer()
        await settle()
        assert backend.sent[2].values == [6, 7]
        backend.sent[2].answer()
        await settle()
        assert (len(patient.values), len(neighbour.values)) == (4, 2)


async def test_a_piece_whose_time_is_up_when_its_slot_comes_is_not_sent() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        plane.call(range(4))
        late = plane.call(range(4, 8), timeout_s=5.0)
        await until_split(backend)
        plane.loop.call_at(5.0, backend.sent[1].answer)
        await asyncio.sleep(10)
        assert isinstance(late.reply.closed_by, DeadlineExceeded)
        assert len(backend.sent) == 2
        assert pieces(plane) == "0 pieces>"


async def test_rows_in_the_lane_count_in_the_processs_bound() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT, limits={"max_queued_bytes": 32}) as plane:
        plane.call(range(8))
        await until_split(backend)
        refused = plane.call(range(8))
        assert told(refused) == ([], [ResourceExhausted] * 8)
        accepted = plane.call(range(4))
        for _ in range(5):
            backend.sent[-1].answer()
            await settle()
        assert len(accepted.values) == 4


async def test_a_leaving_router_waits_for_the_lane() -> None:
    backend = Picky(bad=[7], error=ROWS)
    async with plane_of(backend, model=EIGHT) as plane:
        caller = plane.call(range(8))
        await asyncio.sleep(1.5)
        plane.plane.refuse_new()
        await plane.plane.wait_until_idle()
        assert (len(caller.values), len(caller.reply.failures)) == (7, 1)


async def test_closing_fails_what_is_in_the_lane() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT) as plane:
        flying, waiting = plane.call(range(4)), plane.call(range(4, 8))
        await until_split(backend)
        await plane.plane.aclose()
        assert isinstance(flying.reply.closed_by, Unavailable)
        assert isinstance(waiting.reply.closed_by, Unavailable)
        assert pieces(plane) == "0 pieces>"


async def test_no_hold_applies_to_the_lane() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model={**EIGHT, "max_queue_delay_s": 5.0}, slots=0) as plane:
        plane.call(range(8))
        await settle()
        at = plane.loop.time()
        backend.sent[0].fail(ROWS)
        await settle()
        assert [sent.at for sent in backend.sent[1:]] == [at] * 8
        for sent in backend.sent[1:]:
            sent.answer()
        await settle()


async def test_a_batch_for_another_replica_waits_while_that_is_busy() -> None:
    sick, well = FakeBackend("sick:1"), FakeBackend("well:1")
    async with plane_of(sick, well, model={"max_batch_size": 4}) as plane:
        plane.call(range(4))
        plane.call(range(4, 8))
        await settle()
        sick.sent[0].fail(UNCLEAR)
        await asyncio.sleep(30)
        assert (len(sick.sent), len(well.sent)) == (1, 1)
        well.sent[0].answer()
        await settle()
        assert well.sent[1].values == [0, 1, 2, 3]
        well.sent[1].answer()
        await settle()


async def test_a_batch_for_another_replica_takes_any_when_that_goes_away() -> None:
    sick, well = FakeBackend("sick:1"), FakeBackend("well:1")
    async with plane_of(sick, well, model={"max_batch_size": 4}) as plane:
        caller = plane.call(range(4))
        plane.call(range(4, 8))
        await settle()
        sick.sent[0].fail(UNCLEAR)
        await settle()
        well.set_ready(is_ready=False)
        await settle()
        assert sick.sent[1].values == [0, 1, 2, 3]
        sick.sent[1].answer()
        well.sent[0].answer()
        await settle()
        assert caller.values == [0, 2, 4, 6]


async def test_the_faster_of_two_replicas_gets_a_lone_batch() -> None:
    slow, fast = FakeBackend("slow:1", service_s=2.0), FakeBackend("fast:1", service_s=1.0)
    async with plane_of(slow, fast) as plane:
        for _ in range(12):
            plane.call(range(8))
            await asyncio.sleep(5)
        before = len(slow.sent), len(fast.sent)
        assert before == (12, 12)
        plane.call([1])
        await asyncio.sleep(5)
        assert (len(slow.sent), len(fast.sent)) == (12, 13)


async def test_keys_with_pieces_are_not_idle() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=EIGHT, limits={"key_idle_s": 600}) as plane:
        caller = plane.call(range(8), timeout_s=5000.0)
        await settle()
        backend.set_ready(is_ready=False)
        backend.sent[0].fail(ROWS)
        await asyncio.sleep(2000)
        assert "1 keys" in repr(plane.plane)
        backend.set_ready(is_ready=True)
        for _ in range(2):
            await settle()
            backend.sent[-1].answer()
        await settle()
        assert len(caller.values) >= 4
        caller.call.cancel()
        for sent in backend.sent:
            if not sent.future.done():
                sent.answer()
        await settle()
