"""`PredictStream`, over real gRPC, message by message."""

import asyncio
import math
import struct

import grpc
import grpc.aio
import pytest

from mock_nn.config import parse_fault
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as pb
from tests.integration.stack import Gate, Stream, block, floats, mock_config, open_channel, serving, truth

pytestmark = pytest.mark.anyio


def call(call_id: int, *blocks: pb.Block, timeout_s: float | None = None, explain: bool = False) -> pb.Call:
    return pb.Call(
        call_id=call_id, blocks=blocks or [block("churn", [[call_id]])], timeout_s=timeout_s, explain=explain
    )


async def test_calls_of_one_message_share_a_batch_and_their_answers_a_message() -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        await stream.send(*(call(number) for number in range(50)))
        answers = await stream.answers(50)
        assert {answer.call_id: floats(answer.outputs) for answer in answers} == {
            number: truth("churn", [[number]]) for number in range(50)
        }
        assert [batch.rows for batch in stack.mock.batches] == [50]
        assert len(stream.messages) == 1
        assert await stream.close() is grpc.StatusCode.OK


async def test_a_calls_blocks_are_answered_as_their_batches_return() -> None:
    stall = parse_fault("stall:model=slow,first=1")
    async with serving(MockServer(mock_config(stall)), batch_timeout_s=0.3) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(7, block("slow", [[1]]), block("churn", [[2, 0], [3, 0]]), explain=True))
        first, second = await stream.answer(), await stream.answer()
        assert (first.block, first.first_row, first.rows, first.done) == (1, 0, 2, False)
        assert floats(first.outputs) == truth("churn", [[2, 0], [3, 0]])
        assert (second.block, second.done, second.explanation.attempts) == (0, True, 2)
        assert floats(second.outputs) == truth("slow", [[1]])


async def test_a_block_larger_than_a_batch_comes_back_in_pieces_that_cover_it_once() -> None:
    async with serving(model={"max_batch_size": 8}) as stack:
        stream = Stream(stack.stub)
        rows = [[float(number)] for number in range(100)]
        await stream.send(call(1, block("churn", rows)))
        answers = await stream.answers(1)
        found = {answer.first_row + n: value for answer in answers for n, value in enumerate(floats(answer.outputs))}
        assert [found[number] for number in range(100)] == truth("churn", rows)
        assert sum(answer.rows for answer in answers) == 100
        assert [answer.done for answer in answers].count(True) == 1


async def test_a_bad_row_costs_itself_and_a_bad_block_itself() -> None:
    async with serving(model={"match": {"model_name": "churn"}}) as stack:
        stream = Stream(stack.stub)
        bad_row = block("churn", [[1], [math.nan], [3]])
        short = pb.Block(model_name="churn", rows=2, dim=2, vectors=bytes(12))
        await stream.send(call(1, bad_row, short, block("unknown", [[1]]), pb.Block(model_name="churn", rows=3)))
        answers = await stream.answers(1)
        told = {(answer.block, answer.first_row, answer.rows): answer for answer in answers}
        assert floats(told[0, 0, 1].outputs) == truth("churn", [[1]])
        assert floats(told[0, 2, 1].outputs) == truth("churn", [[3]])
        assert told[0, 1, 1].error.message == "vector[0] is nan; every value must be finite as a float32"
        assert told[1, 0, 2].error.message == "vectors has 12 bytes, which is not 2 rows of 2 float32"
        assert told[2, 0, 1].error.code == "NOT_FOUND"
        assert told[3, 0, 3].error.message == "vector is empty"
        assert len(answers) == 6


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pb.Call(call_id=1), "the call has no blocks"),
        (pb.Call(call_id=1, blocks=[pb.Block(model_name="m", dim=1)]), "block 0 has no rows"),
        (call(1, timeout_s=-1), "timeout_s is -1; it must be greater than zero"),
        (call(1, timeout_s=math.nan), "timeout_s is nan; it must be greater than zero"),
        (pb.Call(call_id=1, priority_class=5, blocks=[block("m", [[1]])]), "priority_class 5 is not one of"),  # type: ignore[arg-type]
        (pb.Call(call_id=1, tenant="t" * 257, blocks=[block("m", [[1]])]), "tenant has 257 characters"),
    ],
)
async def test_a_bad_call_is_answered_whole_and_never_fails_the_stream(bad: pb.Call, message: str) -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        await stream.send(bad, call(2))
        answers = {answer.call_id: answer for answer in await stream.answers(2)}
        assert (answers[1].rows, answers[1].done, answers[1].error.code) == (0, True, "INVALID_ARGUMENT")
        assert message in answers[1].error.message
        assert floats(answers[2].outputs) == truth("churn", [[2]])


