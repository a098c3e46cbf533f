"""Single flight through the data plane, in virtual time: first by example, then with whatever may happen at once."""

import asyncio
import gc
import random
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.types import BatchAnswer, BatchKey, Block, Part
from router.dataplane import Call
from router.errors import (
    BackendExhausted,
    DeadlineExceeded,
    InvalidArgument,
    ModelFailed,
    Refused,
    ResourceExhausted,
    RouterError,
    StreamLost,
)
from router.servicers.convert import explain
from tests.builders import make_block, make_key
from tests.unit.router.fakes import FakeBackend, RecordingReply
from tests.unit.router.test_dataplane import Plane, plane_of, settle
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

SHARED = {"deterministic": True}
CACHED = {"deterministic": True, "cache_ttl_s": 10.0}


class ExplainingReply(RecordingReply):
    """Also keeps the explanation of every part."""

    def __init__(self) -> None:
        super().__init__()
        self.explanations: list[tuple[float, float, str, int]] = []

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        told = explain(part, answer)
        self.explanations.append((told.queued_s, told.backend_s, told.batch_id, told.attempts))
        super().answered(part, answer, offset, is_last=is_last)


class LeavingReply(RecordingReply):
    """Gives its call up at the first answer."""

    call: Call

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        super().answered(part, answer, offset, is_last=is_last)
        self.call.cancel()


class Caller:
    """One call of one block of rows."""

    def __init__(
        self,
        plane: Plane,
        *values: float,
        timeout_s: float = 60.0,
        tenant: str = "default",
        is_batch_class: bool = False,
        key: BatchKey | None = None,
    ) -> None:
        self.reply = ExplainingReply()
        self.asked = values
        self.call: Call = plane.plane.open(self.reply, len(values), timeout_s)
        plain, now = make_block(*values, key=key), plane.loop.time()
        block = Block(
            plain.key, 0, 0, plain.rows, plain.inputs, 4, now, now + timeout_s, self.call, tenant, is_batch_class
        )
        plane.plane.infer(self.call, [block])

    @property
    def values(self) -> list[float]:
        return [self.reply.values[place] for place in sorted(self.reply.values)]

    @property
    def errors(self) -> list[RouterError]:
        return list(self.reply.failures.values())


async def test_equal_rows_that_wait_at_the_same_time_are_computed_once() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        callers = [Caller(plane, 1, 2), Caller(plane, 2, 3), Caller(plane, 1, 1)]
        await settle()
        assert [sent.values for sent in backend.sent] == [[1, 2, 3]]
        backend.sent[0].answer()
        await settle()
        assert [caller.values for caller in callers] == [[2, 4], [4, 6], [2, 2]]
        assert plane.count("router_rows_total") == 3
        assert plane.count("router_shared_rows_total", backend="fake") == 3


async def test_without_the_setting_every_row_is_computed() -> None:
    backend = FakeBackend()
    async with plane_of(backend) as plane:
        Caller(plane, 1, 1)
        Caller(plane, 1)
        await settle()
        assert [sent.values for sent in backend.sent] == [[1, 1, 1]]
        backend.sent[0].answer()


async def test_rows_of_different_keys_are_never_shared() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        Caller(plane, 1, key=make_key(agent_type="a"))
        Caller(plane, 1, key=make_key(agent_type="b"))
        await settle()
        backend.sent[0].answer()
        await settle()
        assert [sent.values for sent in backend.sent] == [[1], [1]]
        backend.sent[1].answer()


async def test_a_row_joins_an_equal_one_in_flight_and_is_told_of_the_shared_batch() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        leader = Caller(plane, 1)
        await asyncio.sleep(3)
        follower = Caller(plane, 1)
        await asyncio.sleep(2)
        backend.sent[0].answer()
        await settle()
        batch_id = backend.sent[0].batch.id
        assert leader.reply.explanations == [(0, 5, batch_id, 1)]
        assert follower.reply.explanations == [(0, 2, batch_id, 1)]
        assert len(backend.sent) == 1


