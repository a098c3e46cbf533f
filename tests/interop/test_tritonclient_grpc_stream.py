"""tritonclient.grpc's stream: `start_stream`, `async_stream_infer`."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.grpc.aio

from tests.interop.asking import PATIENCE_S, Asked, Client, Result, grpc_answer, grpc_arguments
from tests.interop.cases import FaultCases, InferCases, right, rows_for
from tests.interop.meter import until
from tests.interop.stack import Stack
from tests.interop.values import are_equal, vectors

pytestmark = pytest.mark.anyio

KIND = "gRPC stream"
SYSTEM = f"tritonclient {KIND}"


class Stream:
    """A stream; what its callback is told, in order."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._told: queue.SimpleQueue[tuple[Result, Any]] = queue.SimpleQueue()
        client.start_stream(lambda result, error: self._told.put((result, error)))

    def send(self, asked: Asked, **options: object) -> None:
        self._client.async_stream_infer(**grpc_arguments(asked), **options)

    async def next(self) -> Any:  # noqa: ANN401 -- a message of tritonclient or its exception
        result, error = await asyncio.to_thread(self._told.get, timeout=PATIENCE_S)
        return error if result is None else result.get_response()

    def told(self) -> list[Any]:
        """What is there now."""
        return [self._told.get() for _ in range(self._told.qsize())]


@contextmanager
def stream_of(stack: Stack) -> Iterator[tuple[Stream, Client]]:
    with tritonclient.grpc.InferenceServerClient(stack.router) as client:
        yield Stream(client), client
        client.stop_stream(cancel_requests=True)


class TestInfer(InferCases):
    async def test_a_quick_request_overtakes_a_slow_one(self, stack: Stack) -> None:
        with stream_of(stack) as (stream, _):
            stream.send(rows_for("slow", vectors(1), request_id="slow"))
            stream.send(rows_for("churn", vectors(1), request_id="quick"))
            assert (await stream.next()).id == "quick"

    async def test_a_request_without_an_id_is_answered_without_one(self, stack: Stack) -> None:
        with stream_of(stack) as (stream, _):
            stream.send(rows_for("churn", vectors(1)))
            assert (await stream.next()).id == ""

    async def test_two_requests_of_one_id_are_both_answered(self, stack: Stack) -> None:
        with stream_of(stack) as (stream, _):
            for rows in (1, 2):
                stream.send(rows_for("churn", vectors(rows), request_id="same"))
            answers = [await stream.next(), await stream.next()]
            assert sorted((answer.id, answer.outputs[0].shape[0]) for answer in answers) == [("same", 1), ("same", 2)]

    async def test_the_last_answer_says_so_where_that_is_asked_for(self, stack: Stack) -> None:
        """Clients of decoupled models wait for it; ours answer once, so the only answer is the last."""
        with stream_of(stack) as (stream, _):
            stream.send(rows_for("churn", vectors(1)), enable_empty_final_response=True)
            answer = await stream.next()
            assert answer.parameters["triton_final_response"].bool_param is True
            assert len(answer.outputs) == 1

    async def test_a_stream_that_is_stopped_gets_the_answers_that_are_due(self, stack: Stack) -> None:
        with tritonclient.grpc.InferenceServerClient(stack.router) as client:
            stream = Stream(client)
            given = {str(number): vectors(1 + number % 70, seed=number) for number in range(64)}
            for request_id, rows in given.items():
                stream.send(rows_for("churn", rows, request_id=request_id))
            await asyncio.to_thread(client.stop_stream)
            answers = [grpc_answer(result) for result, error in stream.told() if error is None]
        assert {answer.request_id for answer in answers} == given.keys()
        assert all(are_equal(answer.outputs["output"], right("churn", given[answer.request_id])) for answer in answers)

    async def test_requests_of_one_asynchronous_stream_get_their_own_answers(self, stack: Stack) -> None:
        given = {str(number): vectors(1 + number % 3, seed=number) for number in range(64)}

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for request_id, rows in given.items():
                yield grpc_arguments(rows_for("churn", rows, request_id=request_id))

        async with tritonclient.grpc.aio.InferenceServerClient(stack.router) as client:
            answers = [grpc_answer(result) async for result, _ in client.stream_infer(requests())]
        assert {answer.request_id for answer in answers} == given.keys()
        assert all(are_equal(answer.outputs["output"], right("churn", given[answer.request_id])) for answer in answers)


class TestFaults(FaultCases):
    async def test_an_error_tells_its_request_and_the_stream_goes_on(self, stack: Stack) -> None:
        with stream_of(stack) as (stream, _):
            stream.send(rows_for("nobody", vectors(1), request_id="mine"))
            assert (await stream.next()).message().startswith("[request id: mine] ")
            stream.send(rows_for("churn", vectors(1), request_id="next"))
            assert (await stream.next()).id == "next"

    async def test_requests_of_a_stream_that_is_cancelled_are_forgotten(self, stack: Stack) -> None:
        with stream_of(stack) as (stream, client):
            for _ in range(10):
                stream.send(rows_for("slow", vectors(1)))
            await until(stack.metrics, "router_open_calls", 10)
            client.stop_stream(cancel_requests=True)
            assert (await stream.next()).status() == "StatusCode.CANCELLED"
            await until(stack.metrics, "router_open_calls", 0)

    async def test_a_stream_s_timeout_ends_it(self, stack: Stack) -> None:
        with tritonclient.grpc.InferenceServerClient(stack.router) as client:
            told: queue.SimpleQueue[Any] = queue.SimpleQueue()
            client.start_stream(lambda result, error: told.put(error), stream_timeout=0.5)
            client.async_stream_infer(**grpc_arguments(rows_for("slow", vectors(1))))
            error = await asyncio.to_thread(told.get, timeout=PATIENCE_S)
            assert error.status() in {None, "StatusCode.DEADLINE_EXCEEDED"}
        await until(stack.metrics, "router_open_calls", 0)
