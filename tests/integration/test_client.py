"""AsyncClient and Client against a real router, its mock and a real gateway, and against a router that pushes back."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from prometheus_client import start_http_server

from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.jobs.records import StoreSettings
from rest_gateway.jobs.store import SqlJobStore
from router_client import (
    Aborted,
    Agent,
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidArgument,
    Job,
    JobFailed,
    NotFound,
    ResourceExhausted,
    RouterClient,
    Unavailable,
    Unimplemented,
)
from tests.fakes import FakeRouter, echo
from tests.integration.stack import Gate, Stack, serving, truth
from tests.integration.test_rest_gateway import Gateway, gateway_of
from tests.open_inference_server import OpenInferenceServer, ServedModel

pytestmark = pytest.mark.anyio

T = TypeVar("T")
ANN, BOB = Agent("churn", [1.0, 2.0], "a"), Agent("churn", [3.0, 4.0], "a")
BAD = Agent("churn", [])
NOBODY = "127.0.0.1:1"
TEXT = "This product is amazing!"
PATIENCE_S = 30


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with serving() as stack:
        yield stack


@pytest.fixture
def metrics(stack: Stack) -> Iterator[str]:
    """The URL of its router's metrics."""
    server, thread = start_http_server(0, "127.0.0.1", stack.router.metrics.registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
async def held(gate: Gate) -> AsyncIterator[Stack]:
    """A stack whose models answer when the gate is opened."""
    async with serving(gate.mock()) as stack:
        yield stack


@contextlib.asynccontextmanager
async def gateway_before(stack: Stack, directory: Path, **changes: object) -> AsyncIterator[Gateway]:
    """A gateway with a database in `directory`."""
    store = SqlJobStore(StoreSettings(url=f"sqlite:///{directory}/jobs.sqlite3"))
    await store.open()
    try:
        async with RouterClient(stack.router.address) as router, gateway_of(router, store, **changes) as gateway:
            yield gateway
    finally:
        await store.aclose()


@pytest.fixture
async def client(stack: Stack, metrics: str, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    async with (
        gateway_before(stack, tmp_path) as gateway,
        AsyncClient(stack.router.address, gateway.url, metrics=metrics) as client,
    ):
        yield client


# Agents


async def test_agents_are_answered_by_name_and_a_bad_one_alone_fails(client: AsyncClient) -> None:
    results = await client.predict({"bob": BOB, "bad": BAD, "ann": ANN}, timeout_s=PATIENCE_S, explain=True)
    assert list(results) == ["bob", "bad", "ann"]
    outputs = [results["ann"].output, results["bob"].output]
    assert outputs == [[value] for value in truth("churn", [[1, 2], [3, 4]])]
    assert results["ann"].explanation is not None
    with pytest.raises(InvalidArgument, match="1 of 3 agents failed, 'bad' so: vector is empty"):
        results.raise_for_errors()


async def test_when_every_agent_fails_the_request_does(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument, match="vector is empty") as caught:
        await client.predict({"bad": BAD})
    assert list(caught.value.agents) == ["bad"]


async def test_a_stream_yields_each_agent_as_it_arrives(held: Stack, gate: Gate) -> None:
    async with AsyncClient(held.router.address) as client:
        stream = client.stream({"ann": ANN, "bad": BAD}, timeout_s=PATIENCE_S)
        name, result = await anext(stream)
        assert (name, result.error is None) == ("bad", False)
        gate.open()
        rest = [item async for item in stream]
    assert [(name, result.output) for name, result in rest] == [("ann", truth("churn", [[1, 2]]))]


async def test_a_stream_that_is_left_takes_its_rows_along(gate: Gate) -> None:
    async with serving(gate.mock(), max_in_flight=1) as stack, AsyncClient(stack.router.address) as client:
        first = asyncio.create_task(client.predict({"ann": ANN}))
        await gate.entered.wait()  # before, the router asks the mock about the model, and bob would travel with ann
        async with contextlib.aclosing(client.stream({"bob": BOB, "bad": BAD})) as stream:
            await anext(stream)
            await stack.until_queued(1)
        await stack.until_queued(0)
        gate.open()
        await first


async def test_time_that_is_over_is_a_timeout(held: Stack) -> None:
    async with AsyncClient(held.router.address) as client:
        with pytest.raises(TimeoutError) as caught:
            await client.predict({"ann": ANN}, timeout_s=0.1)
    assert isinstance(caught.value, DeadlineExceeded)


async def test_a_router_that_is_away_is_waited_for_once() -> None:
    async with AsyncClient(NOBODY, router_wait_s=0.1, retries=100) as client:
        with pytest.raises(Unavailable, match="no router"):
            await client.predict({"ann": ANN})


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf")])
async def test_a_time_that_is_none_is_the_callers_mistake(timeout_s: float) -> None:
    async with AsyncClient(NOBODY) as client:
        with pytest.raises(InvalidArgument):
            await client.predict({"ann": ANN}, timeout_s=timeout_s)
        with pytest.raises(InvalidArgument):
            await client.predict({"ann": ANN}, priority="high")  # type: ignore[arg-type]


@pytest.mark.parametrize("tenant", ["größe", "a\nb"])
async def test_a_tenant_that_no_header_carries_is_the_callers_mistake(tenant: str) -> None:
    with pytest.raises(InvalidArgument, match="is not printable ASCII"):
        AsyncClient(tenant=tenant)


def busy(refusals: int, pushback_ms: int) -> Callable[[pb.Call], Iterable[pb.Answer]]:
    """A router that pushes the first calls back, and echoes the others."""
    left = [refusals]

    def script(call: pb.Call) -> Iterable[pb.Answer]:
        left[0] -= 1
        if left[0] < 0:
            return echo(call)
        error = pb.Error(code="RESOURCE_EXHAUSTED", message="full", retry_pushback_ms=pushback_ms)
        return [pb.Answer(call_id=call.call_id, error=error, done=True)]

    return script


async def test_what_a_router_pushes_back_is_sent_again() -> None:
    async with FakeRouter(busy(2, 10)) as router, AsyncClient(router.target) as client:
        results = await client.predict({"ann": ANN}, timeout_s=PATIENCE_S)
        assert results["ann"].output == [1.0, 2.0]
    async with FakeRouter(busy(2, 10)) as router, AsyncClient(router.target) as client:
        arrived = [item async for item in client.stream({"ann": ANN})]
        assert [(name, result.output) for name, result in arrived] == [("ann", [1.0, 2.0])]


async def test_after_the_last_retry_the_push_back_is_the_callers() -> None:
    async with FakeRouter(busy(3, 10)) as router, AsyncClient(router.target) as client:
        with pytest.raises(ResourceExhausted, match="full") as caught:
            await client.predict({"ann": ANN})
    assert caught.value.retry_after_s == 0.01


async def test_a_closed_client_says_so() -> None:
    client = AsyncClient(NOBODY)
    await client.aclose()
    await client.aclose()
    with pytest.raises(Unavailable, match="closed"):
        await client.predict({"ann": ANN})
    with pytest.raises(Unavailable, match="closed"):
        await client.job("1")
    with pytest.raises(Unavailable, match="closed"):
        await client.models()


# Jobs


async def test_a_text_is_answered_later(client: AsyncClient) -> None:
    seen: list[Job] = []
    job = await client.submit(TEXT)
    ended = await client.wait(job, timeout_s=PATIENCE_S, on_change=seen.append)
    assert ended.raise_for_failure().result == {"sentiment": "positive", "confidence": 0.81195}
    assert (ended.id, seen[-1]) == (job.id, ended)
    assert await client.job(job) == ended == await client.wait(job.id)


async def test_agents_are_answered_later_too(client: AsyncClient) -> None:
    job = await client.submit({"ann": ANN, "bad": BAD}, job_timeout_s=PATIENCE_S, priority="batch", explain=True)
    results = (await client.wait(job, timeout_s=PATIENCE_S)).results()
    assert results["ann"].output == pytest.approx(truth("churn", [[1, 2]]))
    assert results["ann"].explanation is not None
    assert list(results.errors) == ["bad"]
    with pytest.raises(InvalidArgument, match="vector is empty") as caught:
        await client.submit({"bad": BAD})
    assert list(caught.value.agents) == ["bad"]


async def test_the_same_key_finds_the_same_job(client: AsyncClient) -> None:
    first = await client.submit(TEXT, idempotency_key='order "17"')
    assert (await client.submit(TEXT, idempotency_key='order "17"')).id == first.id
    assert (await client.submit(TEXT)).id != first.id
    with pytest.raises(InvalidArgument, match="another body"):
        await client.submit("Another", idempotency_key='order "17"')


async def test_jobs_are_listed_newest_first_over_any_number_of_pages(client: AsyncClient) -> None:
    submitted = [(await client.submit(f"{TEXT} {number}")).id for number in range(5)]
    for job_id in submitted:
        await client.wait(job_id, timeout_s=PATIENCE_S)
    assert [job.id async for job in client.jobs(status="completed", kind="text")] == submitted[::-1]
    assert [job.id async for job in client.jobs(limit=2)] == submitted[:-3:-1]
    assert [job async for job in client.jobs(kind="agents")] == []


async def test_a_running_job_is_cancelled_and_an_ended_one_deleted(held: Stack, gate: Gate, tmp_path: Path) -> None:
    async with gateway_before(held, tmp_path) as gateway, AsyncClient(gateway=gateway.url) as client:
        job = await client.submit(TEXT)
        with pytest.raises(DeadlineExceeded, match="it goes on"):
            await client.wait(job, timeout_s=0.1)
        with pytest.raises(Aborted, match="the job is p"):
            await client.delete(job)
        assert (await client.cancel(job)).status == "cancelled"
        assert (await client.cancel(job)).status == "cancelled"
        with pytest.raises(JobFailed, match="was cancelled"):
            (await client.wait(job)).raise_for_failure()
        await client.delete(job)
        with pytest.raises(NotFound):
            await client.job(job)
        gate.open()


async def test_a_wait_outlives_a_restart_of_the_gateway(held: Stack, gate: Gate, tmp_path: Path) -> None:
    async with gateway_before(held, tmp_path, drain_timeout_s=0) as gateway:
        port = gateway.port
        client = AsyncClient(gateway=gateway.url)
        job = await client.submit(TEXT)
        waiting = asyncio.create_task(client.wait(job, timeout_s=PATIENCE_S))
        while not gateway.open_requests:  # noqa: ASYNC110 -- the poll is under way
            await asyncio.sleep(0)
    gate.open()
    async with gateway_before(held, tmp_path, listen=f"127.0.0.1:{port}"), client:
        assert (await waiting).status == "completed"


async def test_a_gateway_that_is_away_is_told_in_one_line() -> None:
    async with AsyncClient(gateway=f"http://{NOBODY}", retries=0) as client:
        with pytest.raises(Unavailable, match=f"no gateway at http://{NOBODY}: "):
            await client.submit(TEXT)


async def test_everything_counts_on_the_clients_tenant(stack: Stack, tmp_path: Path) -> None:
    async with gateway_before(stack, tmp_path, trust_tenant=True) as gateway:
        async with AsyncClient(gateway=gateway.url, tenant="gold", headers={"X-Request-Id": "17"}) as gold:
            job = await gold.submit(TEXT)
            assert (await gold.job(job)).id == job.id
        async with AsyncClient(gateway=gateway.url) as other:
            with pytest.raises(NotFound):
                await other.job(job)
    async with FakeRouter() as router, AsyncClient(router.target, tenant="gold") as client:
        asking = asyncio.create_task(client.predict({"ann": ANN}, priority="batch", request_id="17"))
        stream = await router.next_stream()
        call = await stream.next_call()
        assert (call.tenant, call.request_id, call.priority_class) == ("gold", "17", pb.PRIORITY_CLASS_BATCH)
        await stream.answer(*echo(call))
        await asking


# Models and status


async def test_models_are_those_of_the_servers_index() -> None:
    models = {"b": ServedModel(), "a": ServedModel(is_ready=False)}
    async with OpenInferenceServer(models) as server, AsyncClient(server.address) as client:
        entries = await client.models()
    assert [(entry.name, entry.version, entry.is_ready) for entry in entries] == [("a", "1", False), ("b", "1", True)]


async def test_a_server_without_an_index_and_none_at_all_are_told_apart() -> None:
    async with OpenInferenceServer({}, methods=frozenset()) as server, AsyncClient(server.address) as client:
        with pytest.raises(Unimplemented, match="keeps no index of models"):
            await client.models()
    refusals = {"RepositoryIndex": grpc.StatusCode.PERMISSION_DENIED}
    async with OpenInferenceServer({}, refusals=refusals) as server, AsyncClient(server.address) as client:
        with pytest.raises(Exception, match="PERMISSION_DENIED: RepositoryIndex is refused"):
            await client.models()
    async with AsyncClient(NOBODY) as client:
        with pytest.raises(Unavailable, match=f"no router at {NOBODY}"):
            await client.models()


async def test_status_tells_of_gateway_and_router(client: AsyncClient) -> None:
    await client.predict({"ann": ANN, "bob": BOB})
    status = await client.status()
    assert (status.gateway.router, status.gateway.error) == ("connected", None)
    assert (status.router.rows, status.router.ready_replicas, status.router.queued_rows) == (2, {"mock": 1}, 0)


@contextlib.asynccontextmanager
async def page_server(part: bytes, *, is_last: bool) -> AsyncIterator[str]:
    """The URL of a server that answers everything with `part`, once or without end."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + part)
        while not is_last and not writer.transport.is_closing():
            writer.write(part)
            await asyncio.sleep(0.05)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("page", "is_last", "gateway", "router"),
    [
        (b"a 1\n", False, "no answer in time", "no answer in time"),  # each part in time, the whole never
        (b"[" * 200_000, True, "recursion", "Invalid|could not|metric"),
        (b"router_queued_rows +Inf\n", True, "Expecting value", "infinity"),
    ],
)
async def test_status_tells_of_pages_that_are_none(page: bytes, *, is_last: bool, gateway: str, router: str) -> None:
    async with page_server(page, is_last=is_last) as url, AsyncClient(gateway=url, metrics=url) as client:
        status = await client.status(timeout_s=0.3 if not is_last else PATIENCE_S)
    assert re.search(gateway, status.gateway.error or "")
    assert re.search(router, status.router.error or "")


async def test_status_says_who_is_away() -> None:
    async with AsyncClient(gateway=f"http://{NOBODY}", metrics=f"http://{NOBODY}/metrics") as client:
        status = await client.status()
    assert (status.gateway.status, status.is_ready) == ("unreachable", False)
    assert status.gateway.error
    assert status.router.error


# Without a loop


async def in_thread(work: Callable[[], T]) -> T:
    """The servers of a test run on its loop, so those who block are elsewhere."""
    return await asyncio.wait_for(asyncio.to_thread(work), PATIENCE_S)


async def test_one_client_serves_many_threads_at_once(stack: Stack) -> None:
    with_values = [[float(number), 1.0] for number in range(32)]
    with Client(stack.router.address) as client:

        def ask(values: list[float]) -> list[float]:
            return client.predict({"ann": Agent("churn", values, "a")}, timeout_s=PATIENCE_S)["ann"].output

        answers = await asyncio.gather(*(in_thread(lambda values=values: ask(values)) for values in with_values))  # type: ignore[misc]
    assert [value for (value,) in answers] == truth("churn", with_values)


async def test_the_words_are_the_same_without_a_loop(stack: Stack, metrics: str, tmp_path: Path) -> None:
    def work(url: str) -> None:
        with Client(stack.router.address, url, metrics=metrics) as client:
            assert dict(client.stream({"ann": ANN}))["ann"].output == truth("churn", [[1, 2]])
            seen: list[Job] = []
            job = client.wait(client.submit(TEXT), timeout_s=PATIENCE_S, on_change=seen.append)
            assert (job.status, seen[-1]) == ("completed", job)
            assert client.wait(job) == client.job(job) == next(client.jobs(limit=1)) == list(client.changes(job))[-1]
            with pytest.raises(Aborted):
                client.cancel(job)
            client.delete(job)
            assert list(client.jobs()) == []
            assert client.status().router.rows == 2
            assert [(model.name, model.is_ready) for model in client.models()] == [("churn", True), ("sentiment", True)]

    async with gateway_before(stack, tmp_path) as gateway:
        await in_thread(lambda: work(gateway.url))


async def test_an_iterator_that_is_left_early_gives_the_rest_up(gate: Gate) -> None:
    async with serving(gate.mock()) as stack:

        def work() -> None:
            with (
                Client(stack.router.address) as client,
                contextlib.closing(client.stream({"ann": ANN, "bad": BAD})) as results,
            ):
                assert next(results)[0] == "bad"

        await in_thread(work)
        await stack.until_gauge("router_open_calls", 0)
        gate.open()


async def test_closing_fails_the_calls_of_other_threads(held: Stack) -> None:
    client = Client(held.router.address)
    waiting = asyncio.create_task(in_thread(lambda: client.predict({"ann": ANN})))
    await held.until_gauge("router_open_calls", 1)
    await in_thread(client.close)
    with pytest.raises(Unavailable, match="closed"):
        await waiting


async def test_clients_come_and_go_without_harm_to_each_other(stack: Stack) -> None:
    def work() -> list[float]:
        with Client(stack.router.address) as client:
            return client.predict({"ann": ANN}, timeout_s=PATIENCE_S)["ann"].output

    started_s = time.monotonic()
    assert [await in_thread(work) for _ in range(5)] == [truth("churn", [[1, 2]])] * 5
    assert time.monotonic() - started_s < PATIENCE_S
