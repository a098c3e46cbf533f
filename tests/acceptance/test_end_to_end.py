"""The main job: REST, unary and stream callers at once, through gateway and router, over two replicas.

An independent ledger: every row is drawn here, every answer is compared with the mock's documented function, bit by
bit, and the mocks' logs tell what they were sent.
"""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import grpc.aio
import httpx
import numpy as np
import pytest

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from router_client import Agent, RouterClient
from tests.acceptance.processes import Program, running

pytestmark = pytest.mark.anyio

SEED = 20_261_121
CALLERS = 200
REQUESTS_EACH = 3
MAX_AGENTS = 20
MAX_BATCH = 64
# (model, agent type, vector length)
KEYS = [("churn", "buyer", 3), ("churn", "seller", 3), ("churn", "buyer", 8), ("fraud", "buyer", 3), ("fraud", "", 16)]

Agents = dict[str, Agent]
Answers = dict[str, list[float]]
Ask = Callable[[Agents], Awaitable[Answers]]


@contextmanager
def two_mocks_router_and_gateway() -> Iterator[tuple[list[Program], str, str]]:
    with ExitStack() as stack:
        mocks = [
            stack.enter_context(running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "0.2-0.4", "--seed", seed))
            for seed in ("1", "2")
        ]
        addresses = [mock.wait_for(r"listening on ([\d.:]+)")[1] for mock in mocks]
        router = stack.enter_context(
            running(
                "router",
                ROUTER_LISTEN="127.0.0.1:0",
                ROUTER_METRICS="127.0.0.1:0",
                ROUTER_BACKENDS__MOCK__ADDRESSES=json.dumps(addresses),
                ROUTER_BACKENDS__MOCK__MAX_IN_FLIGHT="1",
            )
        )
        router_address = router.wait_for(r"router listens on ([\d.:]+)")[1]
        gateway = stack.enter_context(
            running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER=router_address)
        )
        yield mocks, router_address, gateway.wait_for(r"listen\w* on (?:http://)?([\d.:]+)")[1]


@asynccontextmanager
async def three_ways_to_ask(router_address: str, gateway_address: str) -> AsyncIterator[list[Ask]]:
    """REST, unary gRPC and the native stream, each from agents to the answers by name."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=f"http://{gateway_address}", trust_env=False, timeout=60, limits=limits) as http,
        grpc.aio.insecure_channel(router_address, options=[("grpc.enable_http_proxy", 0)]) as channel,
        RouterClient(router_address) as client,
    ):
        stub = pb_grpc.InferenceRouterServiceStub(channel)

        async def rest(agents: Agents) -> Answers:
            body = {
                name: {"vector": list(agent.vector), "model_name": agent.model_name, "agent_type": agent.agent_type}
                for name, agent in agents.items()
            }
            response = await http.post("/predict", json={"agents": body})
            assert response.status_code == 200, response.text
            content = response.json()
            assert content["errors"] == {}
            return {name: result["output"] for name, result in content["results"].items()}

        async def unary(agents: Agents) -> Answers:
            request = pb.PredictRequest(
                agents={
                    name: pb.Agent(vector=agent.vector, model_name=agent.model_name, agent_type=agent.agent_type)
                    for name, agent in agents.items()
                }
            )
            response = await stub.Predict(request)
            return {name: list(result.output) for name, result in response.results.items()}

        async def stream(agents: Agents) -> Answers:
            results = await client.predict(agents)
            assert all(result.error is None for result in results.values())
            return {name: list(result.output) for name, result in results.items()}

        yield [rest, unary, stream]


def draw(rng: random.Random) -> Agents:
    agents = {}
    for number in range(rng.randint(1, MAX_AGENTS)):
        model, agent_type, dim = rng.choice(KEYS)
        vector = np.array([rng.uniform(-9, 9) for _ in range(dim)], "<f4").tolist()
        agents[f"agent {number} ☃"] = Agent(model_name=model, vector=vector, agent_type=agent_type)
    return agents


def right(agents: Agents) -> Answers:
    return {
        name: [float(expected(agent.model_name, agent.agent_type, np.array([agent.vector], "<f4"))[0])]
        for name, agent in agents.items()
    }


def as_float32(answers: Answers) -> dict[str, bytes]:
    """REST prints a float32's shortest form; as float32 it is the same number."""
    return {name: np.array(output, "<f4").tobytes() for name, output in answers.items()}


async def test_200_callers_of_three_kinds_get_their_own_answers_and_share_full_batches() -> None:
    with two_mocks_router_and_gateway() as (mocks, router_address, gateway_address):
        async with three_ways_to_ask(router_address, gateway_address) as ways:
            sent: Counter[tuple[str, str, int]] = Counter()

            async def caller(number: int) -> int:
                rng = random.Random(SEED + number)
                ask = ways[number % len(ways)]
                for _ in range(REQUESTS_EACH):
                    agents = draw(rng)
                    assert as_float32(await ask(agents)) == as_float32(right(agents))
                    sent.update((agent.model_name, agent.agent_type, len(agent.vector)) for agent in agents.values())
                return REQUESTS_EACH

            answered = sum(await asyncio.gather(*(caller(number) for number in range(CALLERS))))
        assert answered == CALLERS * REQUESTS_EACH
        batches = [batch for mock in mocks for batch in batches_of(mock)]

    rows = [batch[3] for batch in batches]
    print(f"\nseed {SEED}: {sum(sent.values())} rows in {len(rows)} batches, {rows.count(MAX_BATCH)} of them full")
    received: Counter[tuple[str, str, int]] = Counter()
    for model, agent_type, dim, count in batches:
        received[model, agent_type, dim] += count
    assert received == sent
    assert max(rows) == MAX_BATCH
    assert rows.count(MAX_BATCH) >= len(rows) / 4
    assert all(any(batches_of(mock)) for mock in mocks)


_LINE = re.compile(r"batch model='(\w+)' agent_type='(\w*)' rows=(\d+) dim=(\d+)")


def batches_of(mock: Program) -> list[tuple[str, str, int, int]]:
    """(model, agent type, dim, rows) of each line in the mock's log so far."""
    found = [_LINE.search(line) for line in mock.lines_so_far()]
    return [(match[1], match[2], int(match[4]), int(match[3])) for match in found if match]
