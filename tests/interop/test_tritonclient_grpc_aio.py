"""tritonclient.grpc.aio."""

import asyncio

import pytest
import tritonclient.grpc.aio

from tests.interop.asking import Ask, grpc_arguments
from tests.interop.cases import FaultCases, InferCases, ServerCases, error_of, right, rows_for
from tests.interop.meter import until
from tests.interop.stack import Stack
from tests.interop.values import are_equal, vectors

pytestmark = pytest.mark.anyio

KIND = "gRPC aio"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    async def test_64_requests_at_the_same_time_get_their_own_answers(self, ask: Ask) -> None:
        given = [vectors(1, seed=number) for number in range(64)]
        answers = await asyncio.gather(*(ask.infer(rows_for("churn", rows)) for rows in given))
        assert all(
            are_equal(answer.outputs["output"], right("churn", rows))
            for answer, rows in zip(answers, given, strict=True)
        )


class TestFaults(FaultCases):
    async def test_a_client_s_timeout_is_a_deadline_that_the_router_keeps(self, ask: Ask, stack: Stack) -> None:
        error = await error_of(ask, rows_for("slow", vectors(1), client_timeout=0.5))
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
        await until(stack.metrics, "router_open_calls", 0)

    async def test_a_cancelled_task_is_forgotten_and_its_neighbour_answered(self, stack: Stack) -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(stack.router) as client:
            waits = asyncio.ensure_future(client.infer(**grpc_arguments(rows_for("slow", vectors(1)))))
            await until(stack.metrics, "router_open_calls", 1)
            waits.cancel()
            await until(stack.metrics, "router_open_calls", 0)
            await client.infer(**grpc_arguments(rows_for("churn", vectors(1))))


class TestServer(ServerCases):
    pass
