"""Whose rows they are and how urgent, as told on the wire: natively, by metadata, by the Open Inference Protocol."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeAlias

import grpc
import grpc.aio
import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.open_inference import open_inference_pb2 as oip_pb
from protos.open_inference import open_inference_pb2_grpc as oip_grpc
from tests.integration.stack import Gate, Stack, Stream, block, open_channel, serving

pytestmark = pytest.mark.anyio

ACME = (("x-tenant", "acme"),)
TENANT_BOUND = {"max_tenant_rows": 1}

Way: TypeAlias = Callable[[Stack], Awaitable[str]]
"""Sends one row of tenant `acme` and returns the text of its refusal."""


def call(
    call_id: int, tenant: str = "", priority_class: pb.PriorityClass.ValueType = pb.PRIORITY_CLASS_INTERACTIVE
) -> pb.Call:
    return pb.Call(call_id=call_id, tenant=tenant, priority_class=priority_class, blocks=[block("m", [[call_id]])])


def unary(
    tenant: str = "", priority_class: pb.PriorityClass.ValueType = pb.PRIORITY_CLASS_INTERACTIVE
) -> pb.PredictRequest:
    agents = {"bob": pb.Agent(agent_type="a", model_name="m", vector=[1])}
    return pb.PredictRequest(agents=agents, tenant=tenant, priority_class=priority_class)


def open_inference(priority: int = 0) -> oip_pb.ModelInferRequest:
    request = oip_pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(4)])
    request.inputs.add(name="vector", datatype="FP32", shape=[1, 1])
    request.parameters["agent_type"].string_param = "a"
    request.parameters["priority"].int64_param = priority
    return request


async def by_the_call(stack: Stack) -> str:
    stream = Stream(stack.stub)
    await stream.send(call(9, "acme"))
    return (await stream.answer()).error.message


async def by_the_streams_metadata(stack: Stack) -> str:
    stream = Stream(stack.stub)
    stream.call = stack.stub.PredictStream(metadata=ACME)
    await stream.send(call(9))
    return (await stream.answer()).error.message


async def by_the_request(stack: Stack) -> str:
    return await refusal(stack.stub.Predict(unary("acme")))


async def by_the_requests_metadata(stack: Stack) -> str:
    return await refusal(stack.stub.Predict(unary(), metadata=ACME))


async def by_open_inference_metadata(stack: Stack) -> str:
    async with open_channel(stack.router.address) as channel:
        stub: oip_grpc.GRPCInferenceServiceAsyncStub = oip_grpc.GRPCInferenceServiceStub(channel)
        return await refusal(stub.ModelInfer(open_inference(), metadata=ACME))


async def refusal(rpc: Awaitable[object]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rpc
    return error.value.details() or ""


WAYS = [by_the_call, by_the_streams_metadata, by_the_request, by_the_requests_metadata, by_open_inference_metadata]


@pytest.mark.parametrize("way", WAYS)
async def test_a_trusted_caller_says_whose_a_row_is(way: Way) -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1, trust_tenant=True, limits=TENANT_BOUND) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.until_gauge("router_open_calls", 1)
        await stack.until_queued(0)
        await stream.send(call(2, "acme"), call(3))
        await stack.until_queued(2)
        assert await way(stack) == "1 rows of tenant 'acme' wait already, 1 may"
        gate.open()


@pytest.mark.parametrize("way", WAYS)
async def test_without_trust_all_rows_are_one_tenants(way: Way) -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1, limits=TENANT_BOUND) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.until_gauge("router_open_calls", 1)
        await stack.until_queued(0)
        await stream.send(call(2, "other"))
        await stack.until_queued(1)
        assert await way(stack) == "1 rows of tenant 'default' wait already, 1 may"
        gate.open()


async def test_what_a_call_says_goes_before_its_streams_metadata() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1, trust_tenant=True, limits=TENANT_BOUND) as stack:
        stream = Stream(stack.stub)
        stream.call = stack.stub.PredictStream(metadata=ACME)
        await stream.send(call(1))
        await stack.until_gauge("router_open_calls", 1)
        await stack.until_queued(0)
        await stream.send(call(2), call(3, "blue"), call(4, "blue"))
        assert (await stream.answer()).error.message == "1 rows of tenant 'blue' wait already, 1 may"
        gate.open()


async def test_a_tenant_of_the_metadata_that_is_too_long_fails_the_calls_that_tell_none() -> None:
    async with serving(trust_tenant=True) as stack:
        stream = Stream(stack.stub)
        stream.call = stack.stub.PredictStream(metadata=(("x-tenant", "t" * 257),))
        await stream.send(call(1), call(2, "acme"))
        answers = {answer.call_id: answer.error.message for answer in await stream.answers(2)}
        assert answers == {1: "x-tenant has 257 characters, at most 256 are allowed", 2: ""}


async def batch_on_the_stream(stack: Stack) -> None:
    stream = Stream(stack.stub)
    await stream.send(call(9, priority_class=pb.PRIORITY_CLASS_BATCH))
    await stream.answer()


async def batch_request(stack: Stack) -> None:
    await stack.stub.Predict(unary(priority_class=pb.PRIORITY_CLASS_BATCH))


async def batch_open_inference(stack: Stack) -> None:
    async with open_channel(stack.router.address) as channel:
        stub: oip_grpc.GRPCInferenceServiceAsyncStub = oip_grpc.GRPCInferenceServiceStub(channel)
        await stub.ModelInfer(open_inference(priority=2))


async def urgent_open_inference(stack: Stack) -> None:
    async with open_channel(stack.router.address) as channel:
        stub: oip_grpc.GRPCInferenceServiceAsyncStub = oip_grpc.GRPCInferenceServiceStub(channel)
        await stub.ModelInfer(open_inference(priority=1))


@pytest.mark.parametrize(
    ("way", "later_goes"),
    [(batch_on_the_stream, 1), (batch_request, 1), (batch_open_inference, 1), (urgent_open_inference, 2)],
)
async def test_batch_rows_leave_the_seats_to_interactive_rows_that_came_later(
    way: Callable[[Stack], Coroutine[None, None, None]], later_goes: int
) -> None:
    """`later_goes`: as which batch, counted from 0."""
    gate = Gate()
    async with serving(gate.mock(), model={"max_batch_size": 1}, max_in_flight=1) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.until_gauge("router_open_calls", 1)
        await stack.until_queued(0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(way(stack))
            await stack.until_queued(1)
            await stream.send(pb.Call(call_id=2, explain=True, blocks=[block("m", [[2]])]))
            await stack.until_queued(2)
            gate.open()
            later = (await stream.answers(2))[1].explanation.batch_id
        assert [batch.batch_id for batch in stack.mock.batches].index(later) == later_goes
