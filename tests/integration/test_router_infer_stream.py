"""`ModelStreamInfer` over real gRPC, against the mock's functions."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
import grpc.aio
import numpy as np
import pytest

from mock_nn.config import parse_fault
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as native_pb
from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from tests.integration import stack as native
from tests.integration.stack import Gate, Stack, mock_config, open_channel, serving, truth

pytestmark = pytest.mark.anyio

Stub: TypeAlias = "pb_grpc.GRPCInferenceServiceAsyncStub"
SERVICE = "inference.GRPCInferenceService"


def vectors(*rows: Sequence[float], id: str = "", model: str = "churn", timeout: int = 0) -> pb.ModelInferRequest:  # noqa: A002
    matrix = np.array(rows, "<f4")
    request = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=[matrix.tobytes()])
    request.inputs.add(name="vector", datatype="FP32", shape=matrix.shape)
    request.parameters["agent_type"].string_param = "a"
    if timeout:
        request.parameters["timeout"].int64_param = timeout
    return request


def values(response: pb.ModelInferResponse) -> list[float]:
    return [float(value) for value in np.frombuffer(response.raw_output_contents[0], "<f4")]


class Stream:
    """A ModelStreamInfer held by a test."""

    def __init__(self, stub: Stub) -> None:
        self.call = stub.ModelStreamInfer()

    async def send(self, *requests: pb.ModelInferRequest) -> None:
        for request in requests:
            await self.call.write(request)

    async def next(self) -> pb.ModelStreamInferResponse | None:
        message = await self.call.read()
        return message if isinstance(message, pb.ModelStreamInferResponse) else None

    async def answer(self) -> tuple[str, list[float]]:
        message = await self.next()
        assert message is not None, "the stream has ended"
        assert not message.error_message, message.error_message
        assert message.infer_response.parameters["triton_final_response"].bool_param
        return message.infer_response.id, values(message.infer_response)

    async def error(self) -> str:
        message = await self.next()
        assert message is not None, "the stream has ended"
        assert not message.infer_response.outputs
        return message.error_message


@asynccontextmanager
async def streaming(
    *mocks: MockServer,
    model: Mapping[str, object] | None = None,
    max_in_flight: int = 4,
    **changes: object,
) -> AsyncIterator[tuple[Stack, Stream]]:
    async with (
        serving(*mocks, model=model, max_in_flight=max_in_flight, **changes) as stack,
        open_channel(stack.router.address) as channel,
    ):
        stream = Stream(pb_grpc.GRPCInferenceServiceStub(channel))
        try:
            yield stack, stream
        finally:
            stream.call.cancel()


def a_mock_that_holds(gate: Gate, *faults: str) -> MockServer:
    return MockServer(mock_config(*map(parse_fault, faults), latency_s=1.0), sleep=gate.sleep)


async def test_requests_of_one_stream_share_a_batch_and_are_answered_with_their_ids() -> None:
    gate = Gate()
    async with streaming(gate.mock(), max_in_flight=1) as (stack, stream):
        await stream.send(vectors([0, 0], id="first"))
        await stack.mock.wait_for_arrivals(1)
        await stream.send(vectors([1, 2], id="x"), vectors([3, 4], [5, 6], id="y"), vectors([7, 8]))
        await stack.until_queued(4)
        gate.open()
        answers = dict([await stream.answer() for _ in range(4)])
        assert answers == {
            "first": truth("churn", [[0, 0]]),
            "x": truth("churn", [[1, 2]]),
            "y": truth("churn", [[3, 4], [5, 6]]),
            "": truth("churn", [[7, 8]]),
        }
        assert [batch.rows for batch in stack.mock.batches] == [1, 4]


async def test_a_quicker_answer_comes_first() -> None:
    held, quick = Gate(), MockServer(mock_config())
    models = [{"match": {"model_name": "slow"}, "backend": "mock"}, {"backend": "quick"}]
    async with AsyncServers(held.mock(), quick) as (slow_address, quick_address):
        backends = {"mock": {"addresses": [slow_address]}, "quick": {"addresses": [quick_address]}}
        async with streaming(models=models, backends=backends) as (_, stream):
            await stream.send(vectors([1, 2], id="slow", model="slow"), vectors([1, 2], id="quick"))
            assert await stream.answer() == ("quick", truth("churn", [[1, 2]]))
            held.open()
            assert await stream.answer() == ("slow", truth("slow", [[1, 2]]))


class AsyncServers:
    """Mocks that run; their addresses."""

    def __init__(self, *mocks: MockServer) -> None:
        self._mocks = mocks

    async def __aenter__(self) -> list[str]:
        for mock in self._mocks:
            await mock.start()
        return [mock.address for mock in self._mocks]

    async def __aexit__(self, *_: object) -> None:
        for mock in self._mocks:
            await mock.stop()


async def test_two_requests_with_one_id_are_both_answered() -> None:
    async with streaming() as (_, stream):
        await stream.send(vectors([1, 2], id="x"), vectors([3, 4], id="x"))
        answers = [await stream.answer() for _ in range(2)]
        assert sorted(answers) == sorted([("x", truth("churn", [[1, 2]])), ("x", truth("churn", [[3, 4]]))])


async def test_an_error_tells_its_request_and_the_stream_goes_on() -> None:
    async with streaming() as (stack, stream):
        await stream.send(pb.ModelInferRequest(model_name="churn", id="bad"))
        assert await stream.error() == "[request id: bad] the request has no inputs"
        await stream.send(pb.ModelInferRequest(model_name="churn"))
        assert await stream.error() == "[request id: <id_unknown>] the request has no inputs"
        await stream.send(vectors([1, 2], id="x"))
        assert await stream.answer() == ("x", truth("churn", [[1, 2]]))
        count = stack.count
        assert count("router_requests_total", method="ModelStreamInfer", code="INVALID_ARGUMENT") == 2
        assert count("router_requests_total", method="ModelStreamInfer", code="OK") == 1


async def test_a_failed_batch_fails_its_request_and_drops_its_rows_that_wait() -> None:
    gate = Gate()
    mock = a_mock_that_holds(gate, "error:first=1,code=NOT_FOUND")
    async with streaming(mock, model={"max_batch_size": 2}, max_in_flight=1) as (stack, stream):
        await stream.send(vectors(*[[float(row), 0.0] for row in range(5)], id="large"))
        await mock.wait_for_arrivals(1)
        await stack.until_queued(3)
        await stream.send(vectors([1, 2], id="small"))
        await stack.until_queued(4)
        gate.open()
        assert await stream.error() == "[request id: large] the model failed (a fault on demand)"
        assert await stream.answer() == ("small", truth("churn", [[1, 2]]))
        assert [batch.rows for batch in mock.batches] == [2, 1]


async def test_a_client_that_has_no_more_to_say_has_every_answer_and_then_the_end() -> None:
    gate = Gate()
    async with streaming(gate.mock(), max_in_flight=1) as (stack, stream):
        await stream.send(vectors([1, 2], id="x"), vectors([3, 4], id="y"))
        await stack.mock.wait_for_arrivals(1)
        await stream.call.done_writing()
        gate.open()
        assert {(await stream.answer())[0] for _ in range(2)} == {"x", "y"}
        assert await stream.next() is None
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_a_client_that_is_gone_takes_its_requests_with_it() -> None:
    gate = Gate()
    async with streaming(gate.mock(), max_in_flight=1) as (stack, stream):
        await stream.send(vectors([1, 2]))
        await stack.mock.wait_for_arrivals(1)
        await stream.send(vectors([3, 4]), vectors([5, 6]))
        await stack.until_queued(2)
        stream.call.cancel()
        await stack.until_queued(0)
        await stack.until_gauge("router_open_calls", 0)
        gate.open()


async def test_each_request_has_its_own_timeout() -> None:
    gate = Gate()
    async with streaming(gate.mock(), max_in_flight=1) as (_, stream):
        await stream.send(vectors([1, 2], id="patient"), vectors([3, 4], id="hasty", timeout=100_000))
        assert await stream.error() == "[request id: hasty] no answer within 0.1 s"
        gate.open()
        assert (await stream.answer())[0] == "patient"


async def test_a_message_that_cannot_be_read_ends_the_stream_once_the_others_are_answered() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack, open_channel(stack.router.address) as channel:
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        call = method()
        await call.write(vectors([1, 2], id="x").SerializeToString())
        await call.write(b"\xff\xff\xff")
        await stack.mock.wait_for_arrivals(1)
        gate.open()
        data = await call.read()
        assert isinstance(data, bytes)
        answer = pb.ModelStreamInferResponse.FromString(data)
        assert answer.infer_response.id == "x"
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "a message of the stream cannot be read"


async def test_a_stream_is_served_while_the_router_drains_and_then_ends() -> None:
    gate = Gate()
    async with streaming(gate.mock(), max_in_flight=1) as (stack, stream):
        await stream.send(vectors([1, 2], id="x"))
        await stack.mock.wait_for_arrivals(1)
        stack.router.plane.refuse_new()  # what comes after `drain_delay_s`
        drain = asyncio.create_task(stack.router.drain())
        await stream.send(vectors([3, 4], id="late"))
        assert await stream.error() == "[request id: late] the router is shutting down and takes no more calls"
        gate.open()
        assert (await stream.answer())[0] == "x"
        await drain
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stream.next()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_requests_beyond_those_that_may_be_open_are_refused() -> None:
    gate = Gate()
    async with streaming(gate.mock(), limits={"max_open_calls": 2}) as (stack, stream):
        await stream.send(vectors([1, 2], id="x"), vectors([3, 4], id="y"), vectors([5, 6], id="z"))
        assert await stream.error() == "[request id: z] 2 requests of this stream are open"
        assert stack.count("router_refusals_total", reason="open_calls") == 1
        gate.open()
        assert {(await stream.answer())[0] for _ in range(2)} == {"x", "y"}


async def test_native_open_inference_and_streamed_rows_share_one_matrix_and_each_has_its_own() -> None:
    gate = Gate()
    async with (
        streaming(gate.mock(), max_in_flight=1) as (stack, stream),
        open_channel(stack.router.address) as channel,
    ):
        stub: Stub = pb_grpc.GRPCInferenceServiceStub(channel)
        first = asyncio.ensure_future(stub.ModelInfer(vectors([0, 0])))
        await stack.mock.wait_for_arrivals(1)
        ours = native.Stream(stack.stub)
        await ours.send(native_pb.Call(call_id=7, blocks=[native.block("churn", [[1, 2]])]))
        unary = asyncio.ensure_future(stub.ModelInfer(vectors([3, 4], [5, 6], id="u")))
        await stream.send(vectors([7, 8], id="s"))
        await stack.until_queued(4)
        gate.open()
        assert native.floats((await ours.answer()).outputs) == truth("churn", [[1, 2]])
        assert values(await unary) == truth("churn", [[3, 4], [5, 6]])
        assert await stream.answer() == ("s", truth("churn", [[7, 8]]))
        await first
        await ours.close()
        assert [batch.rows for batch in stack.mock.batches] == [1, 4]
