"""RouterClient against a scripted router, over real gRPC on loopback."""

import asyncio
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client import Agent, AgentError, RouterClient
from router_client.health import main
from tests.fakes import FakeRouter, FakeStream, echo, refusal

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024

BLOCKING = 8 * MIB
"""Bytes of a call whose write blocks while the router does not read: measured, 2 MiB pass and 4 do not."""


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    """A router that answers nothing by itself."""
    async with FakeRouter() as router:
        yield router


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[RouterClient]:
    """A client of `router`."""
    async with RouterClient(router.target) as client:
        yield client


def block(*values: float, model: str = "m") -> pb.Block:
    """One value a row."""
    return pb.Block(model_name=model, rows=len(values), dim=1, vectors=struct.pack(f"<{len(values)}f", *values))


def big_block(size: int) -> pb.Block:
    """One row of ``size`` bytes."""
    return pb.Block(model_name="big", rows=1, dim=size // 4, vectors=bytes(size))


def answer(call: pb.Call, first: int, *values: float, done: bool = False) -> pb.Answer:
    """Rows of the call's only block."""
    outputs = struct.pack(f"<{len(values)}f", *values)
    return pb.Answer(call_id=call.call_id, first_row=first, rows=len(values), outputs=outputs, done=done)


def values(answers: list[pb.Answer]) -> list[float]:
    """The outputs of all answers, one value a row, by row."""
    ordered = sorted(answers, key=lambda answer: (answer.block, answer.first_row))
    return [value for answer in ordered for (value,) in struct.iter_unpack("<f", answer.outputs)]


def code(answers: list[pb.Answer]) -> str:
    """The code of a failed call."""
    last = answers[-1]
    assert (last.rows, last.done) == (0, True)
    assert not any(answer.done for answer in answers[:-1])
    return last.error.code


def spawn(work: Coroutine[Any, Any, list[pb.Answer]]) -> "asyncio.Task[list[pb.Answer]]":
    """Let a caller begin."""
    return asyncio.create_task(work)


async def collect(client: RouterClient, blocks: list[pb.Block]) -> list[pb.Answer]:
    """A caller of `stream`."""
    return [answer async for answer in client.stream(blocks)]


# One stream for all


async def test_a_call_is_answered(router: FakeRouter, client: RouterClient) -> None:
    router.script = echo
    answers = await client.infer([block(1, 2), block(3, model="n")], timeout_s=5)
    assert values(answers) == [1, 2, 3]
    assert [answer.done for answer in answers] == [False, True]


async def test_what_the_caller_says_reaches_the_router(router: FakeRouter, client: RouterClient) -> None:
    caller = spawn(
        client.infer(
            [block(1)],
            timeout_s=30,
            priority_class=pb.PRIORITY_CLASS_BATCH,
            tenant="blue",
            explain=True,
            request_id="r-1",
        )
    )
    stream = await router.next_stream()
    call = await stream.next_call()
    assert (call.priority_class, call.tenant, call.explain, call.request_id) == (2, "blue", True, "r-1")
    assert call.timeout_s == pytest.approx(30, abs=1)
    await stream.answer(*echo(call))
    assert values(await caller) == [1]


async def test_without_a_timeout_the_router_is_told_none(router: FakeRouter, client: RouterClient) -> None:
    caller = spawn(client.infer([block(1)]))
    stream = await router.next_stream()
    call = await stream.next_call()
    assert not call.HasField("timeout_s")
    await stream.answer(*echo(call))
    await caller


async def test_callers_share_one_stream_and_what_waits_for_a_write_goes_in_one_message(router: FakeRouter) -> None:
    router.script, router.holds = echo, True
    async with RouterClient(router.target) as client:
        stream = await router.next_stream()
        blocked = spawn(client.infer([big_block(BLOCKING)]))
        callers = [spawn(client.infer([block(value)])) for value in range(100)]
        await shown(client, "101 open, 100 ready")
        stream.go_on()
        answers = await asyncio.gather(blocked, *callers)
    assert [values(each) for each in answers[1:]] == [[value] for value in range(100)]
    assert [len(message.calls) for message in stream.messages] == [1, 100]
    assert router.streams == [stream]


async def test_a_message_is_at_most_1_mib_unless_one_call_is_larger(router: FakeRouter) -> None:
    router.script, router.holds = echo, True
    async with RouterClient(router.target) as client:
        stream = await router.next_stream()
        sizes = [BLOCKING, 400_000, 400_000, 400_000, 3 * MIB, 4, MIB - 1000, 4, 4]
        callers = [spawn(client.infer([big_block(size)])) for size in sizes]
        await shown(client, "9 open, 8 ready")
        stream.go_on()
        await asyncio.gather(*callers)
    assert [len(message.calls) for message in stream.messages] == [1, 2, 1, 1, 4]
    assert all(message.ByteSize() <= MIB for message in stream.messages if len(message.calls) > 1)


async def test_answers_out_of_order_find_their_callers(router: FakeRouter, client: RouterClient) -> None:
    callers = [spawn(client.infer([block(value)])) for value in range(3)]
    stream = await router.next_stream()
    calls = [await stream.next_call() for _ in callers]
    await stream.answer(*[part for call in reversed(calls) for part in echo(call)])
    assert [values(await caller) for caller in callers] == [[0], [1], [2]]


async def test_each_part_of_an_answer_is_streamed_as_it_arrives(router: FakeRouter, client: RouterClient) -> None:
    async with aclosing(client.stream([block(10, 11, 12, 13)])) as parts:
        first = asyncio.ensure_future(anext(parts))
        stream = await router.next_stream()
        call = await stream.next_call()
        await stream.answer(answer(call, 2, 12, 13))
        assert values([await first]) == [12, 13]
        await stream.answer(answer(call, 0, 10, 11, done=True))
        last = await anext(parts)
        assert (values([last]), last.done) == ([10, 11], True)
        assert [part async for part in parts] == []


async def test_infer_waits_for_the_last_part(router: FakeRouter, client: RouterClient) -> None:
    caller = spawn(client.infer([block(10, 11)]))
    stream = await router.next_stream()
    call = await stream.next_call()
    await stream.answer(answer(call, 1, 11))
    await stream.answer(answer(call, 0, 10, done=True))
    answers = await caller
    assert [part.first_row for part in answers] == [1, 0]
    assert values(answers) == [10, 11]


async def test_a_call_that_fails_half_way_keeps_its_answers(router: FakeRouter, client: RouterClient) -> None:
    caller = spawn(client.infer([block(10, 11)]))
    stream = await router.next_stream()
    call = await stream.next_call()
    await stream.answer(answer(call, 1, 11), refusal(call, "RESOURCE_EXHAUSTED"))
    answers = await caller
    assert values(answers) == [11]
    assert code(answers) == "RESOURCE_EXHAUSTED"


async def test_past_the_open_calls_of_one_stream_another_is_opened(router: FakeRouter) -> None:
    # Sixteen thousand calls may take a busy machine longer than a call usually waits for a router.
    async with RouterClient(router.target, router_wait_s=60) as client:
        callers = [spawn(client.infer([block(1)])) for _ in range(16_385)]
        first = await router.next_stream()
        second = await router.next_stream()
        call = await second.next_call()
        await second.answer(*echo(call))
        done, _ = await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)
        assert done == {callers[-1]}
        assert sum(len(message.calls) for message in second.messages) == 1
        assert first.is_half_closed.is_set() is False


