"""Native and Open Inference callers of models that take other things than vectors, and that change, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from protos.open_inference import open_inference_pb2 as open_pb
from protos.open_inference import open_inference_pb2_grpc as open_pb_grpc
from router.server import RouterServer
from tests.integration.stack import Stream, block, floats, open_channel, router_settings
from tests.open_inference_server import OpenInferenceServer, ServedModel, metadata

pytestmark = pytest.mark.anyio

DTYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


def sums(request: open_pb.ModelInferRequest) -> open_pb.ModelInferResponse:
    """The sum of each row of the first input, whatever its datatype, as FP64 `total`, and a constant, if asked for."""
    (tensor,) = request.inputs
    matrix = np.frombuffer(request.raw_input_contents[0], DTYPES[tensor.datatype]).reshape(tensor.shape)
    response = open_pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    asked = [output.name for output in request.outputs] or ["total", "size"]
    for name in asked:
        values = matrix.sum(axis=-1) if name == "total" else np.full(matrix.shape[:-1], matrix.shape[-1])
        response.outputs.add(name=name, datatype="FP64", shape=values.shape)
        response.raw_output_contents.append(values.astype("<f8").tobytes())
    return response


def summing(
    datatype: str = "FP64",
    shape: Sequence[int] = (-1, 2),
    out: Sequence[int] = (-1,),
    **more: Any,  # noqa: ANN401
) -> ServedModel:
    outputs = [("total", "FP64", out), ("size", "FP64", out)]
    return ServedModel(metadata("sum", [("numbers", datatype, shape)], outputs), sums, **more)


class Stack:
    """A router in front of a scripted server."""

    def __init__(self, server: OpenInferenceServer, router: RouterServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.router = router
        self.native = pb_grpc.InferenceRouterServiceStub(channel)
        self.open = open_pb_grpc.GRPCInferenceServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no methods

    async def predict(self, *vectors: Sequence[float], model: str = "sum", timeout_s: float = 30.0) -> list[Any]:
        """Of each vector its answer, or the code and message of its error."""
        agents = {str(n): pb.Agent(model_name=model, vector=vector) for n, vector in enumerate(vectors)}
        response = await self.native.Predict(pb.PredictRequest(agents=agents), timeout=timeout_s)
        results = [response.results[str(n)] for n in range(len(vectors))]
        return [(one.error.code, one.error.message) if one.HasField("error") else list(one.output) for one in results]

    async def fails(self, vector: Sequence[float] = (1.0, 2.0), model: str = "sum") -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.predict(vector, model=model)
        return caught.value.code().name, caught.value.details() or ""

    async def infer(self, rows: Sequence[Sequence[float]], datatype: str = "FP64", model: str = "sum") -> list[float]:
        matrix = np.array(rows, DTYPES[datatype])
        tensor = open_pb.ModelInferRequest.InferInputTensor(name="numbers", datatype=datatype, shape=matrix.shape)
        raw = [matrix.tobytes()]
        request = open_pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=raw)
        answer = await self.open.ModelInfer(request, timeout=30)
        return [float(value) for value in np.frombuffer(answer.raw_output_contents[0], "<f8")]

    async def check(self, model: str) -> str:
        request = health_pb2.HealthCheckRequest(service=model)
        status = (await self.health.Check(request, timeout=30)).status
        return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

    def count(self, name: str, **labels: str) -> float:
        return self.router.metrics.registry.get_sample_value(name, labels) or 0.0

    async def until(self, name: str, value: float, **labels: str) -> None:
        async with asyncio.timeout(30):
            while self.count(name, **labels) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(models: Mapping[str, ServedModel], **model: object) -> AsyncIterator[Stack]:
    async with OpenInferenceServer(models) as server, router_of(server, **model) as stack:
        yield stack


@asynccontextmanager
async def router_of(server: OpenInferenceServer, **model: object) -> AsyncIterator[Stack]:
    backend = {"addresses": [server.address], "max_in_flight": 1, "model_interval_s": 0.02}
    settings = router_settings([], {"send_agent_type": False, **model}, backends={"mock": backend})
    router = RouterServer(settings)
    await router.start()
    try:
        async with open_channel(router.address) as channel:
            yield Stack(server, router, channel)
    finally:
        await router.stop()


def call(call_id: int, *rows: Sequence[float], model: str = "sum") -> pb.Call:
    return pb.Call(call_id=call_id, blocks=[block(model, rows, agent_type="")])


# -- names and datatypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
async def test_native_rows_reach_a_model_by_its_own_names_and_datatype(datatype: str) -> None:
    async with serving({"sum": summing(datatype)}) as stack:
        assert await stack.predict([1, 2], [0.5, 0.25]) == [[3.0], [0.75]]
        (request,) = stack.server.requests
        assert [(one.name, one.datatype, list(one.shape)) for one in request.inputs] == [("numbers", datatype, [2, 2])]
        assert [one.name for one in request.outputs] == ["total"]
        stream = Stream(stack.native)
        await stream.send(call(1, [1, 2], [3, 4]))
        (answer,) = await stream.answers(1)
        assert floats(answer.outputs) == [3.0, 7.0]


async def test_native_and_open_inference_rows_share_a_matrix_and_each_gets_its_own_outputs() -> None:
    async with serving({"sum": summing()}) as stack:
        await stack.predict([0, 0])
        stack.server.may_answer.clear()
        first = asyncio.create_task(stack.predict([0, 0]))
        await stack.until("router_open_calls", 1)
        native, open_ = asyncio.create_task(stack.predict([1, 2])), asyncio.create_task(stack.infer([[3, 4], [5, 6]]))
        stream = Stream(stack.native)
        await stream.send(call(1, [7, 8]))
        await stack.until("router_queued_rows", 4)
        stack.server.may_answer.set()
        (answer,) = await stream.answers(1)
        assert (await native, await open_, floats(answer.outputs)) == ([[3.0]], [7.0, 11.0], [15.0])
        assert await first == [[0.0]]
        assert list(stack.server.requests[-1].inputs[0].shape) == [4, 2]


async def test_a_value_beyond_fp16_is_its_own_rows_error() -> None:
    async with serving({"sum": summing("FP16")}) as stack:
        text = "vector[1] is 70000, which is beyond FP16, as it is sent to the model"
        assert await stack.predict([1, 2], [1, 70000]) == [[3.0], ("INVALID_ARGUMENT", text)]
        stream = Stream(stack.native)
        await stream.send(call(1, [1, 2], [1, 70000], [3, 4]))
        answers = {answer.first_row: answer for answer in await stream.answers(1)}
        assert answers[1].error.message == text
        assert sorted([floats(answers[0].outputs), floats(answers[2].outputs)]) == [[3.0], [7.0]]


async def test_a_wrong_size_of_a_block_is_told_although_its_rows_are_sent_wider() -> None:
    async with serving({"sum": summing()}) as stack:
        stream = Stream(stack.native)
        wide = pb.Block(model_name="sum", rows=1, dim=2, vectors=bytes(16))
        for call_id in (1, 2):  # before the model is known, and after
            await stream.send(pb.Call(call_id=call_id, blocks=[wide]))
            (answer,) = await stream.answers(1)
            assert answer.error.message == "vectors has 16 bytes, which is not 1 rows of 2 float32"
            await stack.predict([1, 2])


async def test_a_vector_that_does_not_fit_never_reaches_the_model() -> None:
    async with serving({"sum": summing()}) as stack:
        assert await stack.fails([1, 2, 3]) == (
            "INVALID_ARGUMENT",
            "vector has 3 values; the model's input 'numbers' takes 2",
        )
        assert stack.server.requests == []


async def test_settings_name_what_a_server_does_not_tell() -> None:
    model = ServedModel(None, sums)
    names = {"vector_input": "numbers", "vector_datatype": "FP64", "vector_output": "size"}
    async with serving({"sum": model}, **names) as stack:
        assert await stack.predict([1, 2, 3]) == [[3.0]]
        assert stack.server.requests[0].inputs[0].datatype == "FP64"


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "sent"), [((1, 2), [1, 2]), ((2,), [2])])
async def test_a_model_without_batches_gets_one_agent_a_call(shape: Sequence[int], sent: list[int]) -> None:
    async with serving({"sum": summing(shape=shape, out=shape[:-1])}) as stack:
        assert await stack.predict([1, 2], [3, 4]) == [[3.0], [7.0]]
        assert [list(request.inputs[0].shape) for request in stack.server.requests] == [sent, sent]
        stream = Stream(stack.native)
        await stream.send(call(1, [1, 2], [5, 6], [7, 8]))
        answers = sorted(await stream.answers(1), key=lambda answer: answer.first_row)
        assert [floats(answer.outputs) for answer in answers] == [[3.0], [11.0], [15.0]]


async def test_tritons_configuration_decides_about_batches() -> None:
    off, eight = open_pb.ModelConfig(name="off"), open_pb.ModelConfig(name="on", max_batch_size=2)
    models = {"off": summing(config=off), "on": summing(config=eight)}
    async with serving(models) as stack:
        rows = [[float(n), 0.0] for n in range(4)]
        assert await stack.predict(*rows, model="on") == [[n] for n, _ in rows]
        assert [list(request.inputs[0].shape) for request in stack.server.requests] == [[2, 2], [2, 2]]
        assert await stack.predict(*rows[:2], model="off") == [[0.0], [1.0]]
        assert [list(request.inputs[0].shape) for request in stack.server.requests[2:]] == [[1, 2], [1, 2]]


async def test_models_that_cannot_be_served_are_refused_and_say_what_would_help() -> None:
    decoupled = open_pb.ModelConfig(
        model_transaction_policy=open_pb.ModelTransactionPolicy(decoupled=True), max_batch_size=4
    )
    async with serving({"sum": summing(out=(3,)), "many": summing(config=decoupled)}) as stack:
        code, message = await stack.fails()
        assert (code, message.endswith("set batching: off")) == ("UNIMPLEMENTED", True)
        code, message = await stack.fails(model="many")
        assert code == "UNIMPLEMENTED"
        assert "it is decoupled" in message
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.infer([[1, 2]])
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert stack.server.requests == []


async def test_what_carries_no_rows_can_be_served_without_batches() -> None:
    async with serving({"sum": summing(shape=(-1, 2), out=(3,))}, batching="off") as stack:
        assert await stack.predict([1, 2], [3, 4]) == [[3.0], [7.0]]


# -- models that come, go and change -----------------------------------------------------------------------------------


async def test_a_model_that_appears_and_disappears_shows_at_once_where_it_is_asked_for() -> None:
    models: dict[str, ServedModel] = {}
    async with serving(models) as stack:
        assert await stack.fails() == ("NOT_FOUND", "backend 'mock' has no model 'sum'")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.check("sum")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        models["sum"] = summing()
        assert await stack.check("sum") == "SERVING"
        assert await stack.predict([1, 2]) == [[3.0]]
        assert stack.count("router_models", state="ready") == 1
        models["sum"].is_ready = False
        assert await stack.check("sum") == "NOT_SERVING"
        assert await stack.check("") == "SERVING"
        del models["sum"]
        await stack.until("router_models", 0, state="ready")
        assert await stack.fails() == ("NOT_FOUND", "backend 'mock' has no model 'sum'")


async def test_the_health_of_a_model_can_be_watched() -> None:
    models: dict[str, ServedModel] = {}
    async with serving(models) as stack:
        watched = stack.health.Watch(health_pb2.HealthCheckRequest(service="sum"))
        names = health_pb2.HealthCheckResponse.ServingStatus.Name
        assert names((await watched.read()).status) == "SERVICE_UNKNOWN"
        models["sum"] = summing(is_ready=False)
        assert names((await watched.read()).status) == "NOT_SERVING"
        models["sum"].is_ready = True
        assert names((await watched.read()).status) == "SERVING"
        watched.cancel()
        of_router = stack.health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert names((await of_router.read()).status) == "SERVING"
        of_router.cancel()


async def test_requests_wait_while_their_model_is_loaded_again() -> None:
    model = summing()
    async with serving({"sum": model}) as stack:
        model.is_ready = False
        stream = Stream(stack.native)
        await stream.send(call(1, [1, 2]), call(2, [5, 6]), call(3, [3, 4]))
        tasks = [asyncio.create_task(stack.predict([1, 2])), asyncio.create_task(stack.infer([[3, 4]]))]
        await stack.until("router_models", 1, state="unready")
        await stack.until("router_queued_rows", 5)
        await stream.send(cancels=[2])
        await stack.until("router_queued_rows", 4)
        assert stack.server.requests == []
        model.is_ready = True
        assert [await task for task in tasks] == [[[3.0]], [7.0]]
        answers = {answer.call_id: floats(answer.outputs) for answer in await stream.answers(2)}
        assert answers == {1: [3.0], 3: [7.0]}


async def test_rows_wait_for_a_backend_that_is_away_and_other_blocks_of_their_call_do_not() -> None:
    async with OpenInferenceServer({"sum": summing()}) as server:
        away, here = {"addresses": ["127.0.0.1:1"]}, {"addresses": [server.address]}
        models = [{"match": {"model_name": "lost"}, "backend": "away"}, {"backend": "mock", "send_agent_type": False}]
        router = RouterServer(router_settings([], backends={"mock": here, "away": away}, models=models))
        await router.start()
        try:
            async with open_channel(router.address) as channel:
                stack = Stack(server, router, channel)
                stream = Stream(stack.native)
                blocks = [block("lost", [[1, 2]], ""), block("sum", [[1, 2]], "")]
                await stream.send(pb.Call(call_id=1, blocks=blocks, timeout_s=1.0))
                first = await stream.answer()
                assert (first.block, floats(first.outputs), first.done) == (1, [3.0], False)
                last = await stream.answer()
                assert (last.error.message, last.done) == ("no answer within 1 s", True)
                agents = {"a": pb.Agent(model_name="lost", vector=[1]), "b": pb.Agent(model_name="sum", vector=[1, 2])}
                response = await stack.native.Predict(pb.PredictRequest(agents=agents, timeout_s=1.0))
                assert response.results["a"].error.code == "DEADLINE_EXCEEDED"
                assert list(response.results["b"].output) == [3.0]
        finally:
            await router.stop()


async def test_metadata_that_changes_under_load_costs_no_request_its_answer() -> None:
    model = summing("FP64")
    async with serving({"sum": model}) as stack:
        is_over = False

        async def load() -> int:
            asked = 0
            while not is_over:
                assert await stack.predict([asked, 1]) == [[asked + 1.0]]
                asked += 1
            return asked

        tasks = [asyncio.create_task(load()) for _ in range(4)]
        for datatype in ("FP32", "FP64", "FP16"):
            served = len(stack.server.requests)
            model.metadata = summing(datatype).metadata  # its answers are the same for any
            async with asyncio.timeout(30):
                while all(one.inputs[0].datatype != datatype for one in stack.server.requests[served:]):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        is_over = True
        assert min(await asyncio.gather(*tasks)) > 0
        await stack.until("router_queued_rows", 0)
