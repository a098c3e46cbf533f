"""The gateway behind its real HTTP server: bytes on a socket, clients that leave, streams, the drain."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from uuid import uuid4

import httpx
import pytest

from rest_gateway.app import GatewayRouter, Server, create_app, make_parts
from rest_gateway.config import Settings
from rest_gateway.jobs.records import Claimed, JobStore
from rest_gateway.jobs.tasks import Later, Tasks
from rest_gateway.listener import bind
from rest_gateway.routes import answers
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.schemas.jobs import encode_text
from rest_gateway.schemas.predict import TextCall
from router_client import RouterClient
from tests import fakes
from tests.unit.rest_gateway.fake_router import FakeRouter
from tests.unit.rest_gateway.jobs.fake_store import FakeStore

pytestmark = pytest.mark.anyio

TWO_AGENTS = {
    "agents": {
        "alice": {"vector": [1, 2], "model_name": "model-a"},
        "bob": {"vector": [3], "model_name": "model-b"},
    }
}
FORMS = ["application/json", "text/event-stream", "application/x-ndjson"]
STREAMS = FORMS[1:]


@dataclass
class Gateway:
    """A served application."""

    server: Server
    open_requests: OpenRequests
    served: asyncio.Task[None]
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, trust_env=False)


@contextlib.asynccontextmanager
async def gateway_of(router: GatewayRouter, store: JobStore | None = None, **changes: object) -> AsyncIterator[Gateway]:
    quick = {"listen": "127.0.0.1:0", "drain_delay_s": 0, "log_requests": "all"}
    settings = Settings.model_validate(quick | changes)
    listener = bind(settings)
    host, port = listener.getsockname()
    parts = make_parts(router, store or FakeStore(), settings)
    server = Server(create_app(parts, settings), settings, parts.open_requests)
    parts.jobs.start()
    served = asyncio.create_task(server.serve([listener]))
    try:
        yield Gateway(server, parts.open_requests, served, host, port)
    finally:
        server.should_exit = True
        await served
        await parts.jobs.drain(server.drain_left_s)


class RawClient:
    """Bytes on a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def predict(self, body: object, accept: str = "*/*", extra: bytes = b"") -> None:
        text = json.dumps(body).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Length: {len(text)}\r\n"
        await self.send(head.encode() + extra + b"\r\n" + text)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next response."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; b"" is the end."""
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def json(self, headers: dict[str, str]) -> dict[str, object]:
        document: dict[str, object] = json.loads(await self.reader.readexactly(int(headers["content-length"])))
        return document

    def vanish(self) -> None:
        """Closes with a reset, as a killed process does."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_client(gateway: Gateway) -> AsyncIterator[RawClient]:
    client = RawClient(*await asyncio.open_connection(gateway.host, gateway.port))
    try:
        yield client
    finally:
        await client.close()


class AccessLog(logging.Handler):
    """The access log, line by line; a line is written when a request is over."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put_nowait(record.getMessage())

    async def next_line(self) -> str:
        return await self._lines.get()


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> Iterator[AccessLog]:
    caplog.set_level(logging.INFO, "rest_gateway")
    logger, handler = logging.getLogger("rest_gateway.routes.access"), AccessLog()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Bytes


async def test_agents_go_in_and_outputs_come_out() -> None:
    async with gateway_of(FakeRouter()) as gateway, gateway.http() as http:
        response = await http.post("/predict", json=TWO_AGENTS)
    assert response.json() == {"results": {"alice": {"output": [3.0]}, "bob": {"output": [3.0]}}, "errors": {}}


async def test_a_chunked_body_is_refused_at_the_first_byte_too_many() -> None:
    async with gateway_of(FakeRouter(), max_body_bytes=1000) as gateway, raw_client(gateway) as client:
        await client.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(10):
            await client.send(b"64\r\n" + b" " * 100 + b"\r\n")
        await client.send(b"1\r\n \r\n")  # and no end
        status, headers = await client.head()
        assert status == 413
        assert (await client.json(headers))["detail"] == "the body has more than 1,000 bytes"


async def test_a_chunked_body_within_the_limit_is_read() -> None:
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        await client.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in json.dumps(TWO_AGENTS).encode():
            await client.send(b"1\r\n%c\r\n" % byte)
        await client.send(b"0\r\n\r\n")
        status, _ = await client.head()
        assert status == 200


