"""tritonclient.http as it is by default: tensors behind the JSON."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import tritonclient.http

from tests.interop.asking import Answer, Ask, http_answer, http_arguments
from tests.interop.cases import FaultCases, InferCases, ServerCases, right, rows_for
from tests.interop.meter import until
from tests.interop.stack import Stack
from tests.interop.values import are_equal, vectors

pytestmark = pytest.mark.anyio

KIND = "HTTP binary"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    @pytest.mark.parametrize("side", ["request", "response"])
    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    async def test_compressed_bodies_are_understood(self, ask: Ask, side: str, algorithm: str) -> None:
        given = vectors(200)
        answer = await ask.infer(rows_for("churn", given, **{f"{side}_compression_algorithm": algorithm}))
        assert are_equal(answer.outputs["output"], right("churn", given))

    async def test_asynchronous_requests_get_their_own_answers(self, stack: Stack) -> None:
        given = [vectors(1 + number % 3, seed=number) for number in range(32)]

        def ask_all() -> list[Answer]:
            with tritonclient.http.InferenceServerClient(stack.gateway, concurrency=16) as client:
                calls = [
                    client.async_infer(**http_arguments(rows_for("churn", rows), is_binary=True)) for rows in given
                ]
                return [http_answer(call.get_result()) for call in calls]

        with ThreadPoolExecutor(1) as thread:
            answers = await asyncio.get_running_loop().run_in_executor(thread, ask_all)
        assert all(
            are_equal(answer.outputs["output"], right("churn", rows))
            for answer, rows in zip(answers, given, strict=True)
        )


class TestFaults(FaultCases):
    async def test_a_client_that_gives_up_is_forgotten(self, stack: Stack) -> None:
        def give_up() -> None:
            with tritonclient.http.InferenceServerClient(stack.gateway, network_timeout=0.5) as client:
                client.infer(**http_arguments(rows_for("slow", vectors(1)), is_binary=True))

        with ThreadPoolExecutor(1) as thread, pytest.raises(TimeoutError):
            await asyncio.get_running_loop().run_in_executor(thread, give_up)
        await until(stack.metrics, "router_open_calls", 0)


class TestServer(ServerCases):
    pass
