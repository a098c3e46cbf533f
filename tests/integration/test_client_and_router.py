"""The client and the real router, where their agreement is what is tested."""

import asyncio

import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client import RouterClient
from tests.integration.stack import Gate, block, floats, serving, truth

pytestmark = pytest.mark.anyio


async def test_the_routers_own_message_limit_refuses_one_call_and_harms_no_neighbour() -> None:
    """A message over the limit ends the stream with everybody's calls; the router says its limit at the start."""
    gate = Gate()
    async with (
        serving(gate.mock(), limits={"max_message_bytes": 50_000}) as stack,
        RouterClient(stack.router.address) as client,
    ):
        neighbour = asyncio.create_task(client.infer([block("churn", [[1, 2]])], timeout_s=30))
        await stack.mock.wait_for_arrivals(1)
        (refused,) = await client.infer([block("churn", [[1.0] * 20_000])], timeout_s=30)
        assert refused.error.code == "INVALID_ARGUMENT"
        assert "over the limit of 50000" in refused.error.message
        gate.open()
        (answer,) = await neighbour
        assert floats(answer.outputs) == truth("churn", [[1, 2]])


async def test_messages_of_many_calls_keep_the_routers_limit_too() -> None:
    async with (
        serving(limits={"max_message_bytes": 50_000}) as stack,
        RouterClient(stack.router.address) as client,
    ):
        rows = [[float(number)] * 2_000 for number in range(40)]
        calls = [client.infer([block("churn", [row])], timeout_s=30) for row in rows]
        for row, answers in zip(rows, await asyncio.gather(*calls), strict=True):
            assert [floats(answer.outputs) for answer in answers] == [truth("churn", [row])]


async def test_a_cancelled_call_leaves_router_and_client_as_they_were() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack, RouterClient(stack.router.address) as client:
        first = asyncio.create_task(client.infer([block("churn", [[1]])]))
        await stack.mock.wait_for_arrivals(1)
        cancelled = asyncio.create_task(client.infer([block("churn", [[2]])]))
        await stack.until_queued(1)
        cancelled.cancel()
        await stack.until_queued(0)
        gate.open()
        (answer,) = await first
        assert answer == pb.Answer(call_id=answer.call_id, rows=1, outputs=answer.outputs, done=True)
        await stack.until_gauge("router_open_calls", 0)
