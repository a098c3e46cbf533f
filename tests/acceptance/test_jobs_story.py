"""The job story as a user lives it: mock, router and gateway as whole processes, texts and agents answered later."""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.databases import new_database
from tests.acceptance.processes import Program, running

pytestmark = pytest.mark.anyio

TEXT = {"text": "This product is amazing!"}
AGENTS = {
    "agents": {
        "alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"},
        "bob": {"vector": [], "model_name": "churn"},
    }
}


@contextlib.contextmanager
def models(*arguments: str) -> Iterator[str]:
    """The address of a router in front of a mock."""
    with running("mock_nn", "--listen", "127.0.0.1:0", *arguments) as mock:
        address = mock.wait_for(r"listening on ([\d.:]+)")[1]
        with routing(address) as router:
            yield router


@contextlib.contextmanager
def routing(mock: str, listen: str = "127.0.0.1:0") -> Iterator[str]:
    settings = {
        "ROUTER_LISTEN": listen,
        "ROUTER_METRICS": "127.0.0.1:0",
        "ROUTER_BACKENDS__MOCK__ADDRESSES": f'["{mock}"]',
        "ROUTER_DRAIN_DELAY_S": "0",
    }
    with running("router", **settings) as router:
        yield router.wait_for(r"router listens on ([\d.:]+)")[1]


class Gateway:
    def __init__(self, program: Program) -> None:
        self.program = program
        url = program.wait_for(r"listening on (http://[\d.:]+)")[1]
        self.http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=70)

    async def until_ready(self) -> None:
        async with asyncio.timeout(30):
            while (await self.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def submit(self, body: object = TEXT, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post("/predict", json=body, headers=named)

    async def ended(self, path: str) -> dict[str, Any]:
        response = await self.http.get(path, headers={"Prefer": "wait=60"})
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document


@contextlib.asynccontextmanager
async def gateway(router: str, database: str | None = None, **settings: str) -> AsyncIterator[Gateway]:
    variables = {f"GATEWAY_{name}": value for name, value in settings.items()}
    quick = {"GATEWAY_LISTEN": "127.0.0.1:0", "GATEWAY_ROUTER": router, "GATEWAY_DRAIN_DELAY_S": "0"}
    with running("rest_gateway", **quick | variables, DATABASE_URL=database or new_database()) as program:
        given = Gateway(program)
        async with given.http:
            await given.until_ready()
            yield given


async def test_a_text_is_accepted_at_once_and_answered_after_the_models_time() -> None:
    with models("--latency", "3") as router:
        async with gateway(router) as given:
            started_s = asyncio.get_running_loop().time()
            response = await given.submit()
            assert asyncio.get_running_loop().time() - started_s < 2
            assert (response.status_code, response.json()["status"]) == (202, "processing")
            path = response.headers["location"]
            at_once = (await given.http.get(path)).json()
            assert (at_once["status"], at_once["result"]) == ("processing", None)
            job = await given.ended(path)
            assert job["status"] == "completed"
            assert job["result"]["sentiment"] == "positive"
            assert 0.5 <= job["result"]["confidence"] <= 1
            assert asyncio.get_running_loop().time() - started_s >= 3
            other = await given.submit({"text": "I hate it, it is awful."}, Prefer="wait=30")
            assert other.json()["result"]["sentiment"] == "negative"


async def test_many_texts_share_batches() -> None:
    with models("--latency", "0.5") as router:
        async with gateway(router) as given:
            started_s = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*(given.submit({"text": f"I like it {n}"}) for n in range(200)))
            jobs = await asyncio.gather(*(given.ended(answer.headers["location"]) for answer in answers))
            assert {job["status"] for job in jobs} == {"completed"}
            # One by one on the mock's four slots they would take 25 s.
            assert asyncio.get_running_loop().time() - started_s < 15


async def test_agents_are_answered_later_as_they_are_at_once() -> None:
    with models("--latency", "0.05") as router:
        async with gateway(router) as given:
            waited = await given.submit(AGENTS)
            assert waited.status_code == 207
            response = await given.submit(AGENTS, Prefer="respond-async")
            assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async")
            assert (await given.ended(response.headers["location"]))["result"] == waited.json()


async def test_a_failing_model_gives_failed_with_its_reason() -> None:
    with models("--latency", "0.05", "--fault", "error:rate=1") as router:
        async with gateway(router) as given:
            job = (await given.submit(Prefer="wait=30")).json()
            assert job["status"] == "failed"
            assert job["error"]["code"] == "UNKNOWN"
            assert job["error"]["message"]


async def test_a_job_waits_for_a_router_that_is_away() -> None:
    with running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "0.05") as mock:
        address = mock.wait_for(r"listening on ([\d.:]+)")[1]
        async with contextlib.AsyncExitStack() as stack:
            with routing(address) as listen:
                given = await stack.enter_async_context(gateway(listen))
            response = await given.submit()  # the router has gone
            assert response.status_code == 202
            early = await given.http.get(response.headers["location"], headers={"Prefer": "wait=3"})
            assert (early.status_code, early.json()["error"]) == (202, None)
            with routing(address, listen):
                job = await given.ended(response.headers["location"])
                assert job["status"] == "completed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_job_outlives_its_gateway(number: signal.Signals) -> None:
    database = new_database()
    with models("--latency", "3") as router:
        async with gateway(router, database, DRAIN_TIMEOUT_S="0.2") as given:
            response = await given.submit(Idempotency_Key="k")
            assert response.json()["status"] == "processing"
            given.program.send(number)
            assert given.program.wait() == (0 if number == signal.SIGTERM else -number)
        async with gateway(router, database) as given:
            started_s = asyncio.get_running_loop().time()
            job = await given.ended(response.headers["location"])
            assert (job["status"], job["attempt"]) == ("completed", 2)
            # After a drain at once; after a kill when the lease is over: 6 s, a second to look, and the model's time.
            assert asyncio.get_running_loop().time() - started_s < (8 if number == signal.SIGKILL else 4) + 1.5
            again = await given.submit(Idempotency_Key="k")
            assert (again.status_code, again.json()) == (200, job)


async def test_a_drain_lets_a_job_end() -> None:
    database = new_database()
    with models("--latency", "1") as router:
        async with gateway(router, database) as given:
            path = (await given.submit()).headers["location"]
            given.program.send(signal.SIGTERM)
            assert given.program.wait() == 0
            job_id = path.removeprefix("/jobs/")
            transitions = [line for line in given.program.lines if job_id in line]
            assert [re.sub(r".*: (\w+)(, attempt 1)?$", r"\1", line) for line in transitions] == [
                "processing",
                "completed",
            ]


async def test_events_tell_the_story() -> None:
    with models("--latency", "0.5") as router:
        async with gateway(router) as given:
            path = (await given.submit()).headers["location"]
            text = (await given.http.get(f"{path}/events")).text
            assert re.findall(r"^event: (\w+)$", text, re.MULTILINE) == ["processing", "completed"]
