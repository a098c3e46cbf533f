"""What Open Inference clients ask a router about itself and its models, over real gRPC."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router import __version__
from router.core.model_info import IndexEntry, ModelReport, ModelState
from router.errors import Unavailable
from tests.integration.stack import Stack, open_channel, serving

pytestmark = pytest.mark.anyio

Stub: TypeAlias = "pb_grpc.GRPCInferenceServiceAsyncStub"
SERVICE = "inference.GRPCInferenceService"


@asynccontextmanager
async def asking(model: Mapping[str, object] | None = None) -> AsyncIterator[tuple[Stack, Stub]]:
    async with serving(model=model) as stack, open_channel(stack.router.address) as channel:
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