async def test_followers_are_served_when_the_caller_who_led_gives_up_and_unwanted_rows_leave_the_queue() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        Caller(plane, 9)
        await settle()
        leader, follower = Caller(plane, 1, 2, 3), Caller(plane, 2)
        await settle()
        leader.call.cancel()
        assert "1 rows queued" in repr(plane.plane)
        backend.sent[0].answer()
        await settle()
        assert backend.sent[1].values == [2]
        backend.sent[1].answer()
        await settle()
        assert follower.values == [4]
        assert leader.reply.values == {}


async def test_followers_are_served_when_the_caller_who_led_runs_out_of_time() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        Caller(plane, 9)
        await settle()
        leader, follower = Caller(plane, 1, timeout_s=2.0), Caller(plane, 1, timeout_s=8.0)
        hasty = Caller(plane, 1, timeout_s=1.0)
        await asyncio.sleep(5)
        assert (leader.reply.ended_at, hasty.reply.ended_at) == (2.0, 1.0)
        assert isinstance(leader.reply.closed_by, DeadlineExceeded)
        backend.sent[0].answer()
        await settle()
        assert backend.sent[1].values == [1]
        backend.sent[1].answer()
        await settle()
        assert follower.values == [2]


async def test_everybodys_deadline_holds_in_flight_too() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        leader = Caller(plane, 1, timeout_s=2.0)
        await settle()
        early, late = Caller(plane, 1, timeout_s=1.0), Caller(plane, 1, timeout_s=5.0)
        await asyncio.sleep(10)
        assert [one.reply.ended_at for one in (leader, early, late)] == [2.0, 1.0, 5.0]
        backend.sent[0].answer()
        await settle()


async def test_a_row_that_nobody_waits_for_any_more_is_computed_anew_for_the_next() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED, slots=2) as plane:
        gone = Caller(plane, 1)
        await settle()
        gone.call.cancel()
        again = Caller(plane, 1)
        await settle()
        assert [sent.values for sent in backend.sent] == [[1], [1]]
        backend.sent[0].fail(StreamLost("gone"))
        backend.sent[1].answer()
        await settle()
        assert again.values == [2]


async def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=CACHED) as plane:
        callers = [Caller(plane, 1), Caller(plane, 1)]
        await settle()
        backend.sent[0].fail(Refused("bad row", InvalidArgument))
        await settle()
        assert [[error.message for error in caller.errors] for caller in callers] == [["bad row"], ["bad row"]]
        again = Caller(plane, 1)
        await settle()
        backend.sent[1].answer()
        await settle()
        assert again.values == [2]


async def test_a_lost_row_is_tried_again_for_all_who_wait_and_may_be_joined_meanwhile() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        leader = Caller(plane, 1)
        await settle()
        backend.sent[0].fail(StreamLost("gone"))
        await settle()
        follower = Caller(plane, 1, tenant="other")
        await asyncio.sleep(1)
        backend.sent[1].answer()
        await settle()
        assert (leader.values, follower.values) == ([2], [2])
        assert follower.reply.explanations[0][3] == 2
        assert len(backend.sent) == 2


async def test_a_refused_block_leaves_nothing_to_follow() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED, limits={"max_queued_rows": 2}) as plane:
        Caller(plane, 9)
        await settle()
        Caller(plane, 1)
        refused = Caller(plane, 1, 2, 3)
        assert [type(error) for error in refused.errors] == [ResourceExhausted] * 3
        taken = Caller(plane, 2)
        backend.sent[0].answer()
        await settle()
        assert backend.sent[1].values == [1, 2]
        backend.sent[1].answer()
        await settle()
        assert taken.values == [4]


async def test_rows_that_follow_are_bounded_like_rows_that_wait() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED, limits={"max_queued_rows": 2}) as plane:
        callers = [Caller(plane, 1) for _ in range(4)]
        assert [type(error) for error in callers[3].errors] == [ResourceExhausted]
        assert plane.count("router_refusals_total", reason="queue_rows") == 1
        assert isinstance(Caller(plane, 1, 1, 1, 1).errors[0], InvalidArgument)
        callers[2].call.cancel()
        assert Caller(plane, 1).errors == []
        await settle()
        backend.sent[0].answer()