async def test_a_huge_claim_without_bytes_is_refused_cheaply() -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        claim = pb.Block(model_name="churn", rows=2**32 - 1, dim=65_536)
        await stream.send(call(1, claim))
        (answer,) = await stream.answers(1)
        assert answer.rows == 2**32 - 1
        assert "vectors has 0 bytes" in answer.error.message


async def test_an_id_that_is_still_open_drops_both_calls_and_may_come_back_later() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1), call(2))
        await stack.mock.wait_for_arrivals(1)
        await stream.send(call(1))
        answer = await stream.answer()
        assert (answer.call_id, answer.rows, answer.done) == (1, 0, True)
        assert answer.error.message == "call_id 1 is still open; both calls were dropped"
        gate.open()
        assert (await stream.answer()).call_id == 2
        await stream.send(call(1))
        assert floats((await stream.answer()).outputs) == truth("churn", [[1]])


async def test_an_id_twice_in_one_message_is_answered_once() -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1), call(1), call(1), call(2))
        answers = await stream.answers(2)
        assert sorted((answer.call_id, answer.error.code) for answer in answers) == [(1, "INVALID_ARGUMENT"), (2, "")]


async def test_a_cancelled_call_gets_no_answer_and_its_neighbours_do() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1), call(2))
        await stack.mock.wait_for_arrivals(1)
        await stream.send(call(3), call(4))
        await stack.until_queued(2)
        await stream.send(cancels=[1, 3, 99])
        await stack.until_queued(1)
        gate.open()
        answers = await stream.answers(2)
        assert [answer.call_id for answer in answers] == [2, 4]
        assert await stream.close() is grpc.StatusCode.OK
        assert [batch.rows for batch in stack.mock.batches] == [2, 1]
        assert stack.count("router_requests_total", method="PredictStream", code="CANCELLED") == 2


async def test_a_client_that_goes_away_takes_its_queued_rows_along() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack:
        leaver, stayer = Stream(stack.stub), Stream(stack.stub)
        await stayer.send(call(1))
        await stack.mock.wait_for_arrivals(1)
        await leaver.send(*(call(number) for number in range(10)))
        await stack.until_queued(10)
        leaver.call.cancel()
        await stack.until_queued(0)
        gate.open()
        assert floats((await stayer.answer()).outputs) == truth("churn", [[1]])
        assert stack.count("router_open_calls") == 0


async def test_each_call_has_its_own_deadline() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1, timeout_s=0.1), call(2, timeout_s=30))
        answer = await stream.answer()
        assert (answer.call_id, answer.error.code, answer.done) == (1, "DEADLINE_EXCEEDED", True)
        assert answer.error.message == "no answer within 0.1 s"
        gate.open()
        assert (await stream.answer()).call_id == 2


async def test_a_client_that_closes_its_side_still_gets_every_answer() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stream.call.done_writing()
        await stack.mock.wait_for_arrivals(1)
        gate.open()
        assert floats((await stream.answer()).outputs) == truth("churn", [[1]])
        assert await stream.message() is None
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_past_the_bound_of_open_calls_reading_goes_on() -> None:
    gate = Gate()
    async with serving(gate.mock(), limits={"max_open_calls": 3}) as stack:
        stream = Stream(stack.stub)
        await stream.send(*(call(number) for number in range(4)))
        answer = await stream.answer()
        assert (answer.call_id, answer.error.code, answer.done) == (3, "RESOURCE_EXHAUSTED", True)
        assert answer.error.retry_pushback_ms == 1000
        await stream.send(cancels=[0])
        await stream.send(call(5))
        gate.open()
        assert sorted(one.call_id for one in await stream.answers(3)) == [1, 2, 5]


async def test_answers_share_messages_of_at_most_a_mebibyte() -> None:
    async with serving(MockServer(mock_config(output_width=1000)), model={"max_batch_size": 1024}) as stack:
        stream = Stream(stack.stub)
        await stream.send(*(call(number) for number in range(600)))
        answers = await stream.answers(600)
        assert sum(len(answer.outputs) for answer in answers) == 600 * 4000
        assert max(message.ByteSize() for message in stream.messages) <= 1024 * 1024


