"""`RouterClient`'s methods of the Open Inference Protocol, beside its streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router_client import InferError, RouterClient
from tests.fakes import FakeRouter
from tests.integration.stack import serving, truth
from tests.open_inference_server import OpenInferenceServer, ServedModel, metadata

pytestmark = pytest.mark.anyio

Question = Callable[[RouterClient], Awaitable[object]]
QUESTIONS: dict[str, Question] = {
    "ServerReady": lambda client: client.server_ready(timeout_s=20),
    "ServerMetadata": lambda client: client.server_metadata(timeout_s=20),
    "ModelReady": lambda client: client.model_ready("m", timeout_s=20),
    "ModelMetadata": lambda client: client.model_metadata("m", timeout_s=20),
    "ModelConfig": lambda client: client.model_config("m", timeout_s=20),
    "RepositoryIndex": lambda client: client.repository_index(timeout_s=20),
}


@pytest.fixture
def models() -> OpenInferenceServer:
    """What the router knows: a model that is ready, and one that is not."""
    told = metadata("m", [("x", "FP32", (-1, 4))], [("y", "FP32", (-1, 4))])
    config = pb.ModelConfig(name="m", max_batch_size=8)
    return OpenInferenceServer({"m": ServedModel(told, config=config), "sick": ServedModel(is_ready=False)})


@pytest.fixture
async def client(models: OpenInferenceServer) -> AsyncIterator[RouterClient]:
    """A client of a router with these `models`."""
    async with FakeRouter(open_inference=models) as router, RouterClient(router.target) as client:
        yield client


def request_of(*rows: list[float], model: str = "m") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id="mine")
    request.inputs.add(name="vector", datatype="FP32", shape=[len(rows), len(rows[0])])
    request.raw_input_contents.append(np.array(rows, "<f4").tobytes())
    return request


async def test_every_question_is_answered(client: RouterClient, models: OpenInferenceServer) -> None:
    assert await client.server_ready() is True
    assert (await client.server_metadata()).name == "test"
    assert [await client.model_ready(name) for name in ("m", "sick")] == [True, False]
    assert await client.model_metadata("m") == models.models["m"].metadata
    assert (await client.model_config("m")).max_batch_size == 8
    index = (await client.repository_index(is_ready=True)).models
    assert [(model.name, model.state) for model in index] == [("m", "READY"), ("sick", "UNAVAILABLE")]


async def test_a_request_travels_as_it_stands(client: RouterClient, models: OpenInferenceServer) -> None:
    request = request_of([1, 2])
    request.parameters["mine"].string_param = "kept"
    response = await client.model_infer(request)
    assert (response.id, np.frombuffer(response.raw_output_contents[0], "<f4").tolist()) == ("mine", [2.0, 4.0])
    assert models.requests == [request]


async def test_the_time_that_is_left_overwrites_the_parameter(
    client: RouterClient, models: OpenInferenceServer
) -> None:
    request = request_of([1])
    request.parameters["timeout"].uint64_param = 1
    await client.model_infer(request, timeout_s=20)
    assert 1e6 < models.requests[0].parameters["timeout"].int64_param <= 20e6


async def test_tenant_and_request_id_travel_as_metadata() -> None:
    async with FakeRouter() as router, RouterClient(router.target) as client:
        await client.model_infer(request_of([1]), tenant="acme", request_id="r-17")
        ((_, context),) = router.requests
        told = dict(context.invocation_metadata() or ())
    assert (told["x-tenant"], told["x-request-id"]) == ("acme", "r-17")


@pytest.mark.parametrize("text", ["a\nb", "ä"])
async def test_what_no_header_can_carry_is_refused(client: RouterClient, text: str) -> None:
    with pytest.raises(InferError, match="INVALID_ARGUMENT: tenant is not printable ASCII"):
        await client.model_infer(request_of([1]), tenant=text)
    with pytest.raises(InferError, match="INVALID_ARGUMENT: request_id is not printable ASCII"):
        await client.model_infer(request_of([1]), request_id=text)


@pytest.mark.parametrize("method", list(QUESTIONS))
async def test_a_refused_question_says_why(models: OpenInferenceServer, client: RouterClient, method: str) -> None:
    models.refusals = {method: grpc.StatusCode.NOT_FOUND}
    with pytest.raises(InferError, match=f"NOT_FOUND: {method} is refused"):
        await QUESTIONS[method](client)


@pytest.mark.parametrize("method", list(QUESTIONS))
async def test_a_question_waits_for_a_router_as_a_request_does(method: str) -> None:
    router = FakeRouter()
    async with router:
        pass
    async with RouterClient(router.target, router_wait_s=0.05) as client:
        with pytest.raises(InferError, match="UNAVAILABLE: no router took the request in") as failed:
            await QUESTIONS[method](client)
    assert failed.value.retry_pushback_ms == 1000


async def test_a_cancelled_caller_ends_its_request(client: RouterClient, models: OpenInferenceServer) -> None:
    await client.server_ready()
    models.may_answer.clear()
    task = asyncio.create_task(client.model_infer(request_of([1])))
    async with asyncio.timeout(20):
        while not models.requests:  # noqa: ASYNC110 -- the server has no event for it
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(20):
        while not models.lost:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_closing_the_client_fails_what_is_under_way(client: RouterClient, models: OpenInferenceServer) -> None:
    await client.server_ready()
    models.may_answer.clear()
    task = asyncio.create_task(client.model_infer(request_of([1])))
    async with asyncio.timeout(20):
        while not models.requests:  # noqa: ASYNC110 -- the server has no event for it
            await asyncio.sleep(0.001)
    async with asyncio.timeout(20):  # at once, not when the connection is found to be gone
        await client.aclose()
        with pytest.raises(InferError, match="the client was closed"):
            await task


async def test_the_real_router_answers_every_row() -> None:
    rows = [[0.1, 0.2], [0.3, 0.4]]
    async with serving() as stack, RouterClient(stack.router.address) as client:
        request = request_of(*rows, model="churn")
        request.parameters["agent_type"].string_param = "a"
        response = await client.model_infer(request, timeout_s=20)
    assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == pytest.approx(truth("churn", rows))
