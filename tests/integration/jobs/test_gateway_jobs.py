"""Gateways with real stores: the way of a job through HTTP, worker and database, on both engines."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import httpx
import pytest

from rest_gateway.app import Parts, create_app, make_parts
from rest_gateway.config import Settings
from rest_gateway.jobs.records import JobStore
from tests.integration.jobs.conftest import OpenStore
from tests.unit.rest_gateway.fake_router import FakeRouter

pytestmark = pytest.mark.anyio

TEXT = json.dumps({"text": "This product is amazing!"})
AGENTS = json.dumps({"agents": {"b": {"vector": [1, 2], "model_name": "m"}, "a": {"vector": [], "model_name": "n"}}})


class Gateway:
    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts = parts
        transport = httpx.ASGITransport(create_app(parts, settings))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def submit(self, content: str = TEXT, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post("/predict", content=content, headers=named)

    async def ended(self, path: str) -> dict[str, Any]:
        response = await self.http.get(path, headers={"Prefer": "wait=30"})
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def running(self) -> float | None:
        return self.parts.metrics.registry.get_sample_value("gateway_jobs_running")

    async def kill(self) -> None:
        """As by SIGKILL: nothing is given back."""
        await self.parts.jobs.aclose()


@contextlib.asynccontextmanager
async def gateway(store: JobStore, router: FakeRouter | None = None, **changes: object) -> AsyncIterator[Gateway]:
    settings = Settings.model_validate(changes)
    given = Gateway(make_parts(router or FakeRouter(), store, settings), settings)
    given.parts.jobs.start()
    await eventually(lambda: given.parts.jobs.database == "connected" and given.parts.jobs.has_tried_to_claim)
    try:
        async with given.http:
            yield given
    finally:
        await given.parts.jobs.aclose()


async def eventually(condition: Callable[[], bool]) -> None:
    """What other tasks and threads bring about has no event to wait for."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def busy_router() -> FakeRouter:
    router = FakeRouter()
    router.close_gate()
    return router


async def test_a_text_goes_its_way(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store) as given:
        response = await given.submit()
        assert response.status_code == 202
        assert response.json()["status"] == "processing"
        document = await given.ended(response.headers["location"])
        assert document["result"] == {"sentiment": "positive", "confidence": 0.75}
        assert (document["status"], document["attempt"], document["error"]) == ("completed", 1, None)
        jobs = (await given.http.get("/jobs?status=completed&kind=text")).json()["jobs"]
        assert jobs == [document]
        assert (await given.http.delete(response.headers["location"])).status_code == 204
        assert (await given.http.get("/jobs")).json() == {"jobs": [], "next_cursor": None}


async def test_agents_go_their_way(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store) as given:
        waited = (await given.submit(AGENTS)).json()
        response = await given.submit(AGENTS, Prefer="respond-async, wait=30")
        assert response.status_code == 200
        assert response.json()["result"] == waited


async def test_a_hundred_concurrent_duplicates_are_one_job(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store) as given:
        answers = await asyncio.gather(*(given.submit(Idempotency_Key="k") for _ in range(100)))
        assert sorted(answer.status_code for answer in answers) == [200] * 99 + [202]
        assert len({answer.json()["job_id"] for answer in answers}) == 1
        other = await given.submit(AGENTS, Idempotency_Key="k", Prefer="respond-async")
        assert other.status_code == 422


async def test_a_key_finds_its_job_after_a_restart(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store) as given:
        first = await given.submit(Idempotency_Key="k", Prefer="wait=30")
    async with open_store() as store, gateway(store) as given:
        again = await given.submit(Idempotency_Key="k")
        assert (again.status_code, again.json()) == (200, first.json())


async def test_what_a_drained_gateway_gives_back_is_done_by_the_next(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store, busy_router()) as given:
        path = (await given.submit()).headers["location"]
        await given.parts.jobs.drain(0)
        assert (await given.http.get(path)).json()["status"] == "pending"
    async with open_store() as store, gateway(store) as given:
        document = await given.ended(path)
        assert (document["status"], document["attempt"]) == ("completed", 2)


async def test_what_a_killed_gateway_held_is_claimed_again_when_its_lease_is_over(open_store: OpenStore) -> None:
    async with open_store(lease_s=1.0) as store:
        async with gateway(store, busy_router()) as given:
            path = (await given.submit()).headers["location"]
            await given.kill()
        async with gateway(store) as given:
            document = await given.ended(path)
            assert (document["status"], document["attempt"]) == ("completed", 2)
            assert given.parts.metrics.registry.get_sample_value("gateway_jobs_lost_leases_total") == 1


async def test_a_lost_worker_that_comes_back_changes_nothing(open_store: OpenStore) -> None:
    """Its lease was over, another finished; its own end is fenced."""
    async with open_store() as store:
        frozen = busy_router()
        async with gateway(store, frozen) as late:
            response = await late.submit()
            path = response.headers["location"]
            await store.release([(UUID(response.json()["job_id"]), 1)], 0.0, "as if its lease had been lost")
            async with gateway(store, job_concurrency=1) as given:
                assert (await given.ended(path))["attempt"] == 2
            frozen.release()
            await eventually(lambda: late.running() == 0)
            assert (await late.ended(path))["attempt"] == 2


async def test_a_cancelled_job_stays_cancelled(open_store: OpenStore) -> None:
    router = busy_router()
    async with open_store() as store, gateway(store, router) as given:
        path = (await given.submit()).headers["location"]
        await router.entered.wait()
        assert (await given.http.post(f"{path}/cancel")).json()["status"] == "cancelled"
        await router.cancelled.wait()
        assert (await given.http.get(path)).json()["status"] == "cancelled"
        assert (await given.http.post(f"{path}/cancel")).status_code == 200


async def test_the_change_that_another_process_makes_is_seen(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store, busy_router()) as given:
        response = await given.submit()
        waiting = asyncio.create_task(given.ended(response.headers["location"]))
        await store.cancel(UUID(response.json()["job_id"]), "default")  # not through this gateway's own routes
        assert (await waiting)["status"] == "cancelled"


async def test_a_job_past_its_time_fails(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store, busy_router(), job_timeout_s=0.5) as given:
        document = await given.ended((await given.submit()).headers["location"])
        assert (document["status"], document["error"]["code"]) == ("failed", "DEADLINE_EXCEEDED")


async def test_old_jobs_go_with_their_keys(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store, job_retention_s=0.2) as given:
        first = await given.submit(Idempotency_Key="k", Prefer="wait=30")
        while (await given.http.get(f"/jobs/{first.json()['job_id']}")).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert (await given.submit(Idempotency_Key="k")).status_code == 202


async def test_events_of_a_real_job(open_store: OpenStore) -> None:
    async with open_store() as store, gateway(store) as given:
        path = (await given.submit()).headers["location"]
        events = (await given.http.get(f"{path}/events")).text
        assert events.rstrip().splitlines()[-2] == "event: completed"
        last = events.rstrip().splitlines()[-3].removeprefix("id: ")
        response = await given.http.get(f"{path}/events", headers={"Last-Event-ID": last})
        assert response.status_code == 204