async def test_a_client_that_does_not_read_is_refused_new_calls_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.servicers.stream.MAX_UNREAD_BYTES", 1_000_000)
    async with serving(MockServer(mock_config(output_width=10_000)), model={"max_batch_size": 1024}) as stack:
        stream = Stream(stack.stub)
        await stream.send(*(call(number) for number in range(200)))
        await stack.mock.wait_for_arrivals(1)
        await stack.until_gauge("router_open_calls", 0)
        await stream.send(call(200))
        answers = {answer.call_id: answer for answer in await stream.answers(201)}
        assert answers[200].error.code == "RESOURCE_EXHAUSTED"
        assert answers[200].error.message == "the answers of this stream are not being read"
        assert all(len(answers[number].outputs) == 40_000 for number in range(200))
        await stream.send(call(201))
        assert len((await stream.answer()).outputs) == 40_000


async def test_streams_of_many_clients_share_batches() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack:
        streams = [Stream(stack.stub) for _ in range(8)]
        await streams[0].send(call(99))
        await stack.mock.wait_for_arrivals(1)
        for number, stream in enumerate(streams):
            await stream.send(call(number))
        await stack.until_queued(8)
        gate.open()
        await streams[0].answer()
        for number, stream in enumerate(streams):
            assert floats((await stream.answer()).outputs) == truth("churn", [[number]])
        assert [batch.rows for batch in stack.mock.batches] == [1, 8]


async def test_draining_is_said_at_once_and_as_the_first_word_of_a_new_stream_and_calls_go_on() -> None:
    gate = Gate()
    async with serving(gate.mock(), drain_delay_s=0.3) as stack:
        old = Stream(stack.stub)
        await old.send(call(1))
        await stack.mock.wait_for_arrivals(1)
        drain = asyncio.create_task(stack.router.drain())
        message = await old.message()
        assert message is not None
        assert message.draining
        new = Stream(stack.stub)
        message = await new.message()
        assert message is not None
        assert message.draining
        await new.send(call(2))
        await stack.mock.wait_for_arrivals(2)
        while (refused := await ask(new)).error.code != "UNAVAILABLE":
            assert refused.error.code == "DEADLINE_EXCEEDED"
        assert (refused.rows, refused.done, refused.error.retry_pushback_ms) == (0, True, 1000)
        gate.open()
        assert floats((await old.answer()).outputs) == truth("churn", [[1]])
        assert floats((await new.answer()).outputs) == truth("churn", [[2]])
        await drain


async def ask(stream: Stream) -> pb.Answer:
    """A call that gives up soon."""
    await stream.send(call(3, timeout_s=0.02))
    return await stream.answer()


async def test_a_drain_waits_until_answers_are_written_and_not_only_computed() -> None:
    """A client that read slowly once lost what was computed for it: the drain ended when no row was open."""
    async with serving(MockServer(mock_config(output_width=10_000)), model={"max_batch_size": 1024}) as stack:
        stream = Stream(stack.stub)
        await stream.send(*(call(number) for number in range(500)))
        await stack.mock.wait_for_arrivals(1)
        await stack.until_gauge("router_open_calls", 0)
        drain = asyncio.create_task(stack.router.drain())
        drain.add_done_callback(lambda _: stop_at.append(len(answers)))
        stop_at: list[int] = []
        answers: list[pb.Answer] = []
        while len(answers) < 500:
            assert not stop_at
            answers.append(await stream.answer())
        assert await stream.close() is grpc.StatusCode.OK
        await drain


async def test_stopping_ends_streams_in_good_order_once_their_calls_are_answered() -> None:
    async with serving() as stack:
        idle, busy = Stream(stack.stub), Stream(stack.stub)
        await busy.send(call(1))
        await busy.answer()
        await idle.call.wait_for_connection()
        drain = asyncio.create_task(stack.router.drain())
        for stream in (idle, busy):
            message = await stream.message()
            assert message is not None
            assert message.draining
            assert await stream.message() is None
            assert await stream.call.code() is grpc.StatusCode.OK
        await drain


async def test_calls_still_open_when_the_drain_time_is_over_are_told_so() -> None:
    gate = Gate()
    async with serving(gate.mock(), drain_timeout_s=0.1) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.mock.wait_for_arrivals(1)
        await stack.router.drain()
        stopping = asyncio.create_task(stack.router.stop())
        answer = await stream.answer()
        assert (answer.rows, answer.done, answer.error.code) == (0, True, "UNAVAILABLE")
        assert await stream.message() is None
        await stopping


