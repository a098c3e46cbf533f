"""`RouterClient.infer_tensors`: against a scripted router, and through a real one to the mock."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from mock_nn.config import parse_fault
from mock_nn.sentiment import score
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as native_pb
from protos.open_inference import open_inference_pb2 as pb
from router_client import Agent, InferError, RouterClient, Tensor, bytes_tensor, read_bytes
from tests.fakes import FakeRouter, Infer, InferContext
from tests.integration.stack import Gate, Stack, mock_config, serving, truth

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    """A router that answers tensors with themselves."""
    async with FakeRouter() as router:
        yield router


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[RouterClient]:
    """A client of `router`."""
    async with RouterClient(router.target) as client:
        yield client


def spawn(work: Coroutine[Any, Any, list[Tensor]]) -> "asyncio.Task[list[Tensor]]":
    """Let a caller begin."""
    return asyncio.create_task(work)


async def fails(work: Coroutine[Any, Any, list[Tensor]]) -> InferError:
    with pytest.raises(InferError) as failed:
        await work
    return failed.value


def texts(*values: str) -> list[Tensor]:
    return [bytes_tensor("text", [value.encode() for value in values])]


def labels(outputs: list[Tensor]) -> list[tuple[str, float]]:
    by_name = {tensor.name: tensor for tensor in outputs}
    confidences = np.frombuffer(by_name["confidence"].data, "<f4").tolist()
    return list(zip([label.decode() for label in read_bytes(by_name["sentiment"])], confidences, strict=True))


def said_of(*values: str) -> list[tuple[str, float]]:
    return [(label, float(np.float32(confidence))) for label, confidence in map(score, values)]


class Hang:
    """Requests hang until the test lets them go; `cancelled` is set when one is given up."""

    def __init__(self) -> None:
        self.may_go = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, request: pb.ModelInferRequest, _: InferContext) -> pb.ModelInferResponse:
        try:
            await self.may_go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return pb.ModelInferResponse(id=request.id)


def refusing(*metadata: tuple[str, str], times: int = 1_000_000, code: str = "UNAVAILABLE") -> Infer:
    """Refuse so many requests, then answer."""
    left = [times]

    async def infer(_: pb.ModelInferRequest, context: InferContext) -> pb.ModelInferResponse:
        if left[0]:
            left[0] -= 1
            await context.abort(grpc.StatusCode[code], "refused by the test", metadata)
        return pb.ModelInferResponse()

    return infer


LEAVING = (("grpc-retry-pushback-ms", "1000"), ("inference-router-refused", "1"))


# A request's way


async def test_tensors_come_back_as_the_router_said_them(router: FakeRouter, client: RouterClient) -> None:
    inputs = [bytes_tensor("text", [b"", b"abc"]), Tensor("x", "FP64", (2, 3), bytes(48))]
    assert await client.infer_tensors("m", inputs) == inputs


async def test_what_the_caller_says_reaches_the_router(router: FakeRouter, client: RouterClient) -> None:
    await client.infer_tensors(
        "m",
        texts("a"),
        outputs=["x"],
        timeout_s=30,
        priority_class=native_pb.PRIORITY_CLASS_BATCH,
        tenant="blue",
        request_id="r-1",
        agent_type="buyer",
    )
    ((request, context),) = router.requests
    assert (request.model_name, request.id, request.outputs[0].name) == ("m", "r-1", "x")
    assert request.parameters["priority"].uint64_param == 2
    assert request.parameters["agent_type"].string_param == "buyer"
    assert request.parameters["timeout"].int64_param == pytest.approx(30e6, abs=1e6)
    assert dict(context.invocation_metadata() or ())["x-tenant"] == "blue"


async def test_without_a_timeout_the_router_is_told_none(router: FakeRouter, client: RouterClient) -> None:
    await client.infer_tensors("m", texts("a"))
    ((request, context),) = router.requests
    assert "timeout" not in request.parameters
    assert "x-tenant" not in dict(context.invocation_metadata() or ())


async def test_a_failure_is_raised_as_the_router_said_it(router: FakeRouter, client: RouterClient) -> None:
    router.infer = refusing(("grpc-retry-pushback-ms", "250"), code="RESOURCE_EXHAUSTED")
    error = await fails(client.infer_tensors("m", texts("a")))
    assert (error.code, error.message, error.retry_pushback_ms) == ("RESOURCE_EXHAUSTED", "refused by the test", 250)
    router.infer = refusing(code="INTERNAL")
    error = await fails(client.infer_tensors("m", texts("a")))
    assert (error.code, error.retry_pushback_ms) == ("INTERNAL", None)
    assert len(router.requests) == 2


async def test_a_cancelled_caller_cancels_its_rpc_and_harms_no_neighbour(
    router: FakeRouter, client: RouterClient
) -> None:
    hang = router.infer = Hang()
    leaver, stayer = spawn(client.infer_tensors("m", texts("a"))), spawn(client.infer_tensors("m", texts("b")))
    await router.wait_for_requests(2)
    leaver.cancel()
    await hang.cancelled.wait()
    hang.may_go.set()
    assert await stayer == []
    assert leaver.cancelled()


async def test_a_timeout_is_a_deadline_of_the_rpc(router: FakeRouter, client: RouterClient) -> None:
    hang = router.infer = Hang()
    loop = asyncio.get_running_loop()
    started = loop.time()
    error = await fails(client.infer_tensors("m", texts("a"), timeout_s=0.2))
    assert error.code == "DEADLINE_EXCEEDED"
    assert 0.15 <= loop.time() - started < 10
    await hang.cancelled.wait()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ({"timeout_s": float("nan")}, "INVALID_ARGUMENT", "timeout_s is not a number"),
        ({"timeout_s": 0}, "DEADLINE_EXCEEDED", "timeout"),
        ({"timeout_s": -1}, "DEADLINE_EXCEEDED", "timeout"),
        ({"tenant": "blü"}, "INVALID_ARGUMENT", "tenant is not printable ASCII"),
        ({"request_id": "\ud800"}, "INVALID_ARGUMENT", "surrogate"),
    ],
)
async def test_what_can_never_be_sent_is_refused_here(
    router: FakeRouter, client: RouterClient, arguments: dict[str, Any], code: str, message: str
) -> None:
    error = await fails(client.infer_tensors("m", texts("a"), **arguments))
    assert error.code == code
    assert message in error.message
    assert router.requests == []


async def test_a_request_over_the_limit_is_refused_here_and_one_below_it_is_not(
    router: FakeRouter, client: RouterClient
) -> None:
    error = await fails(client.infer_tensors("m", [bytes_tensor("text", [bytes(16 * MIB)])]))
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.endswith(f"is over the limit of {16 * MIB}")
    assert router.requests == []
    assert await client.infer_tensors("m", [bytes_tensor("text", [bytes(16 * MIB - 1000)])], outputs=["none"])


async def test_a_very_long_timeout_is_none_that_grpc_cannot_count(router: FakeRouter, client: RouterClient) -> None:
    assert await client.infer_tensors("m", texts("a"), timeout_s=1e300)
    assert await client.infer_tensors("m", texts("a"), timeout_s=float("inf"))


# Routers that are away, leave, or are lost


async def test_without_a_router_a_request_is_unavailable_after_the_wait(router: FakeRouter) -> None:
    await router.stop()
    async with RouterClient(router.target, router_wait_s=0.2) as client:
        loop = asyncio.get_running_loop()
        started = loop.time()
        error = await fails(client.infer_tensors("m", texts("a")))
        assert (error.code, error.retry_pushback_ms) == ("UNAVAILABLE", 1000)
        assert error.message == "no router took the request in 0.2 s"
        assert 0.15 <= loop.time() - started < 10
        error = await fails(client.infer_tensors("m", texts("a"), timeout_s=0.1))
        assert error.code == "DEADLINE_EXCEEDED"


async def test_a_request_waits_for_a_router_that_comes(router: FakeRouter) -> None:
    await router.stop()
    async with RouterClient(router.target, router_wait_s=10) as client:
        caller = spawn(client.infer_tensors("m", texts("a")))
        await asyncio.sleep(0)
        await router.start()
        assert await caller == texts("a")


async def test_a_leaving_routers_refusal_is_waited_out(router: FakeRouter, client: RouterClient) -> None:
    router.infer = refusing(*LEAVING, times=2)
    assert await client.infer_tensors("m", texts("a")) == []
    assert len(router.requests) == 3


async def test_a_router_that_never_stops_refusing_is_unavailable_after_the_wait(router: FakeRouter) -> None:
    router.infer = refusing(*LEAVING)
    async with RouterClient(router.target, router_wait_s=0.3) as client:
        error = await fails(client.infer_tensors("m", texts("a")))
        assert (error.code, error.retry_pushback_ms) == ("UNAVAILABLE", 1000)


async def test_after_a_refusal_a_draining_router_is_asked_no_more(router: FakeRouter, client: RouterClient) -> None:
    assert await client.wait_connected(5)
    stream = await router.next_stream()
    router.accepts.clear()  # no other stream is to be had meanwhile
    await stream.drain()
    router.infer = refusing(*LEAVING, times=1)
    caller = spawn(client.infer_tensors("m", texts("a")))
    await router.wait_for_requests(1)
    async with asyncio.timeout(5):
        while client.is_connected:  # noqa: ASYNC110 -- what ends it has no event
            await asyncio.sleep(0)
    assert len(router.requests) == 1
    router.accepts.set()
    assert await caller == []


async def test_a_request_whose_connection_is_lost_is_sent_once_more(router: FakeRouter, client: RouterClient) -> None:
    hang = router.infer = Hang()
    caller = spawn(client.infer_tensors("m", texts("a")))
    await router.wait_for_requests(1)
    await router.stop()
    hang.may_go.set()
    await router.start()
    assert await caller == []
    assert len(router.requests) == 2


async def test_a_request_lost_twice_is_unavailable(router: FakeRouter, client: RouterClient) -> None:
    router.infer = Hang()
    caller = spawn(client.infer_tensors("m", texts("a")))
    for count in (1, 2):
        await router.wait_for_requests(count)
        await router.stop()
        await router.start()
    error = await fails(asyncio.wait_for(caller, 10))
    assert error.code == "UNAVAILABLE"
    assert "lost, and again" in error.message
    assert len(router.requests) == 2


@pytest.mark.parametrize("is_sent", [True, False])
async def test_closing_the_client_fails_what_is_under_way(router: FakeRouter, is_sent: bool) -> None:
    router.infer = Hang()
    client = RouterClient(router.target, router_wait_s=60)
    if not is_sent:
        await router.stop()
    caller = spawn(client.infer_tensors("m", texts("a")))
    await (router.wait_for_requests(1) if is_sent else asyncio.sleep(0))
    await client.aclose()
    error = await fails(asyncio.wait_for(caller, 5))
    assert (error.code, error.message) == ("UNAVAILABLE", "the client was closed")
    error = await fails(client.infer_tensors("m", texts("a")))
    assert error.message == "the client was closed"


# Through a real router


@asynccontextmanager
async def connected(stack: Stack, router_wait_s: float = 2.0) -> AsyncIterator[RouterClient]:
    async with RouterClient(stack.router.address, router_wait_s=router_wait_s) as client:
        yield client


async def test_texts_of_several_callers_share_one_batch_and_each_gets_its_own_answer() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack, connected(stack) as client:
        first = spawn(client.infer_tensors("sentiment", texts("first")))
        await stack.mock.wait_for_arrivals(1)
        asked = [[f"I love it {number} times", "I hate it", ""][: 1 + number % 3] for number in range(30)]
        callers = [
            spawn(client.infer_tensors("sentiment", texts(*values), request_id=str(number)))
            for number, values in enumerate(asked)
        ]
        await stack.until_queued(60)
        gate.open()
        assert [labels(await caller) for caller in callers] == [said_of(*values) for values in asked]
        await first
        assert [batch.rows for batch in stack.mock.batches] == [1, 60]


async def test_vectors_on_the_stream_and_as_tensors_share_a_batch() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack, connected(stack) as client:
        first = asyncio.create_task(client.predict({"a": Agent("churn", [0, 0], "buyer")}))
        await stack.mock.wait_for_arrivals(1)
        native = asyncio.create_task(client.predict({"a": Agent("churn", [1, 2], "buyer")}))
        matrix = np.array([[3, 4], [5, 6]], "<f4")
        inputs = [Tensor("vector", "FP32", (2, 2), matrix.tobytes())]
        tensors = spawn(client.infer_tensors("churn", inputs, agent_type="buyer"))
        await stack.until_queued(3)
        gate.open()
        assert (await native)["a"].output == truth("churn", [[1, 2]], "buyer")
        (output,) = await tensors
        assert np.frombuffer(output.data, "<f4").tolist() == truth("churn", [[3, 4], [5, 6]], "buyer")
        await first
        assert [batch.rows for batch in stack.mock.batches] == [1, 3]


async def test_a_failing_model_tells_its_own_words() -> None:
    mock = MockServer(mock_config(parse_fault("error:model=sentiment")))
    async with serving(mock) as stack, connected(stack) as client:
        error = await fails(client.infer_tensors("sentiment", texts("a")))
        assert (error.code, error.message) == ("UNKNOWN", "the model failed (a fault on demand)")


async def test_a_cancelled_callers_rows_leave_the_routers_queue() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack, connected(stack) as client:
        first = spawn(client.infer_tensors("sentiment", texts("first")))
        await stack.mock.wait_for_arrivals(1)
        gone = spawn(client.infer_tensors("sentiment", texts("a", "b")))
        await stack.until_queued(2)
        gone.cancel()
        await stack.until_queued(0)
        gate.open()
        await first


async def test_a_draining_router_answers_what_it_took_and_refuses_the_rest() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack, connected(stack, router_wait_s=0.2) as client:
        taken = spawn(client.infer_tensors("sentiment", texts("good")))
        await stack.mock.wait_for_arrivals(1)
        drain = asyncio.create_task(stack.router.drain())
        error = await fails(client.infer_tensors("sentiment", texts("late"), timeout_s=5))
        assert error.code == "UNAVAILABLE"
        gate.open()
        assert labels(await taken) == said_of("good")
        await drain