# Cancels and deadlines


async def test_a_cancelled_caller_is_told_to_the_router_and_its_neighbour_is_unharmed(
    router: FakeRouter, client: RouterClient
) -> None:
    leaver, stayer = spawn(client.infer([block(1)])), spawn(client.infer([block(2)]))
    stream = await router.next_stream()
    left, stayed = await stream.next_call(), await stream.next_call()
    leaver.cancel()
    assert await stream.next_cancel() == left.call_id
    await stream.answer(*echo(left), *echo(stayed))  # the first one is late
    assert values(await stayer) == [2]
    assert leaver.cancelled()


async def test_a_closed_iterator_is_told_to_the_router(router: FakeRouter, client: RouterClient) -> None:
    async with aclosing(client.stream([block(1, 2)])) as parts:
        first = asyncio.ensure_future(anext(parts))
        stream = await router.next_stream()
        call = await stream.next_call()
        await stream.answer(answer(call, 0, 1))
        await first
    assert await stream.next_cancel() == call.call_id


async def test_a_call_cancelled_before_it_was_written_is_never_seen(router: FakeRouter) -> None:
    router.script, router.holds = echo, True
    async with RouterClient(router.target) as client:
        stream = await router.next_stream()
        callers = [spawn(client.infer([big_block(BLOCKING)])), *[spawn(client.infer([block(n)])) for n in range(3)]]
        await shown(client, "4 open, 3 ready")
        callers[2].cancel()
        await asyncio.wait([callers[2]])
        stream.go_on()
        await asyncio.gather(callers[0], callers[1], callers[3])
    assert [len(message.calls) for message in stream.messages] == [1, 2]
    assert not any(message.cancels for message in stream.messages)


