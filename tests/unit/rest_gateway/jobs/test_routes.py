"""The jobs of the API, called through ASGI in virtual time, with a store in memory and the real worker."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import httpx
import pytest
from starlette.types import Message

from rest_gateway.app import Parts, create_app, make_parts
from rest_gateway.config import Settings
from rest_gateway.schemas import openapi, openapi_jobs
from tests.unit.rest_gateway.fake_router import FakeRouter, failing, tensor_failure
from tests.unit.rest_gateway.jobs.fake_store import FakeStore, now_s, until
from tests.unit.rest_gateway.jobs.workshop import busy_router

pytestmark = pytest.mark.anyio

TEXT = {"text": "This product is amazing!"}
AGENTS = {
    "agents": {"b": {"vector": [1, 2], "model_name": "m"}, "a": {"vector": [3], "model_name": "n", "agent_type": "t"}}
}
ONE_BAD = {"agents": {"b": {"vector": [1, 2], "model_name": "m"}, "a": {"vector": [], "model_name": "n"}}}
NOBODY = "00000000-0000-0000-0000-0000000000ff"


class Gateway:
    def __init__(self, router: FakeRouter, settings: Settings) -> None:
        self.router, self.settings = router, settings
        self.store = FakeStore(max_waiting=settings.job_max_waiting)
        self.parts: Parts = make_parts(router, self.store, settings)
        self.app = create_app(self.parts, settings)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway")

    async def submit(self, body: object = TEXT, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post("/predict", content=json.dumps(body), headers=named)

    async def job(self, job_id: str) -> dict[str, Any]:
        response = await self.http.get(f"/jobs/{job_id}")
        assert response.status_code == 200
        document: dict[str, Any] = response.json()
        return document

    async def ended(self, job_id: str) -> dict[str, Any]:
        await until(lambda: self.store.status(UUID(job_id)) not in ("pending", "processing"))
        return await self.job(job_id)


@asynccontextmanager
async def gateway(router: FakeRouter | None = None, **settings: object) -> AsyncIterator[Gateway]:
    given = Gateway(router or FakeRouter(), Settings.model_validate(settings))
    given.parts.jobs.start()
    await until(lambda: given.parts.jobs.has_tried_to_claim)
    try:
        async with given.http:
            yield given
    finally:
        await given.parts.jobs.aclose()


# Making jobs


async def test_a_text_is_answered_202_at_once_and_completed_later() -> None:
    async with gateway(busy_router()) as given:
        response = await given.submit()
        assert response.status_code == 202
        receipt = response.json()
        assert set(receipt) == {"job_id", "status"}
        assert receipt["status"] == "processing"
        assert response.headers["location"] == f"/jobs/{receipt['job_id']}"
        assert response.headers["vary"] == "Prefer"
        assert "preference-applied" not in response.headers
        assert now_s() < 0.1
        before = await given.job(receipt["job_id"])
        assert (before["status"], before["result"], before["error"], before["kind"]) == (
            "processing",
            None,
            None,
            "text",
        )
        assert (before["attempt"], before["finished_at"]) == (1, None)
        given.router.release()
        after = await given.ended(receipt["job_id"])
        assert (after["status"], after["error"]) == ("completed", None)
        assert after["result"] == {"sentiment": "positive", "confidence": 0.75}
        assert after["version"] == 2
        for name in ("created_at", "updated_at", "started_at", "finished_at"):
            assert re.fullmatch(r"2026-07-01T12:00:0\d\.\d{3}Z", after[name])
        assert given.store.rows[UUID(receipt["job_id"])].new.timeout_s == 3600


async def test_a_failing_model_gives_failed_with_the_reason() -> None:
    async with gateway(FakeRouter(tensors=tensor_failure("UNKNOWN", "the model raised ValueError"))) as given:
        document = await given.ended((await given.submit()).json()["job_id"])
        assert document["status"] == "failed"
        assert document["error"] == {"code": "UNKNOWN", "message": "the model raised ValueError"}
        assert document["result"] is None


async def test_agents_whose_client_prefers_not_to_wait_become_a_job_with_the_body_of_the_answer() -> None:
    async with gateway() as given:
        waited = (await given.submit(ONE_BAD)).json()
        response = await given.submit(ONE_BAD, Prefer="respond-async")
        assert response.status_code == 202
        assert response.headers["preference-applied"] == "respond-async"
        assert response.headers["vary"] == "Prefer"
        document = await given.ended(response.json()["job_id"])
        assert (document["kind"], document["status"], document["error"]) == ("agents", "completed", None)
        assert document["result"] == waited


async def test_agents_that_all_fail_fail_the_job() -> None:
    async with gateway(FakeRouter(failing("NOT_FOUND", "no such model"))) as given:
        document = await given.ended((await given.submit(AGENTS, Prefer="respond-async")).json()["job_id"])
        assert document["status"] == "failed"
        assert document["error"] == {"code": "NOT_FOUND", "message": "no such model"}
        assert set(document["result"]["errors"]) == {"a", "b"}


async def test_agents_of_whom_nobody_can_travel_are_refused_at_once() -> None:
    async with gateway() as given:
        response = await given.submit({"agents": {"a": {"vector": []}}}, Prefer="respond-async")
        assert response.status_code == 422
        assert response.json()["errors"]["a"]["detail"] == "model_name is missing"
        assert not given.store.rows


@pytest.mark.parametrize(
    "headers", [{}, {"Prefer": "wait=5"}, {"Prefer": "respond-async", "Accept": "text/event-stream"}]
)
async def test_other_agents_wait_and_never_touch_the_database(headers: dict[str, str]) -> None:
    async with gateway() as given:
        given.store.is_away = True
        calls = given.store.calls["submit"]
        response = await given.submit(AGENTS, **headers)
        assert response.status_code == 200
        assert "preference-applied" not in response.headers
        assert given.store.calls["submit"] == calls


@pytest.mark.parametrize(("timeout_s", "kept_s"), [(None, 100), (7, 7), (7000, 100)])
@pytest.mark.parametrize("body", [TEXT, AGENTS])
async def test_a_job_has_the_time_that_its_client_and_the_gateway_allow(
    body: dict[str, object], timeout_s: float | None, kept_s: float
) -> None:
    async with gateway(job_timeout_s=100) as given:
        response = await given.submit(body | {"timeout_s": timeout_s}, Prefer="respond-async")
        assert given.store.rows[UUID(response.json()["job_id"])].new.timeout_s == kept_s


async def test_a_job_past_its_time_fails() -> None:
    async with gateway(FakeRouter(tensors=tensor_failure("UNAVAILABLE", "no router")), job_timeout_s=5) as given:
        document = await given.ended((await given.submit()).json()["job_id"])
        assert document["error"]["code"] == "DEADLINE_EXCEEDED"
        assert now_s() < 7


async def test_texts_have_a_longest_length() -> None:
    async with gateway(max_text_length=5) as given:
        assert (await given.submit({"text": "12345"})).status_code == 202
        response = await given.submit({"text": "123456"})
        assert response.status_code == 422
        assert response.json()["detail"] == "text has 6 characters, more than 5"


async def test_past_the_bound_of_waiting_jobs_the_answer_is_429() -> None:
    async with gateway(busy_router(), job_concurrency=1, job_max_waiting=2) as given:
        assert [(await given.submit()).status_code for _ in range(4)] == [202, 202, 202, 429]
        response = await given.submit()
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["detail"] == "too many jobs wait"


# Waiting


@pytest.mark.parametrize(
    ("prefer", "applied"), [("wait=10", "wait=10"), ("respond-async, wait=99", "respond-async, wait=60")]
)
@pytest.mark.parametrize("body", [TEXT, AGENTS])
async def test_who_waits_long_enough_gets_the_finished_job(body: dict[str, object], prefer: str, applied: str) -> None:
    if body is AGENTS and "respond-async" not in prefer:
        prefer, applied = f"respond-async, {prefer}", f"respond-async, {applied}"
    async with gateway(busy_router()) as given:
        asking = asyncio.create_task(given.submit(body, Prefer=prefer))
        await asyncio.sleep(5)
        assert not asking.done()
        given.router.release()
        response = await asking
        assert now_s() < 5.1
        assert (response.status_code, response.json()["status"]) == (200, "completed")
        assert response.json() == await given.job(response.json()["job_id"])
        assert response.headers["preference-applied"] == applied
        assert response.headers["vary"] == "Prefer"
        assert response.headers["content-location"] == f"/jobs/{response.json()['job_id']}"


async def test_who_does_not_wait_long_enough_gets_202() -> None:
    async with gateway(busy_router()) as given:
        response = await given.submit(Prefer="wait=3")
        assert 3 <= now_s() < 3.1
        assert (response.status_code, response.json()["status"]) == (202, "processing")
        assert response.headers["preference-applied"] == "wait=3"


async def test_who_waits_for_a_job_that_fails_gets_it() -> None:
    async with gateway(FakeRouter(tensors=tensor_failure("UNKNOWN"))) as given:
        response = await given.submit(Prefer="wait=3")
        assert (response.status_code, response.json()["status"]) == (200, "failed")


async def test_a_database_that_goes_away_while_one_waits_costs_no_receipt() -> None:
    async with gateway(busy_router()) as given:
        asking = asyncio.create_task(given.submit(Prefer="wait=10"))
        await asyncio.sleep(1)
        given.store.is_away = True
        (job_id,) = given.store.rows
        given.parts.jobs.watch.changed(job_id)  # makes it look
        response = await asking
        assert (response.status_code, response.json()) == (202, {"job_id": str(job_id), "status": "processing"})


async def test_a_drain_answers_who_waits() -> None:
    async with gateway(busy_router()) as given:
        asking = asyncio.create_task(given.submit(Prefer="wait=60"))
        await asyncio.sleep(1)
        job_id = str(next(iter(given.store.rows)))
        polling = asyncio.create_task(given.http.get(f"/jobs/{job_id}", headers={"Prefer": "wait=60"}))
        await asyncio.sleep(1)
        given.parts.open_requests.start_drain()
        assert [(await asking).status_code, (await polling).status_code] == [202, 202]
        assert now_s() < 2.1
        assert (await given.submit()).json()["status"] == "pending"  # for the next process


# Idempotency


@pytest.mark.parametrize("keys", [("abc", '"abc"'), ('"a b"', '"a b"')])
async def test_the_same_key_and_body_find_the_same_job(keys: tuple[str, str]) -> None:
    async with gateway(busy_router()) as given:
        first = await given.submit(Idempotency_Key=keys[0])
        again = await given.submit(TEXT | {"ignored": 1}, Idempotency_Key=keys[1])
        assert (first.status_code, again.status_code) == (202, 200)
        assert again.json() == await given.job(first.json()["job_id"])
        assert again.headers["location"] == first.headers["location"]
        given.router.release()
        await given.ended(first.json()["job_id"])
        assert (await given.submit(Idempotency_Key=keys[0])).json()["status"] == "completed"
        assert len(given.store.rows) == 1
        assert len(given.router.tensor_calls) == 1


async def test_the_same_key_with_another_body_is_refused() -> None:
    async with gateway() as given:
        await given.submit(Idempotency_Key="abc")
        for body in ({"text": "Another"}, AGENTS):
            response = await given.submit(body, Idempotency_Key="abc", Prefer="respond-async")
            assert response.status_code == 422
            assert response.json()["detail"] == "this Idempotency-Key belongs to a job with another body"


async def test_a_repetition_may_wait_for_the_job_that_runs() -> None:
    async with gateway(busy_router()) as given:
        first = await given.submit(Idempotency_Key="abc")
        assert (await given.submit(Idempotency_Key="abc", Prefer="wait=1")).status_code == 202
        asking = asyncio.create_task(given.submit(Idempotency_Key="abc", Prefer="wait=10"))
        await asyncio.sleep(1)
        given.router.release()
        assert (await asking).json()["job_id"] == first.json()["job_id"]


async def test_a_hundred_concurrent_duplicates_make_one_job() -> None:
    async with gateway(busy_router()) as given:
        responses = await asyncio.gather(*(given.submit(Idempotency_Key="abc") for _ in range(100)))
        assert sorted(response.status_code for response in responses) == [200] * 99 + [202]
        assert len({response.json()["job_id"] for response in responses}) == 1


# Looking


async def test_a_long_poll_ends_with_the_job() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        asking = asyncio.create_task(given.http.get(path, headers={"Prefer": "wait=30"}))
        await asyncio.sleep(5)
        given.router.release()
        response = await asking
        assert now_s() < 5.1
        assert (response.status_code, response.json()["status"]) == (200, "completed")
        assert response.headers["preference-applied"] == "wait=30"
        assert response.headers["vary"] == "Prefer"
        assert response.headers["cache-control"] == "no-store"


async def test_a_long_poll_that_is_too_short_says_202_with_the_job() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        response = await given.http.get(path, headers={"Prefer": "wait=2"})
        assert (response.status_code, response.json()["status"]) == (202, "processing")
        assert (await given.http.get(path, headers={"Prefer": "wait=0"})).status_code == 202
        assert (await given.http.get(path)).status_code == 200


async def test_pages_are_newest_first_and_complete() -> None:
    async with gateway() as given:
        ids = []
        for number in range(7):
            ids.append((await given.submit({"text": f"text {number}"})).json()["job_id"])
            await asyncio.sleep(1)
        first = (await given.http.get("/jobs", params={"limit": 3})).json()
        second = (await given.http.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]})).json()
        third = (await given.http.get("/jobs", params={"limit": 3, "cursor": second["next_cursor"]})).json()
        assert [job["job_id"] for page in (first, second, third) for job in page["jobs"]] == ids[::-1]
        assert third["next_cursor"] is None
        assert first["jobs"][0] == await given.job(ids[-1])
        assert "text 6" not in json.dumps(first)


async def test_pages_have_fifty_jobs_and_at_most_two_hundred() -> None:
    async with gateway() as given:
        for _ in range(210):
            given.store.add("completed")
        assert len((await given.http.get("/jobs")).json()["jobs"]) == 50
        assert len((await given.http.get("/jobs?limit=200")).json()["jobs"]) == 200
        assert len((await given.http.get("/jobs?limit=1")).json()["jobs"]) == 1


async def test_pages_are_filtered() -> None:
    async with gateway() as given:
        completed = given.store.add("completed")
        failed = given.store.add("failed", kind="agents")

        async def ids(query: str) -> list[str]:
            return [job["job_id"] for job in (await given.http.get(f"/jobs?{query}")).json()["jobs"]]

        assert await ids("status=completed") == await ids("kind=text") == [str(completed)]
        assert await ids("status=failed") == await ids("kind=agents&status=failed") == [str(failed)]
        assert await ids("status=pending") == await ids("kind=text&status=failed") == []


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        *[
            (f"limit={bad}", "limit must be a number from 1 to 200")
            for bad in ("0", "201", "-1", "x", "", "1e1", "%D9%A3")
        ],
        ("status=done", "status must be one of pending, processing, completed, failed, cancelled"),
        ("status=", "status must be one of"),
        ("kind=image", "kind must be one of text, agents"),
        *[
            (f"cursor={bad}", "cursor must be a next_cursor of an earlier answer")
            for bad in ("", "x", "AAAA", "%00", "é", "A" * 32 + "B", "f" * 32)
        ],
    ],
)
async def test_a_parameter_that_is_wrong_is_refused(query: str, detail: str) -> None:
    async with gateway() as given:
        response = await given.http.get(f"/jobs?{query}")
        assert response.status_code == 422
        assert detail in response.json()["detail"]
        assert response.json()["instance"] == "/jobs"


@pytest.mark.parametrize(
    "job_id", [NOBODY, NOBODY.replace("-", ""), f"{{{NOBODY}}}", f"urn:uuid:{NOBODY}", "1", "%00", "é"]
)
@pytest.mark.parametrize(
    ("method", "rest"), [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events"), ("HEAD", "")]
)
async def test_an_unknown_or_malformed_id_is_not_found(job_id: str, method: str, rest: str) -> None:
    async with gateway() as given:
        if job_id != NOBODY:
            given.store.add()
        response = await given.http.request(method, f"/jobs/{job_id}{rest}", headers={"Prefer": "wait=1"})
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert method == "HEAD" or response.json()["detail"] == "there is no such job"


async def test_tenants_are_kept_apart_where_they_are_trusted() -> None:
    async with gateway(trust_tenant=True) as given:
        acme = (await given.submit(X_Tenant="acme", Idempotency_Key="k")).json()["job_id"]
        nobodys = (await given.submit({"text": "Another"}, Idempotency_Key="k")).json()["job_id"]
        assert acme != nobodys
        assert (await given.http.get(f"/jobs/{acme}")).status_code == 404
        assert (await given.http.get(f"/jobs/{acme}", headers={"X-Tenant": "default"})).status_code == 404
        assert (await given.http.get(f"/jobs/{acme}", headers={"X-Tenant": "acme"})).status_code == 200
        jobs = (await given.http.get("/jobs", headers={"X-Tenant": "acme"})).json()["jobs"]
        assert [job["job_id"] for job in jobs] == [acme]
        await until(lambda: len(given.router.tensor_calls) == 2)
        assert [options["tenant"] for *_, options in given.router.tensor_calls] == ["acme", "default"]


async def test_a_tenant_means_nothing_where_it_is_not_trusted() -> None:
    async with gateway() as given:
        job_id = (await given.submit(X_Tenant="acme")).json()["job_id"]
        assert given.store.rows[UUID(job_id)].job.tenant == "default"
        await given.job(job_id)


# Bug: the job was accepted, and failed for what its owner could have been told at once.
@pytest.mark.parametrize("tenant", ["caf\u00e9".encode(), b"a\tb"])
async def test_a_tenant_that_cannot_reach_the_router_has_no_jobs(tenant: bytes) -> None:
    async with gateway(trust_tenant=True) as given:
        for method, path in (("POST", "/predict"), ("GET", "/jobs")):
            response = await given.http.request(method, path, json={"text": "fine"}, headers={b"X-Tenant": tenant})
            assert (response.status_code, response.json()["detail"]) == (422, "X-Tenant is not printable ASCII")
        assert not given.store.rows


# Cancelling and deleting


async def test_a_cancelled_job_stays_cancelled_and_its_call_is_cancelled() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        await given.router.entered.wait()
        for _ in range(2):
            response = await given.http.post(f"{path}/cancel")
            assert (response.status_code, response.json()["status"]) == (200, "cancelled")
        await given.router.cancelled.wait()
        assert now_s() < 0.1
        given.router.release()
        await asyncio.sleep(10)
        assert (await given.http.get(path)).json()["status"] == "cancelled"


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_what_has_ended_otherwise_cannot_be_cancelled(status: str) -> None:
    async with gateway() as given:
        job_id = given.store.add(status)  # type: ignore[arg-type]  # parametrized
        response = await given.http.post(f"/jobs/{job_id}/cancel")
        assert (response.status_code, response.json()["detail"]) == (409, f"the job is {status}")


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_what_has_ended_can_be_deleted_once(status: str) -> None:
    async with gateway() as given:
        job_id = given.store.add(status)  # type: ignore[arg-type]  # parametrized
        response = await given.http.delete(f"/jobs/{job_id}")
        assert (response.status_code, response.content) == (204, b"")
        assert (await given.http.delete(f"/jobs/{job_id}")).status_code == 404


async def test_what_lives_cannot_be_deleted() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        response = await given.http.delete(path)
        assert (response.status_code, response.json()["detail"]) == (409, "the job is processing")


# Methods, and the database


@pytest.mark.parametrize("path", ["/jobs", "/jobs/{}", "/jobs/{}/events"])
async def test_head_is_as_get_without_waiting_for_events(path: str) -> None:
    async with gateway() as given:
        job_id = given.store.add("completed")
        got = await given.http.head(path.format(job_id))
        assert got.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/jobs", "GET, HEAD"),
        ("POST", f"/jobs/{NOBODY}", "DELETE, GET, HEAD"),
        ("GET", f"/jobs/{NOBODY}/cancel", "POST"),
        ("DELETE", f"/jobs/{NOBODY}/events", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(method: str, path: str, allow: str) -> None:
    async with gateway() as given:
        response = await given.http.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allow)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/predict"),
        ("GET", "/jobs"),
        ("GET", f"/jobs/{NOBODY}"),
        ("DELETE", f"/jobs/{NOBODY}"),
        ("POST", f"/jobs/{NOBODY}/cancel"),
        ("GET", f"/jobs/{NOBODY}/events"),
    ],
)
async def test_while_the_database_is_away_jobs_are_answered_503(method: str, path: str) -> None:
    async with gateway() as given:
        given.store.is_away = True
        response = await given.http.request(method, path, content=json.dumps(TEXT))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        assert response.json()["detail"] == "the database of the jobs is away"
        assert "nobody listens" not in response.text
        await asyncio.sleep(1)
        assert (await given.http.get("/readyz")).json() == {
            "status": "ready",
            "router": "connected",
            "database": "away",
        }


async def test_jobs_are_counted_and_paths_with_ids_are_one_label() -> None:
    async with gateway() as given:
        job_id = (await given.submit()).json()["job_id"]
        await given.ended(job_id)
        await given.http.post(f"/jobs/{job_id}/cancel")
        text = (await given.http.get("/metrics")).text
        for line in (
            'gateway_jobs_total{kind="text",status="completed"} 1.0',
            "gateway_jobs_waiting 0.0",
            "gateway_jobs_running 0.0",
            "gateway_jobs_lost_leases_total 0.0",
            "gateway_jobs_fenced_finishes_total 0.0",
            'gateway_requests_total{method="GET",route="/jobs/{job_id}",status="200"} 1.0',
            'gateway_requests_total{method="POST",route="/jobs/{job_id}/cancel",status="409"} 1.0',
        ):
            assert line in text.splitlines()


# Events


class EventStream:
    """The route called as a server does, so that each message is seen when it is sent."""

    def __init__(self, given: Gateway, path: str, method: str = "GET", **headers: str) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.has_ended = False
        self.leaves = asyncio.Event()
        raw = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": raw,
        }
        self.task = asyncio.create_task(given.app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        self.body += message.get("body", b"")
        self.has_ended = not message.get("more_body", False)

    @property
    def events(self) -> list[tuple[str, str, str]]:
        """Id, event and status in the data."""
        found = re.findall(r"id: (\d+)\nevent: (\w+)\ndata: (.*)\n\n", self.body.decode())
        return [(version, event, json.loads(data)["status"]) for version, event, data in found]


async def test_events_tell_each_change_and_end_with_the_job() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        stream = EventStream(given, f"{path}/events")
        await asyncio.sleep(40)
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert stream.headers["cache-control"] == "no-store"
        assert stream.events == [("1", "processing", "processing")]
        assert stream.body.startswith(b"retry: 1000\n\nid: 1\n")
        assert stream.body.count(b": still here\n\n") == 2
        given.router.release()
        await stream.task
        assert now_s() < 40.2
        assert stream.events == [("1", "processing", "processing"), ("2", "completed", "completed")]
        assert stream.has_ended
        data = re.findall(rb"data: (.*)\n", stream.body)[-1]
        assert json.loads(data) == (await given.http.get(path)).json()


@pytest.mark.parametrize(("seen", "events"), [("0", 1), ("1", 1), ("x", 1), ("", 1), ("-1", 1), ("9" * 30, 1)])
async def test_events_go_on_after_the_last_one_that_was_seen(seen: str, events: int) -> None:
    async with gateway() as given:
        job_id = given.store.add("completed")
        stream = EventStream(given, f"/jobs/{job_id}/events", last_event_id=seen)
        await stream.task
        assert (stream.status, len(stream.events)) == (200, events)


@pytest.mark.parametrize("seen", ["2", "3"])
async def test_who_has_seen_the_end_is_told_that_nothing_follows(seen: str) -> None:
    async with gateway() as given:
        job_id = given.store.add("completed")
        response = await given.http.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": seen})
        assert (response.status_code, response.content) == (204, b"")


async def test_a_resumed_stream_leaves_out_what_was_seen() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        stream = EventStream(given, f"{path}/events", last_event_id="1")
        await asyncio.sleep(1)
        assert stream.events == []
        given.router.release()
        await stream.task
        assert stream.events == [("2", "completed", "completed")]


async def test_the_head_of_events_does_not_stream() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        stream = EventStream(given, f"{path}/events", method="HEAD")
        await stream.task
        assert (stream.status, stream.headers["content-type"].split(";")[0]) == (200, "text/event-stream")


async def test_a_client_that_leaves_the_events_leaves_nothing_behind() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        stream = EventStream(given, f"{path}/events")
        await asyncio.sleep(1)
        stream.leaves.set()
        await stream.task
        assert len(given.parts.open_requests) == 0
        assert 'route="/jobs/{job_id}/events",status="499"' in given.parts.metrics.render().decode()
        assert given.store.history[next(iter(given.store.rows))] == ["processing"]  # the job goes on


@pytest.mark.parametrize("is_cut", [True, False])
async def test_a_drain_ends_the_events_politely(is_cut: bool) -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        stream = EventStream(given, f"{path}/events")
        await asyncio.sleep(1)
        if is_cut:
            given.parts.open_requests.end_all()
        else:
            given.parts.open_requests.start_drain()
        await asyncio.wait_for(stream.task, 1)
        assert stream.events == [("1", "processing", "processing")]
        assert stream.has_ended


async def test_the_events_of_a_job_that_is_deleted_end() -> None:
    async with gateway(busy_router()) as given:
        path = (await given.submit()).headers["location"]
        stream = EventStream(given, f"{path}/events")
        await asyncio.sleep(1)
        given.store.rows.clear()
        await asyncio.wait_for(stream.task, 1)
        assert stream.has_ended


# The API document


@pytest.mark.parametrize("name", list(openapi.PREDICT_BODY["content"]["application/json"]["examples"]))
async def test_every_example_of_a_request_makes_a_job_that_completes(name: str) -> None:
    example = openapi.PREDICT_BODY["content"]["application/json"]["examples"][name]["value"]
    async with gateway() as given:
        response = await given.submit(example, Prefer="respond-async")
        assert response.status_code == 202
        assert (await given.ended(response.json()["job_id"]))["status"] == "completed"


def examples() -> list[tuple[str, int, dict[str, Any]]]:
    """Path, status and answer of every JSON example."""
    found = []
    for (_, path), operation in openapi_jobs.JOB_OPERATIONS.items():
        for status, answer in operation.responses.items():
            for kind, content in answer.get("content", {}).items():
                if kind != "text/event-stream":
                    given = content.get("examples", {"": {"value": content.get("example")}})
                    found += [(path, status, example["value"]) for example in given.values()]
    return found


@pytest.mark.parametrize(("path", "status", "example"), examples())
async def test_the_examples_of_answers_have_the_shape_of_answers(
    path: str, status: int, example: dict[str, Any]
) -> None:
    if status >= 400:
        assert openapi.Problem.model_validate(example).status == status
    elif path == "/jobs":
        assert openapi_jobs.JobPage.model_validate(example).model_dump() == example
    else:
        served = openapi_jobs.JobOut.model_validate(example).model_dump(exclude_unset=True)
        assert served == example


async def test_what_is_served_has_the_shape_of_the_document() -> None:
    async with gateway() as given:
        receipt = (await given.submit()).json()
        assert openapi_jobs.JobReceipt.model_validate(receipt).model_dump() == receipt
        document = await given.ended(receipt["job_id"])
        assert openapi_jobs.JobOut.model_validate(document).model_dump() == document
        page = (await given.http.get("/jobs")).json()
        assert openapi_jobs.JobPage.model_validate(page).model_dump() == page
        assert set(openapi_jobs.COMPLETED) == set(document)


async def test_the_document_describes_every_parameter_and_keeps_its_nulls() -> None:
    async with gateway() as given:
        document = (await given.http.get("/openapi.json")).json()
    for (method, path), operation in openapi_jobs.JOB_OPERATIONS.items():
        served = document["paths"][path][method.lower()]
        assert served["parameters"] == operation.parameters
        assert served["parameters"][-1]["name"] == "X-Tenant"
        assert set(served["responses"]) == {str(status) for status in operation.responses}
        assert served["description"]
        assert served["summary"] == operation.summary
    names = [p["name"] for p in document["paths"]["/predict"]["post"]["parameters"]]
    assert names == ["Prefer", "Idempotency-Key", "X-Tenant"]
    served = document["paths"]["/jobs/{job_id}"]["get"]["responses"]["200"]["content"]["application/json"]["examples"]
    assert served["completed"]["value"] == openapi_jobs.COMPLETED
    accepted = document["paths"]["/predict"]["post"]["responses"]["202"]["content"]["application/json"]
    assert accepted["examples"]["accepted"]["value"] == openapi_jobs.RECEIPT
