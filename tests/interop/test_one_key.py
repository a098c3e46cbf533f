"""Callers of every kind on one key in one run: their rows share batches, and each gets its own answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from statistics import fmean

import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio

from mock_nn.models import expected
from router_client import Agent, RouterClient
from tests.acceptance.processes import Program
from tests.acceptance.test_end_to_end import batches_of
from tests.interop.asking import GrpcAio, GrpcAioStream
from tests.interop.cases import rows_for
from tests.interop.report import NOTE
from tests.interop.stack import started_gateway, started_mock, started_router
from tests.interop.values import Array, vectors

pytestmark = pytest.mark.anyio

SYSTEM = "tritonclient, native and REST callers on one key"
CALLERS_OF_A_KIND = 64
REQUESTS_EACH = 6
MAX_BATCH = 64
CALL_S = 0.3

# One row to its answer.
Way = Callable[[Array], Awaitable[Array]]


@contextmanager
def one_slot(directory: Path) -> Iterator[tuple[Program, str, str]]:
    """A mock that takes its time, a router that gives it one batch at a time, a gateway."""
    with started_mock("--latency", f"{CALL_S}") as mock:
        address = mock.wait_for(r"listening on ([\d.:]+)")[1]
        backends = {"mock": {"addresses": [address], "max_in_flight": 1}}
        models = [{"backend": "mock", "max_batch_size": MAX_BATCH}]
        with started_router(directory, backends, models) as (router, _), started_gateway(router) as gateway:
            yield mock, router, gateway


def native(client: RouterClient) -> Way:
    async def ask(row: Array) -> Array:
        results = await client.predict({"me": Agent("churn", row[0].tolist())})
        assert results["me"].error is None
        return np.array(results["me"].output, np.float32)

    return ask


def http_to(gateway: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{gateway}", trust_env=False, verify=False, timeout=60)


def both(count: int, one: Way, other: Way) -> list[Way]:
    """So many, by turns."""
    return [one, other] * (count // 2)


def predict(http: httpx.AsyncClient) -> Way:
    async def ask(row: Array) -> Array:
        response = await http.post(
            "/predict", json={"agents": {"me": {"model_name": "churn", "vector": row[0].tolist()}}}
        )
        assert response.status_code == 200, response.text
        return np.array(response.json()["results"]["me"]["output"], np.float32)

    return ask


def open_inference_rest(http: httpx.AsyncClient) -> Way:
    async def ask(row: Array) -> Array:
        tensor = {"name": "vector", "shape": row.shape, "datatype": "FP32", "data": row.tolist()}
        response = await http.post("/v2/models/churn/infer", json={"inputs": [tensor]})
        assert response.status_code == 200, response.text
        return np.array(response.json()["outputs"][0]["data"], np.float32)

    return ask


def tritons(client: GrpcAio) -> Way:
    async def ask(row: Array) -> Array:
        return (await client.infer(rows_for("churn", row))).outputs["output"]

    return ask


async def caller(ask: Way, number: int) -> int:
    """How many rows it asked for; each answer is its own."""
    for turn in range(REQUESTS_EACH):
        row = vectors(1, seed=1000 * number + turn)
        assert (await ask(row)).tobytes() == expected("churn", "", row).tobytes()
    return REQUESTS_EACH


async def test_192_callers_of_three_kinds_share_batches_and_get_their_own_answers(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with one_slot(tmp_path) as (mock, router, gateway):
        async with AsyncExitStack() as stack:
            triton = await stack.enter_async_context(tritonclient.grpc.aio.InferenceServerClient(router))
            client = await stack.enter_async_context(RouterClient(router))
            # One each: httpx looks through all connections of a pool for each request, 10 ms with 64 of them.
            https = [await stack.enter_async_context(http_to(gateway)) for _ in range(CALLERS_OF_A_KIND)]
            ways = [
                *both(CALLERS_OF_A_KIND, tritons(GrpcAio(triton)), tritons(GrpcAioStream(triton))),
                *[native(client)] * CALLERS_OF_A_KIND,
                *(predict(http) for http in https[::2]),
                *(open_inference_rest(http) for http in https[1::2]),
            ]
            asked = sum(await asyncio.gather(*(caller(ask, number) for number, ask in enumerate(ways))))
        batches = batches_of(mock)
    rows = [rows for *_, rows in batches]
    told = (
        f"{asked} rows of {len(ways)} callers in {len(rows)} batches, {fmean(rows):.1f} of {MAX_BATCH} rows on average"
    )
    record_property(NOTE, told)
    assert {(model, agent_type, dim) for model, agent_type, dim, _ in batches} == {("churn", "", 8)}
    assert sum(rows) == asked == len(ways) * REQUESTS_EACH
    assert fmean(rows) > MAX_BATCH / 2, told