async def test_ids_are_never_used_again(router: FakeRouter, client: RouterClient) -> None:
    router.script = echo
    for _ in range(3):
        await client.infer([block(1)])
    messages = router.streams[0].messages
    assert len({call.call_id for message in messages for call in message.calls}) == 3


async def test_a_call_is_failed_shortly_after_its_deadline_and_cancelled(
    router: FakeRouter, client: RouterClient
) -> None:
    patient = spawn(client.infer([block(2)], timeout_s=30))
    hurried = spawn(client.infer([block(1)], timeout_s=0.05))
    stream = await router.next_stream()
    calls = [await stream.next_call(), await stream.next_call()]
    assert code(await hurried) == "DEADLINE_EXCEEDED"
    assert await stream.next_cancel() == calls[1].call_id
    await stream.answer(*echo(calls[1]), *echo(calls[0]))
    assert values(await patient) == [2]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
async def test_a_call_without_any_time_is_not_sent(router: FakeRouter, client: RouterClient, timeout_s: float) -> None:
    assert code(await client.infer([block(1)], timeout_s=timeout_s)) == "DEADLINE_EXCEEDED"


async def test_a_timeout_that_is_no_number_is_refused(client: RouterClient) -> None:
    assert code(await client.infer([block(1)], timeout_s=float("nan"))) == "INVALID_ARGUMENT"


# Routers that come and go


async def test_without_a_router_a_call_is_unavailable_after_router_wait_s() -> None:
    async with FakeRouter() as router:
        target = router.target
    async with RouterClient(target, router_wait_s=0.05) as client:
        answers = await client.infer([block(1)], timeout_s=30)
        assert code(answers) == "UNAVAILABLE"
        assert answers[0].error.retry_pushback_ms == 1000
        assert await client.wait_connected(0) is False


async def test_a_deadline_before_router_wait_s_is_kept() -> None:
    async with FakeRouter() as router:
        target = router.target
    async with RouterClient(target, router_wait_s=30) as client:
        assert code(await client.infer([block(1)], timeout_s=0.05)) == "DEADLINE_EXCEEDED"


async def test_a_router_that_does_not_accept_the_stream_is_no_router(router: FakeRouter) -> None:
    router.accepts.clear()
    async with RouterClient(router.target, router_wait_s=0.05) as client:
        assert code(await client.infer([block(1)])) == "UNAVAILABLE"
        assert not client.is_connected
        router.accepts.set()
        assert await client.wait_connected(5)


async def test_calls_wait_for_a_router_that_starts_late(router: FakeRouter) -> None:
    await router.stop()
    router.script = echo
    async with RouterClient(router.target, router_wait_s=30) as client:
        callers = [spawn(client.infer([block(value)])) for value in range(3)]
        gone = spawn(client.infer([block(9)]))
        await asyncio.sleep(0)
        assert not client.is_connected
        gone.cancel()
        await router.start()
        assert [values(await caller) for caller in callers] == [[0], [1], [2]]
        assert client.is_connected
    assert [len(message.calls) for message in router.streams[0].messages] == [3]


async def test_the_time_spent_waiting_for_a_router_is_gone(router: FakeRouter) -> None:
    router.accepts.clear()
    async with RouterClient(router.target, router_wait_s=30) as client:
        caller = spawn(client.infer([block(1)], timeout_s=30))
        hurried = await client.infer([block(1)], timeout_s=0.05)
        assert code(hurried) == "DEADLINE_EXCEEDED"
        router.accepts.set()
        stream = await router.next_stream()
        call = await stream.next_call()
        assert call.timeout_s < 29.95
        await stream.answer(*echo(call))
        await caller


