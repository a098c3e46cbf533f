"""Requests to a gateway that answers as the test says, in virtual time."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from router_client import (
    Aborted,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RouterError,
    Unavailable,
)
from router_client.gateway import Closed, Gateway, Request, check_url, is_loopback, problem_of
from router_client.retry import RetryPolicy

pytestmark = pytest.mark.anyio

GET = Request(method="GET", path="/jobs/1")
ONCE = Request(method="DELETE", path="/jobs/1", may_repeat=False)
BUSY = {"Retry-After": "3"}


class Script(httpx.AsyncBaseTransport):
    """Answers with one step after the other: a response, or an exception. Keeps when it was asked for what."""

    def __init__(self, *steps: httpx.Response | Callable[[], Exception]) -> None:
        self._steps = list(steps)
        self.asked: list[tuple[float, str]] = []
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((asyncio.get_running_loop().time(), f"{request.method} {request.url.raw_path.decode()}"))
        self.requests.append(request)
        if not self._steps:
            await asyncio.sleep(3600)
        step = self._steps.pop(0)
        if isinstance(step, httpx.Response):
            return step
        raise step()


def refused() -> Exception:
    return httpx.ConnectError("refused")


def lost() -> Exception:
    return httpx.ReadError("reset")


async def ask(script: Script, request: Request = GET, timeout_s: float = 10.0) -> Any:  # noqa: ANN401 -- JSON
    async with Gateway("http://gw:1/", RetryPolicy(2), transport=script, chance=lambda: 0.0) as gateway:
        return await gateway.ask(request, timeout_s=timeout_s)


async def test_an_answer_is_json_and_no_content_is_none() -> None:
    script = Script(httpx.Response(202, json={"job_id": "1"}))
    body = Request(method="POST", path="/predict", body={"text": "ö"}, headers={"Prefer": "wait=1"})
    assert await ask(script, body) == {"job_id": "1"}
    assert script.requests[0].content == b'{"text":"\\u00f6"}'
    assert script.requests[0].headers["prefer"] == "wait=1"
    assert str(script.requests[0].url) == "http://gw:1/predict"
    assert await ask(Script(httpx.Response(204))) is None


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_is_asked_again_after_its_time(status: int) -> None:
    script = Script(httpx.Response(status, headers=BUSY), httpx.Response(200, json=1))
    assert await ask(script, ONCE) == 1
    assert [at for at, _ in script.asked] == [0.0, 3.0]


async def test_a_gateway_that_is_away_is_asked_again_soon() -> None:
    script = Script(refused, refused, httpx.Response(200, json=1))
    assert await ask(script, ONCE) == 1
    assert [at for at, _ in script.asked] == pytest.approx([0.0, 0.2, 0.6])


async def test_one_that_stays_away_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no gateway at http://gw:1: refused"):
        await ask(Script(refused, refused, refused))


async def test_a_lost_answer_is_asked_for_again_where_that_is_safe() -> None:
    assert await ask(Script(lost, httpx.Response(200, json=1))) == 1
    script = Script(lost)
    with pytest.raises(Unavailable, match="was lost: reset"):
        await ask(script, ONCE)
    assert len(script.asked) == 1


async def test_no_retry_goes_past_the_deadline() -> None:
    script = Script(httpx.Response(429, headers=BUSY))
    with pytest.raises(ResourceExhausted) as caught:
        await ask(script, timeout_s=3.0)
    assert caught.value.retry_after_s == 3.0
    assert len(script.asked) == 1


async def test_a_silent_gateway_is_left_at_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match="no answer from the gateway at http://gw:1 in time"):
        await ask(Script(), timeout_s=3.0)
    assert asyncio.get_running_loop().time() == 3.0


async def test_a_problem_becomes_an_exception_with_its_words_and_agents() -> None:
    fault = {"status": 422, "code": "INVALID_ARGUMENT", "detail": "vector is empty", "retry_after_s": None}
    problem = httpx.Response(422, json={"detail": "vector is empty", "errors": {"ann": fault}})
    with pytest.raises(InvalidArgument, match="vector is empty") as caught:
        await ask(Script(problem))
    assert caught.value.agents["ann"].message == "vector is empty"


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, InvalidArgument, "INVALID_ARGUMENT"),
        (404, NotFound, "NOT_FOUND"),
        (405, InvalidArgument, "INVALID_ARGUMENT"),
        (409, Aborted, "ABORTED"),
        (413, InvalidArgument, "INVALID_ARGUMENT"),
        (500, Internal, "INTERNAL"),
        (302, RouterError, "UNKNOWN"),
        (520, RouterError, "UNKNOWN"),
    ],
)
def test_a_status_alone_tells_the_class(status: int, kind: type[RouterError], code: str) -> None:
    error = problem_of(httpx.Response(status, text="<html>"))
    assert isinstance(error, kind)
    assert (error.code, error.message.startswith(f"HTTP {status}")) == (code, True)


ENDLESS = '{"errors": {"ann": {"code": "X", "detail": "", "retry_after_s": %s}}}'


@pytest.mark.parametrize(
    "document",
    ["[]", '{"detail": null}', '{"errors": [1]}', '{"errors": {"ann": {}}}', ENDLESS % "Infinity", ENDLESS % "NaN"],
)
def test_a_strange_problem_is_a_problem_all_the_same(document: str) -> None:
    assert problem_of(httpx.Response(404, text=document)).message == "HTTP 404 Not Found"


async def test_a_page_that_is_no_json_is_no_gateway() -> None:
    with pytest.raises(Internal, match="is that a gateway"):
        await ask(Script(httpx.Response(200, text="<html>")))


@pytest.mark.parametrize("status", [200, 500])
async def test_json_that_no_parser_reads_is_none(status: int) -> None:
    with pytest.raises(Internal):
        await ask(Script(httpx.Response(status, content=b"[" * 200_000)))


async def test_a_time_to_come_back_beyond_all_calendars_is_none() -> None:
    with pytest.raises(Unavailable) as caught:
        await ask(Script(*[httpx.Response(503, headers={"Retry-After": "9" * 400})] * 3))
    assert caught.value.retry_after_s is None


class Hanging(httpx.AsyncBaseTransport):
    """Answers nothing; what is open fails when it is closed, as connections do."""

    def __init__(self) -> None:
        self._closed = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self._closed.wait()
        raise lost()

    async def aclose(self) -> None:
        self._closed.set()


async def test_what_is_open_when_the_client_is_closed_is_unavailable_and_not_asked_again() -> None:
    """It was asked again, by httpx's own RuntimeError."""
    gateway = Gateway("http://gw:1/", RetryPolicy(2), transport=Hanging())
    waiting = [asyncio.create_task(gateway.ask(request, timeout_s=10)) for request in (GET, ONCE)]
    await asyncio.sleep(1)
    await gateway.aclose()
    for error in await asyncio.gather(*waiting, gateway.ask(GET, timeout_s=10), return_exceptions=True):
        assert isinstance(error, Closed)
    assert asyncio.get_running_loop().time() == 1


async def test_what_json_cannot_hold_is_not_sent() -> None:
    script = Script()
    with pytest.raises(InvalidArgument):
        await ask(script, Request(method="POST", path="/predict", body={"vector": [float("nan")]}))
    assert script.asked == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://[::1", "localhost"])
def test_what_is_no_url_is_told_so(url: str) -> None:
    with pytest.raises(InvalidArgument, match="is no URL"):
        check_url(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://127.0.0.1:1", True), ("http://localhost", True), ("http://[::1]:8", True), ("http://10.0.0.1", False)],
)
def test_the_loopback_is_known(url: str, *, expected: bool) -> None:
    assert is_loopback(url) is expected