async def test_a_value_that_is_not_a_float32_vector_cannot_shift_its_neighbours() -> None:
    """Rows are cut by bytes: a block whose bytes are off by one float must be refused, not read."""
    async with serving() as stack:
        stream = Stream(stack.stub)
        off_by_one = pb.Block(agent_type="a", model_name="churn", rows=2, dim=2, vectors=struct.pack("<5f", *range(5)))
        await stream.send(call(1, off_by_one), call(2, block("churn", [[1, 2]])))
        answers = {answer.call_id: answer for answer in await stream.answers(2)}
        assert answers[1].error.code == "INVALID_ARGUMENT"
        assert floats(answers[2].outputs) == truth("churn", [[1, 2]])


async def test_an_id_cancelled_in_a_message_may_come_back_in_the_same() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.mock.wait_for_arrivals(1)
        await stream.send(call(1), cancels=[1])
        gate.open()
        assert floats((await stream.answer()).outputs) == truth("churn", [[1]])
        assert await stream.close() is grpc.StatusCode.OK


async def test_a_call_and_its_cancel_in_one_message_get_no_answer() -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1), call(2), cancels=[1])
        assert (await stream.answer()).call_id == 2
        assert await stream.close() is grpc.StatusCode.OK
        assert stack.count("router_requests_total", method="PredictStream", code="CANCELLED") == 1


async def test_every_call_is_counted_once() -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        await stream.send(*(call(1) for _ in range(10)))
        await stream.answers(1)
        counts = [
            stack.count("router_requests_total", method="PredictStream", code=code)
            for code in ("INVALID_ARGUMENT", "CANCELLED")
        ]
        assert sum(counts) == 10


async def test_a_message_that_cannot_be_read_ends_the_stream_as_its_senders_fault() -> None:
    """The reader once died in silence: later calls were never answered, and the stream ended OK."""
    async with serving() as stack, open_channel(stack.router.address) as channel:
        raw: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            "/inference_router.v1.InferenceRouterService/PredictStream"
        )()
        await raw.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await raw.read()
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_of_too_many_blocks_or_too_long_an_id_is_refused_whole() -> None:
    async with serving() as stack:
        stream = Stream(stack.stub)
        many = pb.Call(call_id=1, blocks=[pb.Block(rows=1)] * 1025)
        long = pb.Call(call_id=2, request_id="x" * 257, blocks=[block("churn", [[1]])])
        await stream.send(many, long)
        first, second = await stream.answers(2)
        assert first.error.message == "the call has 1025 blocks, at most 1024 are allowed"
        assert second.error.message == "request_id has 257 characters, at most 256 are allowed"


async def test_a_message_of_many_calls_leaves_the_others_their_turn() -> None:
    """A message of a million calls once stopped the whole router for seconds."""
    async with serving() as stack:
        flood, neighbour = Stream(stack.stub), Stream(stack.stub)
        await neighbour.send(call(1))
        await neighbour.answer()
        await flood.send(*(pb.Call(call_id=number) for number in range(30_000)))
        asked = asyncio.create_task(neighbour_asks(neighbour))
        answered = 0
        while not asked.done():
            await flood.answer()
            answered += 1
        assert answered < 30_000


async def neighbour_asks(stream: Stream) -> None:
    await stream.send(call(2))
    assert floats((await stream.answer()).outputs) == truth("churn", [[2]])


async def test_a_client_that_only_sends_is_not_read_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals are answers too: they once piled up without bound for a client that never read."""
    monkeypatch.setattr("router.servicers.stream.MAX_UNREAD_BYTES", 200_000)
    async with serving(limits={"max_open_calls": 100_000}) as stack:
        stream = Stream(stack.stub)
        sender = asyncio.create_task(send_for_ever(stream))
        seen = -1.0
        while seen != (seen := stack.count("router_requests_total", method="PredictStream", code="INVALID_ARGUMENT")):
            await asyncio.wait([sender], timeout=0.5)
        assert not sender.done()
        sender.cancel()
        await asyncio.wait([sender])


async def send_for_ever(stream: Stream) -> None:
    number = 0
    while True:
        await stream.send(*(pb.Call(call_id=number + n) for n in range(2_000)))
        number += 2_000
