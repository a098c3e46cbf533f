"""Callers who ask again as soon as they are answered: their rows share whole batches, instead of two halves in turn.

Judged by what the mock saw, not by the clock: on a busy machine rates say little. A release that goes at once sends
half batches (32 of 64 rows), whatever the machine.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import pytest

from router.core.service_time import MIN_CALLS
from router_client import Agent, RouterClient
from tests.acceptance.processes import Program, running

pytestmark = pytest.mark.anyio

CALLERS = 64
REQUESTS_EACH = 50
CALL_S = 0.1


@contextmanager
def mock_and_router(**settings: str) -> Iterator[tuple[Program, str]]:
    """One slot."""
    with running("mock_nn", "--listen", "127.0.0.1:0", "--latency", f"{CALL_S}") as mock:
        address = mock.wait_for(r"listening on ([\d.:]+)")[1]
        given = {
            "ROUTER_LISTEN": "127.0.0.1:0",
            "ROUTER_METRICS": "127.0.0.1:0",
            "ROUTER_BACKENDS__MOCK__ADDRESSES": json.dumps([address]),
            "ROUTER_BACKENDS__MOCK__MAX_IN_FLIGHT": "1",
        }
        with running("router", **given, **settings) as router:
            yield mock, router.wait_for(r"router listens on ([\d.:]+)")[1]


async def ask_on_and_on(client: RouterClient, number: int) -> None:
    """They begin one after the other during a call or two: together they would stay together by themselves."""
    await asyncio.sleep(number * 2 * CALL_S / CALLERS)
    for _ in range(REQUESTS_EACH):
        results = await client.predict({"alice": Agent("churn", [1.0, 2.0])})
        assert results["alice"].error is None


async def test_64_callers_of_one_stream_share_whole_batches() -> None:
    with mock_and_router() as (mock, router):
        async with RouterClient(router) as client:
            await asyncio.gather(*(ask_on_and_on(client, number) for number in range(CALLERS)))
        rows: list[int] = []
        while sum(rows) < CALLERS * REQUESTS_EACH:  # the mock tells of a batch once it has answered it
            rows.append(int(mock.wait_for(r"^.*batch model=.* rows=(\d+) ")[1]))
    assert sum(rows) == CALLERS * REQUESTS_EACH
    # Until MIN_CALLS batches were measured nothing is held; as many again for the wave. At the end callers drop out.
    assert fmean(rows[2 * MIN_CALLS : -3]) >= 55, rows