async def test_a_waiting_row_of_another_tenant_is_not_followed() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        Caller(plane, 9)
        await settle()
        one, two = Caller(plane, 1, tenant="one"), Caller(plane, 1, tenant="two")
        backend.sent[0].answer()
        await settle()
        assert backend.sent[1].values == [1, 1]
        backend.sent[1].answer()
        await settle()
        assert (one.values, two.values) == ([2], [2])


async def test_a_call_that_its_first_failed_row_ends_harms_no_neighbour() -> None:
    """As OIP requests do: told of a failure, the reply cancels its call, with more rows of it still to be told of."""
    backend = FakeBackend()
    async with plane_of(backend, model={**SHARED, "retries": 0}) as plane:
        caller = Caller(plane, 1, 2, 1)
        neighbour = Caller(plane, 2)

        class GivesUp(ExplainingReply):
            def failed(self, *_: object, is_last: bool) -> None:
                caller.call.cancel()

        caller.reply.__class__ = GivesUp
        await settle()
        backend.sent[0].fail(BackendExhausted("full"))
        await settle()
        assert [type(error) for error in neighbour.errors] == [ResourceExhausted]


async def test_a_kept_answer_comes_at_once_until_it_is_too_old() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=CACHED) as plane:
        Caller(plane, 1, 2)
        await settle()
        backend.sent[0].answer()
        await asyncio.sleep(9)
        hit = Caller(plane, 1, 2, tenant="other")
        assert hit.values == [2, 4]
        assert hit.reply.explanations == [(0, 0, backend.sent[0].batch.id, 0)]
        assert plane.count("router_cached_rows_total", backend="fake") == 2
        await asyncio.sleep(1.001)
        Caller(plane, 1, 2)
        await settle()
        assert backend.sent[1].values == [1, 2]
        backend.sent[1].answer()
        await settle()


async def test_a_caller_who_goes_at_the_first_known_answer_is_told_no_more() -> None:
    """As a request for an output that the model does not have goes."""
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend, model=CACHED) as plane:
        for value in (1, 2):
            Caller(plane, value)
            await asyncio.sleep(2)
        reply = LeavingReply()
        reply.call = plane.plane.open(reply, 2, 60.0)
        block = make_block(1, 2)
        block.arrived_at, block.deadline, block.recipient = plane.loop.time(), plane.loop.time() + 60.0, reply.call
        plane.plane.infer(reply.call, [block])
        assert list(reply.values.values()) == [2]


async def test_known_following_and_new_rows_of_one_block_each_go_their_way() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=CACHED) as plane:
        Caller(plane, 1, 2)
        await settle()
        backend.sent[0].answer()
        await settle()
        Caller(plane, 3)
        await settle()
        mixed = Caller(plane, 1, 4, 3, 2, 5)
        assert mixed.values == [2, 4]
        backend.sent[1].answer()
        await settle()
        assert backend.sent[2].values == [4, 5]
        backend.sent[2].answer()
        await settle()
        assert mixed.values == [2, 8, 6, 4, 10]


async def test_flights_and_kept_answers_go_with_their_key() -> None:
    backend = FakeBackend(service_s=1.0)
    async with plane_of(backend, model={**CACHED, "cache_ttl_s": 1e6}, limits={"key_idle_s": 60}) as plane:
        Caller(plane, 1)
        await asyncio.sleep(50)
        Caller(plane, 1)
        await asyncio.sleep(50)
        assert "1 keys" in repr(plane.plane)
        await asyncio.sleep(20)
        assert " 0 keys" in repr(plane.plane)
        Caller(plane, 1)
        await asyncio.sleep(2)
        assert len(backend.sent) == 2


async def test_nothing_of_an_answered_or_abandoned_call_waits_for_the_garbage_collector() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=CACHED) as plane:
        gc.disable()
        try:
            things: list[weakref.ref[Any]] = []
            for value in range(50):
                one, two, gone = Caller(plane, value, value + 0.5), Caller(plane, value), Caller(plane, -value - 1)
                await settle()
                gone.call.cancel()
                things += [weakref.ref(part.block) for part in backend.sent[-1].batch.parts]
                backend.sent.pop().answer()
                await settle()
                hit = Caller(plane, value)
                assert (one.values, two.values, hit.values) == ([2 * value, 2 * value + 1], [2 * value], [2 * value])
                things += [weakref.ref(caller.reply) for caller in (one, two, gone, hit)]
                del one, two, gone, hit
            await settle()
            assert [thing() for thing in things if thing()] == []
        finally:
            gc.enable()


