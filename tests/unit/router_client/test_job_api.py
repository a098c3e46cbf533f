"""The job API over a gateway that does what the test says, in virtual time."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from router_client import Agent, DeadlineExceeded, Internal, InvalidArgument, Job, ModelFailed, NotFound, Unavailable
from router_client.gateway import Closed, Request
from router_client.job_api import AWAY_S, HOLD_S, LOOK_S, MIN_GAP_S, JobApi
from router_client.retry import RetryPolicy

pytestmark = pytest.mark.anyio


def job(status: str = "processing", version: int = 1, job_id: str = "1") -> dict[str, Any]:
    return {"job_id": job_id, "status": status, "kind": "text", "version": version}


class ScriptedGateway:
    """Each step is (seconds that it takes, a document or an exception); the last one is repeated."""

    def __init__(self, *steps: tuple[float, object]) -> None:
        self._steps = list(steps)
        self.requests: list[Request] = []
        self.asked_at: list[float] = []

    async def ask(self, request: Request, *, timeout_s: float, policy: RetryPolicy | None = None) -> Any:  # noqa: ANN401
        self.requests.append(request)
        self.asked_at.append(asyncio.get_running_loop().time())
        takes_s, answer = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if takes_s > timeout_s:
            await asyncio.sleep(timeout_s)
            raise DeadlineExceeded("no answer from the gateway in time")
        await asyncio.sleep(takes_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def headers(self, at: int) -> dict[str, str]:
        return dict(self.requests[at].headers or {})


def api(*steps: tuple[float, object]) -> tuple[JobApi, ScriptedGateway]:
    gateway = ScriptedGateway(*steps)
    return JobApi(gateway, timeout_s=10.0), gateway


async def submit(jobs: JobApi, work: Any = "hi", key: str | None = None, job_timeout_s: float | None = None) -> Job:  # noqa: ANN401
    return await jobs.submit(
        work, job_timeout_s=job_timeout_s, priority="interactive", explain=False, idempotency_key=key
    )


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_every_text_has_a_key_of_its_own() -> None:
    jobs, gateway = api((0, {"job_id": "1", "status": "pending"}))
    assert (await submit(jobs, job_timeout_s=5.0)).id == "1"
    await submit(jobs)
    assert gateway.requests[0].body == {"text": "hi", "timeout_s": 5.0}
    assert "Prefer" not in gateway.headers(0)
    assert gateway.headers(0)["Idempotency-Key"] != gateway.headers(1)["Idempotency-Key"]


async def test_agents_ask_for_a_job() -> None:
    jobs, gateway = api((0, {"job_id": "1", "status": "pending"}))
    assert (await submit(jobs, {"ann": Agent("m", [1.0])})).kind == "agents"
    assert gateway.headers(0)["Prefer"] == "respond-async"


async def test_a_callers_own_key_is_quoted() -> None:
    jobs, gateway = api((0, {"job_id": "1", "status": "pending"}))
    await submit(jobs, key='order "17"\\')
    assert gateway.headers(0)["Idempotency-Key"] == '"order \\"17\\"\\\\"'
    for key in ("", "ö", "a\nb"):
        with pytest.raises(InvalidArgument):
            await submit(jobs, key=key)


async def test_a_bad_vector_is_not_sent() -> None:
    jobs, gateway = api((0, None))
    with pytest.raises(InvalidArgument):
        await submit(jobs, {"ann": Agent("m", ["x"])})  # type: ignore[list-item]
    assert gateway.requests == []


@pytest.mark.parametrize("job_id", ["", "../predict", "a/b", "a?b", "ä"])
async def test_what_is_no_id_leads_nowhere(job_id: str) -> None:
    jobs, gateway = api((0, None))
    with pytest.raises(InvalidArgument, match="is no job's id"):
        await jobs.get(job_id)
    assert gateway.requests == []


async def test_only_a_delete_must_not_be_repeated() -> None:
    jobs, gateway = api((0, job()))
    await jobs.get("1")
    await jobs.cancel("1")
    await jobs.delete("1")
    told = [(request.method, request.path, request.may_repeat) for request in gateway.requests]
    assert told == [("GET", "/jobs/1", True), ("POST", "/jobs/1/cancel", True), ("DELETE", "/jobs/1", False)]


def page(ids: Iterable[int], cursor: str | None) -> dict[str, object]:
    return {"jobs": [job(job_id=str(number)) for number in ids], "next_cursor": cursor}


async def test_pages_follow_their_cursor_until_there_is_none() -> None:
    jobs, gateway = api((0, page([3, 2], "next")), (0, page([1], None)))
    assert [seen.id async for seen in jobs.pages("failed", "text", None)] == ["3", "2", "1"]
    assert gateway.requests[0].query == gateway.requests[1].query
    assert gateway.requests[1].query == {"status": "failed", "kind": "text", "limit": "200", "cursor": "next"}


async def test_a_limit_asks_for_no_more_than_that() -> None:
    jobs, gateway = api((0, page(range(200), "next")), (0, page([1], "more")))
    limits = [(gateway.requests[-1].query or {})["limit"] async for _ in jobs.pages(None, None, 201)]
    assert (limits[0], limits[-1], len(limits)) == ("200", "1", 201)
    assert len(gateway.requests) == 2


async def test_a_page_is_read_when_it_is_needed() -> None:
    jobs, gateway = api((0, page([3], "next")))
    pages = jobs.pages(None, None, None)
    assert (await anext(pages)).id == "3"
    assert len(gateway.requests) == 1
    await pages.aclose()


async def test_pages_that_lead_in_a_circle_are_left() -> None:
    jobs, gateway = api((0, page([2], "a")), (0, page([], "b")), (0, page([1], "a")))
    with pytest.raises(Internal, match="in a circle"):
        [seen async for seen in jobs.pages(None, None, None)]
    assert len(gateway.requests) == 3


async def test_what_is_no_page_is_said_to_be_none() -> None:
    jobs, _ = api((0, {"jobs": None}))
    with pytest.raises(Internal):
        [seen async for seen in jobs.pages(None, None, None)]


async def test_waiting_is_a_chain_of_long_polls() -> None:
    jobs, gateway = api((HOLD_S, job()), (HOLD_S, job()), (5, job("completed", 2)))
    assert (await jobs.wait("1", timeout_s=None)).status == "completed"
    assert gateway.asked_at == [0, HOLD_S, 2 * HOLD_S]
    assert gateway.headers(0) == {"Prefer": f"wait={HOLD_S}"}


async def test_the_last_poll_is_no_longer_than_the_time_that_is_left() -> None:
    jobs, gateway = api((HOLD_S, job()), (9, job()))
    with pytest.raises(DeadlineExceeded, match="has not ended in time; it goes on"):
        await jobs.wait("1", timeout_s=HOLD_S + 8.5)
    assert gateway.headers(1) == {"Prefer": "wait=9"}
    assert now() == HOLD_S + 8.5


async def test_no_time_at_all_is_over_at_once() -> None:
    jobs, _ = api((0.1, job()))
    with pytest.raises(DeadlineExceeded):
        await jobs.wait("1", timeout_s=0)
    assert now() == 0


async def test_something_that_strips_the_wish_to_wait_is_not_asked_without_end() -> None:
    jobs, gateway = api((0, job()), (0, job()), (0, job("completed", 2)))
    await jobs.wait("1", timeout_s=None)
    assert gateway.asked_at == [0, MIN_GAP_S, 2 * MIN_GAP_S]


async def test_a_gateway_that_restarts_is_waited_for() -> None:
    away = Unavailable("no gateway")
    back_soon = Unavailable("", retry_after_s=2.0)
    jobs, gateway = api((10, job()), (0, away), (0, ModelFailed("a proxy's")), (0, back_soon), (5, job("failed")))
    assert (await jobs.wait("1", timeout_s=None)).status == "failed"
    assert gateway.asked_at == pytest.approx([0, 10, 10.2, 10.6, 12.6])


async def test_one_that_wants_to_be_left_alone_for_a_day_is_asked_each_minute_and_given_up() -> None:
    jobs, gateway = api((0, Unavailable("", retry_after_s=86_400.0)))
    with pytest.raises(Unavailable):
        await jobs.wait("1", timeout_s=None)
    assert gateway.asked_at == [0, 60]


async def test_a_wait_ends_with_its_client() -> None:
    jobs, gateway = api((0, Closed("the client was closed")))
    with pytest.raises(Unavailable):
        await jobs.wait("1", timeout_s=None)
    assert gateway.asked_at == [0]


@pytest.mark.parametrize(("steps", "gives_up"), [(AWAY_S - 1, False), (AWAY_S, True)])
async def test_one_that_is_away_for_a_minute_is_given_up(steps: float, *, gives_up: bool) -> None:
    away: Callable[[float], tuple[float, object]] = lambda takes_s: (takes_s, Unavailable("no gateway"))  # noqa: E731
    jobs, _ = api(away(39), away(steps - 39.2), (0, job("completed")))
    if gives_up:
        with pytest.raises(Unavailable):
            await jobs.wait("1", timeout_s=None)
    else:
        assert (await jobs.wait("1", timeout_s=None)).is_over


async def test_a_gateway_that_hangs_counts_as_away() -> None:
    jobs, gateway = api((10_000, None), (0, job("completed")))
    assert (await jobs.wait("1", timeout_s=None)).is_over
    assert gateway.asked_at == pytest.approx([0, HOLD_S + 10.2])


async def test_a_deleted_job_ends_the_wait() -> None:
    jobs, _ = api((1, job()), (1, NotFound("there is no such job")))
    with pytest.raises(NotFound):
        await jobs.wait("1", timeout_s=None)


async def test_changes_are_told_once_each() -> None:
    jobs, gateway = api((2, job("pending", 1)), (2, job("pending", 1)), (1, job(version=2)), (0, job("completed", 3)))
    seen = [change.status async for change in jobs.changes("1", timeout_s=None, hold_s=LOOK_S)]
    assert seen == ["pending", "processing", "completed"]
    assert gateway.headers(0) == {"Prefer": f"wait={LOOK_S}"}