async def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent() -> None:
    async with gateway_of(FakeRouter(), max_body_bytes=1000) as gateway, raw_client(gateway) as client:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n"
        await client.send(head)
        status, _ = await client.head()
        assert status == 413


async def test_a_connection_goes_on_after_a_refused_request() -> None:
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        await client.predict({"agents": {}})
        status, headers = await client.head()
        assert status == 422
        await client.json(headers)
        await client.predict(TWO_AGENTS)
        status, _ = await client.head()
        assert status == 200


@pytest.mark.parametrize("data", [b"hello\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"])
async def test_what_is_not_http_is_answered_with_a_problem(data: bytes) -> None:
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        await client.send(data)
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (400, "application/problem+json")
        assert (await client.json(headers))["status"] == 400
        assert await client.reader.read() == b""


async def test_a_head_without_end_is_refused_at_its_limit() -> None:
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        await client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 30_000)
        status, headers = await client.head()
        assert (status, headers["connection"]) == (431, "close")
        assert "65,536 bytes" in str((await client.json(headers))["detail"])


async def test_heads_within_the_limit_are_counted_one_by_one() -> None:
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        for _ in range(4):
            await client.predict(TWO_AGENTS, extra=b"a: " + b"b" * 40_000 + b"\r\n")
            status, headers = await client.head()
            assert status == 200
            await client.json(headers)