async def test_a_router_restarted_on_the_same_port_is_found_again(router: FakeRouter) -> None:
    router.script = echo
    async with RouterClient(router.target, router_wait_s=30) as client:
        assert values(await client.infer([block(1)])) == [1]
        await router.stop()
        await router.start()
        assert values(await client.infer([block(2)])) == [2]
    assert len(router.streams) == 2


async def test_a_call_whose_stream_is_cut_is_sent_once_more_under_a_new_id(
    router: FakeRouter, client: RouterClient
) -> None:
    caller = spawn(client.infer([block(1)]))
    stream = await router.next_stream()
    lost = await stream.next_call()
    await stream.end()
    stream = await router.next_stream()
    call = await stream.next_call()
    assert call.call_id != lost.call_id
    assert call.blocks == lost.blocks
    await stream.answer(*echo(call))
    assert values(await caller) == [1]


@pytest.mark.parametrize(
    "status", [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
async def test_a_stream_that_ends_is_lost_whatever_its_status(
    router: FakeRouter, client: RouterClient, status: grpc.StatusCode
) -> None:
    caller = spawn(client.infer([block(1)]))
    stream = await router.next_stream()
    await stream.next_call()
    await stream.end(status)
    stream = await router.next_stream()
    await stream.answer(*echo(await stream.next_call()))
    assert values(await caller) == [1]


@pytest.mark.parametrize("calling", [RouterClient.infer, collect])
async def test_rows_answered_before_the_cut_are_not_answered_again(
    router: FakeRouter, client: RouterClient, calling: Callable[..., Coroutine[Any, Any, list[pb.Answer]]]
) -> None:
    caller = spawn(calling(client, [block(10, 11, 12, 13, 14)]))
    stream = await router.next_stream()
    call = await stream.next_call()
    await stream.answer(answer(call, 1, 11), answer(call, 3, 13))
    await stream.end()
    stream = await router.next_stream()
    call = await stream.next_call()
    await stream.answer(answer(call, 3, -13))  # a model need not give the same answer twice
    await stream.answer(answer(call, 0, 10, -11, 12), answer(call, 4, 14, done=True))
    answers = await caller
    assert [(part.first_row, part.rows) for part in answers] == [(1, 1), (3, 1), (0, 1), (2, 1), (4, 1)]
    assert values(answers) == [10, 11, 12, 13, 14]
    assert [part.done for part in answers] == [False] * 4 + [True]


async def test_a_call_whose_stream_is_cut_twice_is_unavailable(router: FakeRouter, client: RouterClient) -> None:
    caller = spawn(client.infer([block(1)]))
    for _ in range(2):
        stream = await router.next_stream()
        await stream.next_call()
        await stream.end()
    answers = await caller
    assert code(answers) == "UNAVAILABLE"
    assert answers[0].error.retry_pushback_ms == 1000


async def test_a_call_that_was_never_written_has_lost_nothing(router: FakeRouter) -> None:
    router.holds = True
    async with RouterClient(router.target, router_wait_s=30) as client:
        large, small = spawn(client.infer([big_block(BLOCKING)])), spawn(client.infer([block(1)]))
        for _ in range(2):
            stream = await router.next_stream()
            await shown(client, "2 open, 1 ready")  # the large one is being written, the small one waits behind it
            await stream.end()
        assert code(await large) == "UNAVAILABLE"
        stream = await router.next_stream()
        stream.go_on()
        await stream.next_call()
        await stream.end()  # the first loss of the small one
        stream = await router.next_stream()
        stream.go_on()
        await stream.answer(*echo(await stream.next_call()))
        assert values(await small) == [1]


async def test_a_lost_call_does_not_wait_longer_than_router_wait_s(router: FakeRouter) -> None:
    async with RouterClient(router.target, router_wait_s=0.05) as client:
        caller = spawn(client.infer([block(1)]))
        stream = await router.next_stream()
        await stream.next_call()
        await router.stop()
        assert code(await caller) == "UNAVAILABLE"
        assert not client.is_connected


async def test_a_cancelled_call_is_not_sent_again(router: FakeRouter) -> None:
    async with RouterClient(router.target, router_wait_s=30) as client:
        leaver, stayer = spawn(client.infer([block(1)])), spawn(client.infer([block(2)]))
        stream = await router.next_stream()
        await stream.next_call()
        await stream.next_call()
        await router.stop()
        leaver.cancel()
        router.script = echo
        await router.start()
        assert values(await stayer) == [2]
    assert [len(message.calls) for message in router.streams[1].messages] == [1]


# Drain


async def test_new_calls_go_to_another_router_and_the_old_stream_stays_until_its_calls_are_answered() -> None:
    async with FakeRouter() as one, FakeRouter() as two, RouterClient(f"ipv4:{one.target},{two.target}") as client:
        old, new, stream = await first_stream(one, two)
        caller = spawn(client.infer([block(1)]))
        call = await stream.next_call()
        new.script, old.is_draining = echo, True
        await stream.drain()
        await new.next_stream()
        await shown(client, "<Stream accepting")
        assert values(await client.infer([block(2)])) == [2]
        assert not stream.is_half_closed.is_set()
        await stream.answer(*echo(call))
        assert values(await caller) == [1]
        await stream.is_half_closed.wait()
        assert len(stream.messages) == 1
        assert client.is_connected


async def test_without_another_router_the_draining_one_is_used(router: FakeRouter, client: RouterClient) -> None:
    router.script = echo
    stream = await router.next_stream()
    router.is_draining = True
    await stream.drain()
    assert values(await client.infer([block(1)])) == [1]
    await router.next_stream()  # it has looked for another
    assert values(await client.infer([block(2)])) == [2]
    assert client.is_connected


async def test_a_call_refused_while_draining_waits_for_the_next_router_and_has_lost_nothing(router: FakeRouter) -> None:
    async with RouterClient(router.target, router_wait_s=30) as client:
        stream = await router.next_stream()
        router.is_draining = True
        await stream.drain()
        await shown(client, "<Stream draining")
        router.script = lambda call: [refusal(call)]
        caller = spawn(client.infer([block(1)]))
        await shown(client, "1 in line")
        await router.stop()
        router.script, router.is_draining = None, False
        await router.start()
        await (await opened(router, with_call=True)).end()  # a first loss, which is forgiven
        stream = await opened(router, with_call=True)
        await stream.answer(*echo(stream.messages[0].calls[0]))
        assert values(await caller) == [1]


async def test_a_call_refused_while_draining_is_unavailable_after_router_wait_s(router: FakeRouter) -> None:
    router.script, router.is_draining = lambda call: [refusal(call)], True
    async with RouterClient(router.target, router_wait_s=0.3) as client:
        started = asyncio.get_running_loop().time()
        assert code(await client.infer([block(1)])) == "UNAVAILABLE"
        assert asyncio.get_running_loop().time() - started < 2
        assert not client.is_connected


async def test_what_a_draining_router_began_and_gave_up_is_not_sent_again(
    router: FakeRouter, client: RouterClient
) -> None:
    caller = spawn(client.infer([block(1, 2)]))
    stream = await router.next_stream()
    call = await stream.next_call()
    await stream.answer(answer(call, 0, 1), refusal(call), draining=True)
    answers = await caller
    assert (values(answers), code(answers)) == ([1], "UNAVAILABLE")


async def test_unavailable_from_a_router_that_is_not_draining_is_the_answer(
    router: FakeRouter, client: RouterClient
) -> None:
    router.script = lambda call: [refusal(call)]
    answers = await client.infer([block(1)])
    assert code(answers) == "UNAVAILABLE"
    assert answers[0].error.message == "refused: UNAVAILABLE"


async def test_a_drained_stream_that_ends_is_no_error(
    router: FakeRouter, client: RouterClient, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await router.next_stream()
    await stream.drain()
    await stream.end(grpc.StatusCode.OK)
    await router.next_stream()
    assert await client.wait_connected(5)
    assert caplog.records == []


# What does not fit


async def test_a_call_over_the_message_limit_is_refused_and_the_stream_lives(
    router: FakeRouter, client: RouterClient
) -> None:
    router.script = echo
    assert values(await client.infer([block(1)])) == [1]
    assert code(await client.infer([big_block(16 * MIB)])) == "INVALID_ARGUMENT"
    assert len(await client.infer([big_block(16 * MIB - 100)])) == 1
    assert len(router.streams) == 1


MALFORMED: dict[str, Callable[[pb.Call], list[pb.Answer]]] = {
    "an unknown block": lambda call: [pb.Answer(call_id=call.call_id, block=1, rows=1, outputs=bytes(4))],
    "a row outside": lambda call: [answer(call, 1, 1.0, 2.0)],
    "a row twice": lambda call: [answer(call, 0, 1.0), answer(call, 0, 1.0, 2.0)],
    "no matrix": lambda call: [pb.Answer(call_id=call.call_id, rows=2, outputs=bytes(12), done=True)],
    "no bytes": lambda call: [pb.Answer(call_id=call.call_id, rows=2, done=True)],
    "the end before the last row": lambda call: [answer(call, 0, 1.0, done=True)],
    "no rows and no error": lambda call: [pb.Answer(call_id=call.call_id, done=True)],
    "an error for all that is not the end": lambda call: [
        pb.Answer(call_id=call.call_id, error=pb.Error(code="UNKNOWN"))
    ],
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED.keys())
async def test_an_answer_that_does_not_fit_fails_its_call_alone(
    router: FakeRouter, client: RouterClient, malformed: Callable[[pb.Call], list[pb.Answer]]
) -> None:
    caller, neighbour = spawn(client.infer([block(1, 2)])), spawn(client.infer([block(3)]))
    stream = await router.next_stream()
    call, next_call = await stream.next_call(), await stream.next_call()
    await stream.answer(*malformed(call), *echo(next_call))
    assert code(await caller) == "INTERNAL"
    assert values(await neighbour) == [3]
    assert await stream.next_cancel() == call.call_id


async def test_all_rows_answered_is_the_end_though_the_router_does_not_say_so(
    router: FakeRouter, client: RouterClient
) -> None:
    caller = spawn(client.infer([block(1)]))
    stream = await router.next_stream()
    call = await stream.next_call()
    await stream.answer(answer(call, 0, 1))
    answers = await caller
    assert (values(answers), answers[0].done) == ([1], True)


@pytest.mark.parametrize("option", ["tenant", "request_id"])
async def test_a_text_that_is_no_utf_8_is_refused(client: RouterClient, option: str) -> None:
    assert code(await client.infer([block(1)], **{option: "\ud800"})) == "INVALID_ARGUMENT"  # type: ignore[arg-type]


# Agents


async def test_agents_get_their_results_under_their_names(router: FakeRouter, client: RouterClient) -> None:
    router.script = echo
    names = ["", "ann", "Zoë", "名前", "a\x00b", "\ud800", "x" * 10_000, "1", "🦊"]
    agents = {name: Agent(f"m{at % 2}", [float(at), 0.5], "t" if at % 3 else "") for at, name in enumerate(names)}
    results = await client.predict(agents, timeout_s=5)
    assert list(results) == names
    assert [results[name].output for name in names] == [[at, 0.5] for at in range(len(names))]
    assert [len(call.blocks) for message in router.streams[0].messages for call in message.calls] == [4]


async def test_a_bad_agent_fails_alone(router: FakeRouter, client: RouterClient) -> None:
    router.script = echo
    results = await client.predict(
        {"bad": Agent("\ud800", [1.0]), "huge": Agent("m", [1e39]), "ann": Agent("m", [1.0])}
    )
    assert [name for name, result in results.items() if result.error] == ["bad", "huge"]
    assert {result.error.code for result in results.values() if result.error} == {"INVALID_ARGUMENT"}
    assert results["ann"].output == [1.0]


async def test_no_agents_are_no_call(router: FakeRouter, client: RouterClient) -> None:
    assert await client.predict({}) == {}


async def test_a_failed_call_is_every_agents_error(router: FakeRouter, client: RouterClient) -> None:
    router.script = lambda call: [refusal(call, "NOT_FOUND")]
    results = await client.predict({"ann": Agent("m", [1.0]), "bob": Agent("n", [1.0])})
    assert {result.error for result in results.values()} == {AgentError("NOT_FOUND", "refused: NOT_FOUND")}


# Lifecycle


async def test_closing_fails_the_open_calls(router: FakeRouter) -> None:
    client = RouterClient(router.target)
    waiting = [spawn(client.infer([block(1)], timeout_s=30)), spawn(collect(client, [block(1, 2)]))]
    stream = await router.next_stream()
    calls = {call.blocks[0].rows: call for call in [await stream.next_call(), await stream.next_call()]}
    await stream.answer(answer(calls[2], 1, 2))
    await client.aclose()
    assert [code(await caller) for caller in waiting] == ["UNAVAILABLE"] * 2
    assert code(await client.infer([block(1)])) == "UNAVAILABLE"
    assert await client.wait_connected(30) is False
    await client.aclose()


async def test_closing_leaves_no_tasks_behind_whatever_happened_before() -> None:
    before = asyncio.all_tasks()
    async with FakeRouter(echo) as router, RouterClient(router.target, router_wait_s=30) as client:
        for _ in range(5):
            callers = [spawn(client.infer([block(value)], timeout_s=30)) for value in range(20)]
            callers[3].cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            await router.streams[-1].end()
            assert values(await client.infer([block(7)])) == [7]
        router.script = None
        held = spawn(client.infer([block(1)], timeout_s=30))
        await shown(client, "1 open")
        await client.aclose()
        assert code(await held) == "UNAVAILABLE"
        assert repr(client).endswith("0 in line, []>")
        assert not {task for task in asyncio.all_tasks() if task.get_name().startswith("router_client")}
    await settled(before)
    assert asyncio.all_tasks() <= before


async def test_closing_while_no_router_is_there_leaves_nothing_behind(router: FakeRouter) -> None:
    await router.stop()
    before = asyncio.all_tasks()
    client = RouterClient(router.target, router_wait_s=30)
    caller = spawn(client.infer([block(1)]))
    await shown(client, "1 in line")
    await client.aclose()
    assert code(await caller) == "UNAVAILABLE"
    await settled(before)
    assert asyncio.all_tasks() <= before


async def test_a_client_connects_with_its_first_call(router: FakeRouter) -> None:
    router.script = echo
    client = RouterClient(router.target)
    assert not client.is_connected
    assert values(await client.infer([block(1)])) == [1]
    assert client.is_connected
    await client.aclose()
    assert not client.is_connected


# The probe


async def test_the_probe_tells_whether_the_router_serves(
    router: FakeRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, ["health", router.target]) == 0
    await router.set_serving(False)
    assert await asyncio.to_thread(main, ["health", router.target]) == 1
    assert capsys.readouterr().out == f"{router.target}: SERVING\n{router.target}: NOT_SERVING\n"


async def test_the_probe_says_in_one_line_that_nobody_is_there(router: FakeRouter) -> None:
    await router.stop()
    arguments = ["-m", "router_client", "health", router.target, "--timeout", "2"]
    probe = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await probe.communicate()
    assert probe.returncode == 1
    assert out.decode().startswith(f"{router.target}: UNAVAILABLE: ")
    assert len(out.splitlines()) == 1
    assert err == b""


async def first_stream(one: FakeRouter, two: FakeRouter) -> tuple[FakeRouter, FakeRouter, FakeStream]:
    """Wait until the client has chosen one of two routers; return it, the other one and the stream."""
    opening = {
        asyncio.ensure_future(one.next_stream()): (one, two),
        asyncio.ensure_future(two.next_stream()): (two, one),
    }
    done, pending = await asyncio.wait(opening, return_when=asyncio.FIRST_COMPLETED)
    for each in pending:
        each.cancel()
    await asyncio.wait(opening)
    first = done.pop()
    return *opening[first], first.result()


async def opened(router: FakeRouter, *, with_call: bool) -> FakeStream:
    """Wait for the next stream that is not over; ``with_call``: and until a call is read from it."""
    while (stream := await router.next_stream()).is_over.is_set():
        pass
    if with_call:
        await stream.next_call()
    return stream


async def shown(client: RouterClient, text: str) -> None:
    """Let the loop turn until the client's repr says so; the test's own timeout is the limit."""
    while text not in repr(client):  # noqa: ASYNC110  # a repr has no event
        await asyncio.sleep(0)


async def settled(before: "set[asyncio.Task[Any]]") -> None:
    """Let tasks that were told to end do so: the router's handlers and grpc's own."""
    ending = asyncio.all_tasks() - before
    if ending:
        await asyncio.wait(ending, timeout=5)
