"""What requests meet once other settings hold, over real gRPC: on streams that were open before, too."""

import asyncio
import logging

import grpc
import grpc.aio
import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.open_inference import open_inference_pb2 as open_pb
from protos.open_inference import open_inference_pb2_grpc as open_pb_grpc
from router.config import ConfigError
from tests.integration.stack import Gate, Stack, Stream, block, floats, open_channel, router_settings, serving, truth

pytestmark = pytest.mark.anyio


def apply(stack: Stack, model: dict[str, object] | None = None, **changes: object) -> None:
    addresses = [mock.address for mock in stack.mocks]
    stack.router.apply(router_settings(addresses, model, max_in_flight=4, **changes))


def call(call_id: int, model: str = "churn") -> pb.Call:
    return pb.Call(call_id=call_id, blocks=[block(model, [[1.0, 2.0]])])


async def test_models_come_and_go_for_streams_and_single_requests() -> None:
    async with (
        serving(model={"match": {"model_name": "churn"}}) as stack,
        open_channel(stack.router.address) as channel,
    ):
        stream = Stream(stack.stub)
        oip = open_pb_grpc.GRPCInferenceServiceStub(channel)
        tensor = open_pb.ModelInferRequest.InferInputTensor(name="vector", datatype="FP32", shape=[1, 1])
        request = open_pb.ModelInferRequest(model_name="fraud", inputs=[tensor], raw_input_contents=[bytes(4)])
        await stream.send(call(1), call(2, "fraud"))
        answers = {answer.call_id: answer for answer in await stream.answers(2)}
        assert (answers[1].error.code, answers[2].error.code) == ("", "NOT_FOUND")
        with pytest.raises(grpc.aio.AioRpcError):
            await oip.ModelInfer(request)
        apply(stack, {"match": {"model_name": "fraud"}})
        await stream.send(call(1), call(2, "fraud"))
        answers = {answer.call_id: answer for answer in await stream.answers(2)}
        assert (answers[1].error.code, answers[2].error.code) == ("NOT_FOUND", "")
        assert floats(answers[2].outputs) == truth("fraud", [[1.0, 2.0]])
        assert (await oip.ModelInfer(request)).model_name == "fraud"
        agents = {"alice": pb.Agent(model_name="fraud", vector=[1, 2])}
        assert "alice" in (await stack.stub.Predict(pb.PredictRequest(agents=agents))).results


async def test_limits_and_timeouts_hold_for_the_next_call_of_an_open_stream() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.until_gauge("router_open_calls", 1)
        apply(stack, default_timeout_s=0.05, limits={"max_open_calls": 2, "max_vector_length": 1})
        await stream.send(call(2), call(3))
        answers = {answer.call_id: answer.error for answer in await stream.answers(2)}
        assert answers[2].message == "vector has 2 values, at most 1 are allowed"
        assert answers[3].message == "2 calls of this stream are open"
        apply(stack, default_timeout_s=0.05)
        await stream.send(call(4))
        (late,) = await stream.answers(1)
        assert late.error.message == "no answer within 0.05 s"
        gate.open()
        (first,) = await stream.answers(1)
        assert floats(first.outputs) == truth("churn", [[1.0, 2.0]])


async def test_an_open_stream_is_trusted_with_its_tenant_from_then_on() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub, (("x-tenant", "loud"),))
        await stream.send(call(1), call(2))
        await stack.mock.wait_for_arrivals(1)
        apply(
            stack, trust_tenant=True, limits={"max_tenant_rows": 1}, backends={"mock": {"addresses": ["127.0.0.1:1"]}}
        )
        await stream.send(call(3), call(4))
        (answer,) = await stream.answers(1)
        assert (answer.call_id, answer.error.message) == (4, "1 rows of tenant 'loud' wait already, 1 may")
        gate.open()
        assert {(answer.call_id, answer.error.message) for answer in await stream.answers(2)} == {(1, ""), (2, "")}
        await stream.send(cancels=[3])  # of the replica that is not there; the stack would wait for its deadline


async def test_which_requests_are_logged_changes_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router.access")
    async with serving() as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stream.answers(1)
        apply(stack, log_requests="all")
        await stream.send(call(2))
        await stream.answers(1)
        lines = [record for record in caplog.records if record.name == "router.access"]
        assert len(lines) == 1


async def test_what_needs_a_restart_is_refused_and_nothing_else_of_it_is_applied() -> None:
    async with serving() as stack:
        with pytest.raises(ConfigError, match=r"listen: .*: needs a restart"):
            apply(stack, {"match": {"model_name": "none"}}, listen="127.0.0.1:1")
        stream = Stream(stack.stub)
        await stream.send(call(1))
        assert (await stream.answers(1))[0].error.code == ""


async def test_another_protocol_is_for_the_next_batch_and_the_old_streams_close() -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        stream = Stream(stack.stub)
        await stream.send(call(1))
        await stack.mock.wait_for_arrivals(1)
        apply(stack, protocol="unary")
        await stream.send(call(2))
        await stack.mock.wait_for_arrivals(2)
        gate.open()
        answers = await stream.answers(2)
        assert [floats(answer.outputs) for answer in answers] == [truth("churn", [[1.0, 2.0]])] * 2
        async with asyncio.timeout(30):
            await stack.mock.wait_until_idle()  # a stream between batches would be open for a minute
        await stream.send(call(3))
        assert floats((await stream.answer()).outputs) == truth("churn", [[1.0, 2.0]])
        assert stack.mock.open_calls == 0