async def test_a_router_that_stops_fails_followers_too() -> None:
    backend = FakeBackend()
    async with plane_of(backend, model=SHARED) as plane:
        callers = [Caller(plane, 1), Caller(plane, 1)]
        await settle()
        await plane.plane.aclose()
        assert all(caller.reply.closed_by is not None for caller in callers)


# -- whatever may happen at once ---------------------------------------------------------------------------------------

VALUES = range(6)
ANSWERS = ["answer", "answer", "answer", "lose", "refuse"]


async def _play(seed: int, model: dict[str, Any]) -> None:
    chance = random.Random(seed)
    backend = FakeBackend()
    async with plane_of(backend, model=model, limits={"max_queued_rows": 12}, slots=2) as plane:
        callers: list[Caller] = []
        abandoned: set[Caller] = set()
        for _ in range(chance.randrange(5, 60)):
            what = chance.choice(["ask", "ask", "ask", "give up", "backend", "backend", "wait"])
            if what == "ask":
                callers.append(_ask(plane, chance))
            elif what == "give up" and callers:
                caller = chance.choice(callers)
                if caller.reply.ended_at is None:
                    abandoned.add(caller)
                    caller.call.cancel()
            elif what == "backend":
                _reply(backend, chance)
            await (asyncio.sleep(chance.random()) if what == "wait" else settle())
            _check_sent(backend)
        while any(not sent.future.done() for sent in backend.sent):
            _reply(backend, chance)
            await asyncio.sleep(3)
        await asyncio.sleep(30)
        for caller in callers:
            _check_end(caller, is_abandoned=caller in abandoned)


def _ask(plane: Plane, chance: random.Random) -> Caller:
    values = [chance.choice(VALUES) for _ in range(chance.randrange(1, 6))]
    tenant, is_batch_class = chance.choice(["one", "two"]), chance.random() < 0.3
    return Caller(
        plane, *values, timeout_s=chance.choice([0.5, 2.0, 20.0]), tenant=tenant, is_batch_class=is_batch_class
    )


def _reply(backend: FakeBackend, chance: random.Random) -> None:
    flying = [sent for sent in backend.sent if not sent.future.done()]
    if flying:
        sent = chance.choice(flying)
        how = chance.choice(ANSWERS)
        if how == "answer":
            sent.answer()
        else:
            sent.fail(StreamLost("gone") if how == "lose" else Refused("bad"))


def _check_sent(backend: FakeBackend) -> None:
    """A row that somebody waits for is with the backend once; each line of two tenants and classes may lead one.

    Rows of a lost batch that nobody wants any more may come again with their neighbours.
    """
    lines: list[tuple[bytes, str, bool]] = []
    for sent in backend.sent:
        for part in () if sent.future.done() else sent.batch.parts:
            block, flight = part.block, part.block.recipient.flight  # type: ignore[attr-defined]
            rows = range(part.first, part.first + part.rows)
            lines += [(flight.digests[row], block.tenant, block.is_batch_class) for row in rows if flight.seats[row]]
    assert len(set(lines)) == len(lines)


def _check_end(caller: Caller, *, is_abandoned: bool) -> None:
    """One end for every row: its own answer, a failure, or the end of the call. The reply itself refuses a second."""
    reply = caller.reply
    for (_, row), value in reply.values.items():
        assert value == 2 * caller.asked[row]
    assert not reply.values.keys() & reply.failures.keys()
    if is_abandoned:
        assert reply.ended_at is None
    else:
        assert reply.ended_at is not None
        told = len(reply.values) + len(reply.failures)
        assert reply.closed_by is not None or told == len(caller.asked)
        assert all(isinstance(error, (ModelFailed, RouterError)) for error in caller.errors)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), cache_ttl_s=st.sampled_from([0.0, 0.5, 20.0]))
def test_whatever_happens_every_row_of_every_caller_has_one_end_and_its_own_answer(
    seed: int, cache_ttl_s: float
) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(_play(seed, {"deterministic": True, "cache_ttl_s": cache_ttl_s}))