async def test_a_wish_to_upgrade_costs_no_request_its_body() -> None:
    """Java's HttpClient asks every http:// server for h2c with its first request."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        for _ in range(2):
            await client.predict(TWO_AGENTS, extra=upgrade)
            status, headers = await client.head()
            assert status == 200
            await client.json(headers)


# Clients that leave


@pytest.mark.parametrize("accept", FORMS)
async def test_a_client_that_leaves_cancels_its_call(
    accept: str, access_log: AccessLog, caplog: pytest.LogCaptureFixture
) -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router) as gateway:
        async with raw_client(gateway) as client:
            await client.predict(TWO_AGENTS, accept)
            await router.entered.wait()
            client.vanish()
            await router.cancelled.wait()
            assert (await access_log.next_line()).startswith("POST /predict 499")
        async with gateway.http() as http:
            metrics = (await http.get("/metrics")).text
        assert 'gateway_requests_total{method="POST",route="/predict",status="499"} 1.0' in metrics
        assert len(gateway.open_requests) == 0
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("accept", STREAMS)
async def test_a_client_that_leaves_in_mid_stream_cancels_the_rest(accept: str) -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router) as gateway, raw_client(gateway) as client:
        await client.predict(TWO_AGENTS, accept)
        await client.head()
        router.release()
        assert b"alice" in await client.chunk()
        client.vanish()
        await router.cancelled.wait()


async def test_a_client_that_leaves_while_it_sends_is_no_error(
    access_log: AccessLog, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway_of(FakeRouter()) as gateway, raw_client(gateway) as client:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
        await client.send(head)
        assert (await client.head())[0] == 100  # the gateway has begun to read
        await client.send(b"{")
        client.vanish()
        assert (await access_log.next_line()).startswith("POST /predict 499")
        assert len(gateway.open_requests) == 0
    assert warnings_in(caplog) == []


async def test_a_neighbour_is_unharmed_when_a_client_leaves() -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router) as gateway, gateway.http() as http, raw_client(gateway) as leaver:
        stays = asyncio.create_task(http.post("/predict", json=TWO_AGENTS))
        await router.entered.wait()
        router.entered.clear()
        await leaver.predict(TWO_AGENTS)
        await router.entered.wait()
        leaver.vanish()
        await router.cancelled.wait()
        router.release()
        assert (await stays).status_code == 200


# Streams


@pytest.mark.parametrize("accept", STREAMS)
async def test_each_agent_is_sent_when_it_is_answered_and_not_later(accept: str) -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router) as gateway, raw_client(gateway) as client:
        await client.predict(TWO_AGENTS, accept)
        status, headers = await client.head()  # before any answer
        assert (status, headers["content-type"].split(";")[0]) == (200, accept)
        router.release()
        first = await client.chunk()
        assert b'"agent":"alice"' in first
        assert b"bob" not in first
        router.release()
        assert b'"agent":"bob"' in await client.chunk()
        assert b'{"done":true}' in await client.chunk()
        assert await client.chunk() == b""


# The drain


async def test_while_draining_the_gateway_accepts_and_says_it_is_not_ready() -> None:
    async with gateway_of(FakeRouter(), drain_delay_s=60) as gateway, gateway.http() as http:
        gateway.server.start_drain()
        response = await http.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (503, "draining")
        assert response.headers["connection"] == "close"
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.post("/predict", json=TWO_AGENTS)).status_code == 200


@pytest.mark.parametrize("accept", FORMS)
async def test_after_the_delay_new_connections_are_refused_and_accepted_requests_answered(accept: str) -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router) as gateway, raw_client(gateway) as client:
        await client.predict(TWO_AGENTS, accept)
        await router.entered.wait()
        gateway.server.start_drain()
        await listener_is_closed(gateway)
        router.release()
        router.release()
        status, _ = await client.head()
        assert status == 200
        assert b"bob" in await client.reader.read()  # up to the end of the connection
        await gateway.served


async def listener_is_closed(gateway: Gateway) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(gateway.host, gateway.port)
        except ConnectionError:  # refused, or reset while it closed
            return
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_what_is_open_at_the_end_of_the_drain_gets_503() -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router, drain_timeout_s=0) as gateway, raw_client(gateway) as client:
        await client.predict(TWO_AGENTS)
        await router.entered.wait()
        gateway.server.start_drain()
        status, headers = await client.head()
        assert (status, headers["retry-after"]) == (503, "1")
        await gateway.served
    assert router.cancelled.is_set()


@pytest.mark.parametrize("accept", STREAMS)
async def test_a_stream_that_is_open_at_the_end_of_the_drain_tells_the_rest(accept: str) -> None:
    router = FakeRouter()
    router.close_gate()
    async with gateway_of(router, drain_timeout_s=0) as gateway, raw_client(gateway) as client:
        await client.predict(TWO_AGENTS, accept)
        await client.head()
        router.release()
        assert b"alice" in await client.chunk()
        gateway.server.start_drain()
        rest = await client.chunk()
        assert b'"agent":"bob","error":{"status":503' in rest
        assert b'{"done":true}' in rest
        assert await client.chunk() == b""
        await gateway.served


# With the real client


async def test_without_a_router_the_answer_is_503_after_the_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
    async with (
        RouterClient(target, router_wait_s=0.2) as router,
        gateway_of(router) as gateway,
        gateway.http() as http,
    ):
        response = await http.post("/predict", json=TWO_AGENTS)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert {error["code"] for error in response.json()["errors"].values()} == {"UNAVAILABLE"}
        assert (await http.get("/readyz")).json() == {
            "status": "not ready",
            "router": "unreachable",
            "database": "connected",
        }


async def test_a_text_that_finds_no_router_waits_for_one() -> None:
    """The client's failures used to be of a class that the job did not know, and ended it as unexpected ones."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
    job = Claimed(
        id=uuid4(), kind="text", tenant="", attempt=1, input=encode_text(TextCall("fine", None)), expires_in_s=60
    )
    async with RouterClient(target, router_wait_s=0.2) as router:
        outcome = await Tasks(router, answers.end_of_job).run(job)
    assert outcome == Later(1.0, "UNAVAILABLE: no router took the request in 0.2 s")


async def test_with_a_router_every_agent_gets_its_own_answer_in_every_form() -> None:
    agents = {f"agent-{n}": {"vector": [n, n / 7], "model_name": f"model-{n % 3}"} for n in range(50)}
    async with (
        fakes.FakeRouter(script=fakes.echo) as backend,
        RouterClient(backend.target) as router,
        gateway_of(router) as gateway,
        gateway.http() as http,
    ):
        assert await router.wait_connected(10)
        whole = (await http.post("/predict", json={"agents": agents, "timeout_s": 1e308})).json()
        assert {name: result["output"][0] for name, result in whole["results"].items()} == {
            name: agent["vector"][0] for name, agent in agents.items()
        }
        lines = (await http.post("/predict", json={"agents": agents}, headers={"Accept": FORMS[2]})).text.splitlines()
        *events, done = map(json.loads, lines)
        assert done == {"done": True}
        assert {event["agent"]: event["output"] for event in events} == {
            name: result["output"] for name, result in whole["results"].items()
        }
        async with asyncio.timeout(10):
            while (await http.get("/readyz")).status_code != 200:  # it has looked for jobs
                pass
