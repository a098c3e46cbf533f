"""What Open Inference clients ask a router about itself and its models, over real gRPC."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router import __version__
from router.core.model_info import IndexEntry, ModelReport, ModelState
from router.errors import Unavailable
from router.server import RouterServer
from tests.builders import encode_texts
from tests.integration.stack import Stack, open_channel, router_settings, serving
from tests.open_inference_server import OpenInferenceServer as Server
from tests.open_inference_server import ServedModel, metadata

pytestmark = pytest.mark.anyio

Stub: TypeAlias = "pb_grpc.GRPCInferenceServiceAsyncStub"
SERVICE = "inference.GRPCInferenceService"


async def until_connected(router: RouterServer) -> None:
    """Before that nobody answers, and a model is not ready."""
    async with asyncio.timeout(30):
        while not router.metrics.registry.get_sample_value("router_ready_replicas", {"backend": "mock"}):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def asking(model: Mapping[str, object] | None = None) -> AsyncIterator[tuple[Stack, Stub]]:
    async with serving(model=model) as stack, open_channel(stack.router.address) as channel:
        await until_connected(stack.router)
        yield stack, pb_grpc.GRPCInferenceServiceStub(channel)


async def test_it_lives_and_is_ready_until_it_drains() -> None:
    async with asking() as (stack, stub):
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        await stack.router.drain()
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready


async def test_it_tells_its_name_its_version_and_what_it_can_do() -> None:
    async with asking() as (_, stub):
        told = await stub.ServerMetadata(pb.ServerMetadataRequest())
        assert (told.name, told.version) == ("inference-router", __version__)
        assert {"binary_tensor_data", "parameters"} <= set(told.extensions)


async def test_a_model_that_no_settings_match_is_not_ready_and_not_found() -> None:
    async with asking(model={"match": {"model_name": "churn"}}) as (_, stub):
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
        for ask in (
            stub.ModelMetadata(pb.ModelMetadataRequest(name="other")),
            stub.ModelConfig(pb.ModelConfigRequest(name="other")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await ask
            assert failed.value.code() is grpc.StatusCode.NOT_FOUND
            assert "no model 'other'" in str(failed.value.details())


async def test_a_model_is_ready_and_has_the_rows_of_our_calls() -> None:
    async with asking(model={"max_batch_size": 16}) as (_, stub):
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="churn"))).ready
        assert (await stub.ModelMetadata(pb.ModelMetadataRequest(name="churn"))).name == "churn"
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="churn"))).config
        assert (config.name, config.max_batch_size) == ("churn", 16)


@pytest.mark.parametrize(("are_ready", "names"), [(False, ["a", "b"]), (True, ["a"])])
async def test_the_index_tells_all_models_or_those_that_are_ready(
    are_ready: bool, names: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def index(_: object) -> tuple[IndexEntry, ...]:
        return IndexEntry("a", "1", "READY"), IndexEntry("b", "", "UNAVAILABLE", "gone")

    monkeypatch.setattr("router.models.Models.index", index)
    async with asking() as (_, stub):
        told = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=are_ready))
        assert [model.name for model in told.models] == names
        if not are_ready:
            assert (told.models[1].state, told.models[1].reason) == ("UNAVAILABLE", "gone")


async def test_repositories_have_no_names() -> None:
    async with asking() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="r"))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def _nobody_answers(*_: object) -> ModelReport:
    raise Unavailable("no backend answers", retry_after_s=1.0)


async def _absent(*_: object) -> ModelReport:
    return ModelReport(ModelState.ABSENT)


async def _broken(*_: object) -> ModelReport:
    raise ZeroDivisionError("secret")


@pytest.mark.parametrize(
    ("report", "code", "details"),
    [
        (_nobody_answers, grpc.StatusCode.UNAVAILABLE, "no backend answers"),
        (_absent, grpc.StatusCode.NOT_FOUND, "no model 'churn', version '7'"),
        (_broken, grpc.StatusCode.INTERNAL, "internal error"),
    ],
)
async def test_a_question_without_an_answer_ends_by_a_status(
    report: Any,  # noqa: ANN401 (in place of a method)
    code: grpc.StatusCode,
    details: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.models.Models.report", report)
    async with asking() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelMetadata(pb.ModelMetadataRequest(name="churn", version="7"))
        assert (failed.value.code(), failed.value.details()) == (code, details)


async def test_bytes_that_are_no_question_are_their_senders_fault() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/ModelReady")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"\xff\xff\xff")
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.value.details() == "the request cannot be read as a ModelReadyRequest"


# Foreign models


@asynccontextmanager
async def in_front_of(models: Mapping[str, ServedModel], **model: object) -> AsyncIterator[tuple[Stub, Server]]:
    """A router before a foreign server, and its front."""
    async with Server(models) as server, AsyncExitStack() as stack:
        router = RouterServer(router_settings([server.address], model))
        await router.start()
        stack.push_async_callback(router.stop)
        await until_connected(router)
        channel = await stack.enter_async_context(open_channel(router.address))
        yield pb_grpc.GRPCInferenceServiceStub(channel), server


def whole(*shape: int, outputs: Sequence[str] = ()) -> pb.ModelInferRequest:
    """A request of one input `x`, FP32, whose elements are 0, 1, ...; any shape."""
    data = np.arange(math.prod(shape), dtype="<f4").tobytes()
    request = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=[data])
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    for name in outputs:
        request.outputs.add(name=name)
    return request


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
async def test_a_request_for_a_model_without_batches_goes_as_it_stands(shape: tuple[int, ...]) -> None:
    async with in_front_of({"m": ServedModel()}, batching="off") as (stub, server):
        response = await stub.ModelInfer(whole(*shape))
        (sent,) = server.requests
        assert list(sent.inputs[0].shape) == list(response.outputs[0].shape) == list(shape)
        doubled = [2.0 * value for value in range(math.prod(shape))]
        assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == doubled
        assert (response.id, response.model_version) == ("7", "1")


async def test_a_batch_asks_for_the_outputs_that_its_requests_want() -> None:
    async with in_front_of({"m": ServedModel()}) as (stub, server):
        response = await stub.ModelInfer(whole(2, 1, outputs=["y"]))
        assert [output.name for output in response.outputs] == ["y"]
        assert [output.name for output in server.requests[0].outputs] == ["y"]


DATATYPES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}


def echo(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Every input as an output of the same name."""
    response = pb.ModelInferResponse(id=request.id, raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return response


@pytest.mark.parametrize("max_batch_size", [64, 2])
async def test_every_datatype_travels_there_and_back_whole_or_split_over_batches(max_batch_size: int) -> None:
    request = pb.ModelInferRequest(model_name="m", id="all")
    for datatype, size in DATATYPES.items():
        request.inputs.add(name=datatype, datatype=datatype, shape=[5, 3])
        request.raw_input_contents.append(bytes(range(15 * size)))
    request.inputs.add(name="BYTES", datatype="BYTES", shape=[5, 2])
    request.raw_input_contents.append(encode_texts("a", "", "b\0", "ü", "", "", "x" * 1000, "y", "z", "1"))
    async with in_front_of({"m": ServedModel(infer=echo)}, max_batch_size=max_batch_size) as (stub, server):
        response = await stub.ModelInfer(request)
        assert list(response.raw_output_contents) == list(request.raw_input_contents)
        told = [(output.name, output.datatype, list(output.shape)) for output in response.outputs]
        assert told == [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in request.inputs]
        assert len(server.requests) == -(-5 // max_batch_size)


async def test_typed_contents_reach_the_model_raw() -> None:
    request = pb.ModelInferRequest(model_name="m")
    contents = pb.InferTensorContents(fp64_contents=[1, 2, 3, 4])
    request.inputs.add(name="x", datatype="FP64", shape=[2, 2], contents=contents)
    async with in_front_of({"m": ServedModel(infer=echo)}) as (stub, _):
        response = await stub.ModelInfer(request)
        assert list(response.raw_output_contents) == [np.array([1, 2, 3, 4], "<f8").tobytes()]


async def test_what_the_backend_tells_of_a_model_is_told_on() -> None:
    told = metadata("m", [("x", "FP32", (-1, 4)), ("mask", "BOOL", (-1, 4))], [("y", "FP32", (-1, 4))])
    told.platform, told.versions[:] = "onnx", ["1", "2"]
    config = pb.ModelConfig(name="m", max_batch_size=8, input=[pb.ModelInput(name="mask", optional=True)])
    async with in_front_of({"m": ServedModel(told, config=config)}) as (stub, server):
        assert await stub.ModelMetadata(pb.ModelMetadataRequest(name="m")) == told
        ours = (await stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config
        inputs = [(tensor.name, tensor.optional) for tensor in ours.input]
        assert (ours.max_batch_size, inputs) == (8, [("x", False), ("mask", True)])
        response = await stub.ModelInfer(whole(3, 4))  # without the optional input
        assert (response.outputs[0].name, list(response.outputs[0].shape)) == ("y", [3, 4])
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(whole(3, 5))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(server.requests) == 1


async def test_a_model_that_is_not_ready_or_unknown_is_told_so() -> None:
    models = {"m": ServedModel(metadata("m", [("x", "FP32", (-1, 1))], [("y", "FP32", (-1, 1))]))}
    async with in_front_of(models) as (stub, _):
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="m"))).ready
        models["m"].is_ready = False
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="m"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
        index = {entry.name: entry.state for entry in (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models}
        assert index == {"m": "UNAVAILABLE"}
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(pb.ModelInferRequest(model_name="other"))
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_configuration_of_a_model_that_is_not_ready_is_not_there_yet() -> None:
    """Bug: this was told as a bug of the router."""
    models = {"m": ServedModel(metadata("m", [("x", "FP32", (-1, 1))], [("y", "FP32", (-1, 1))]), is_ready=False)}
    async with in_front_of(models) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelConfig(pb.ModelConfigRequest(name="m"))
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.UNAVAILABLE, "model 'm' is not ready")
        models["m"].is_ready = True
        assert (await stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config.name == "m"


async def test_a_model_that_cannot_be_batched_rightly_is_refused_with_what_would_help() -> None:
    told = metadata("m", [("x", "FP32", (-1, 4))], [("y", "FP32", (4,))])
    async with in_front_of({"m": ServedModel(told)}) as (stub, server):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(whole(3, 4))
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "batching: off" in str(failed.value.details())
        assert server.requests == []


async def test_outputs_are_each_callers_own_in_its_own_order_split_over_batches() -> None:
    request = pb.ModelInferRequest(model_name="m")
    for name in ("a", "b", "c"):
        request.inputs.add(name=name, datatype="INT32", shape=[3, 1])
        request.raw_input_contents.append(np.array([1, 2, 3], "<i4").tobytes() if name == "a" else bytes(12))
    for name in ("c", "a"):
        request.outputs.add(name=name)
    async with in_front_of({"m": ServedModel(infer=echo)}, max_batch_size=2) as (stub, _):
        response = await stub.ModelInfer(request)
        assert [output.name for output in response.outputs] == ["c", "a"]
        assert np.frombuffer(response.raw_output_contents[1], "<i4").tolist() == [1, 2, 3]


async def test_an_output_that_the_model_does_not_have_is_who_asks_for_its_fault() -> None:
    async with in_front_of({"m": ServedModel(infer=echo)}) as (stub, server):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(whole(1, 1, outputs=["nope"]))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.value.details() == "the model has no output 'nope', only 'x'"
        assert len(server.requests) == 1


def moody(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Outputs `y` and `z`, of which it leaves out `z` when none is named."""
    response = pb.ModelInferResponse(id=request.id)
    for name in [output.name for output in request.outputs] or ["y"]:
        response.outputs.add(name=name, datatype="FP32", shape=request.inputs[0].shape)
        response.raw_output_contents.append(request.raw_input_contents[0])
    return response


@pytest.mark.parametrize("sharing", [{}, {"deterministic": True, "cache_ttl_s": 60.0}])
@pytest.mark.parametrize(("are_told", "all_names"), [(True, ["y", "z"]), (False, ["y"])])
async def test_who_names_no_outputs_has_all_that_are_told_and_who_names_some_has_those(
    are_told: bool, all_names: Sequence[str], sharing: Mapping[str, object]
) -> None:
    shape = (-1, 1)
    told = metadata("m", [("x", "FP32", shape)], [("y", "FP32", shape), ("z", "FP32", shape)])
    async with in_front_of({"m": ServedModel(told if are_told else None, infer=moody)}, **sharing) as (stub, _):
        for wanted, found in (((), all_names), (("z",), ["z"]), (("z", "y"), ["z", "y"])):
            response = await stub.ModelInfer(whole(1, 1, outputs=wanted))
            assert [output.name for output in response.outputs] == list(found)
