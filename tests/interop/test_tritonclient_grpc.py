"""tritonclient.grpc: the client most people have."""

import asyncio
import queue
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from tests.interop.asking import PATIENCE_S, Ask, grpc_answer, grpc_arguments
from tests.interop.cases import FaultCases, InferCases, ServerCases, error_of, right, rows_for
from tests.interop.meter import until
from tests.interop.stack import Stack
from tests.interop.values import are_equal, vectors

pytestmark = pytest.mark.anyio

KIND = "gRPC"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    async def test_a_compressed_request_is_answered(self, ask: Ask, algorithm: str) -> None:
        given = vectors(200)
        answer = await ask.infer(rows_for("churn", given, compression_algorithm=algorithm))
        assert are_equal(answer.outputs["output"], right("churn", given))

    async def test_callbacks_of_many_requests_get_their_own_answers(self, stack: Stack) -> None:
        given = [vectors(1 + number % 3, seed=number) for number in range(64)]
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with tritonclient.grpc.InferenceServerClient(stack.router) as client:
            for number, rows in enumerate(given):
                client.async_infer(
                    **grpc_arguments(rows_for("churn", rows, request_id=str(number))),
                    callback=lambda result, error: answers.put(error or grpc_answer(result)),
                )
            got = [await asyncio.to_thread(answers.get, timeout=PATIENCE_S) for _ in given]
        assert {answer.request_id for answer in got} == {str(number) for number in range(64)}
        assert all(are_equal(answer.outputs["output"], right("churn", given[int(answer.request_id)])) for answer in got)


class TestFaults(FaultCases):
    async def test_a_client_s_timeout_is_a_deadline_that_the_router_keeps(self, ask: Ask, stack: Stack) -> None:
        error = await error_of(ask, rows_for("slow", vectors(1), client_timeout=0.5))
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
        await until(stack.metrics, "router_open_calls", 0)

    async def test_a_cancelled_request_is_forgotten_and_its_neighbour_answered(self, ask: Ask, stack: Stack) -> None:
        ended: queue.SimpleQueue[InferenceServerException] = queue.SimpleQueue()
        with tritonclient.grpc.InferenceServerClient(stack.router) as client:
            call = client.async_infer(
                **grpc_arguments(rows_for("slow", vectors(1))), callback=lambda result, error: ended.put(error)
            )
            await until(stack.metrics, "router_open_calls", 1)
            call.cancel()
            error = await asyncio.to_thread(ended.get, timeout=PATIENCE_S)
        assert error.status() == "StatusCode.CANCELLED"
        await until(stack.metrics, "router_open_calls", 0)
        await ask.infer(rows_for("churn", vectors(1)))


class TestServer(ServerCases):
    pass
