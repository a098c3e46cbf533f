"""`python -m rest_gateway` as a user runs it: variables, log lines, signals, exit codes; and the example client."""

import asyncio
import contextlib
import errno
import json
import os
import re
import runpy
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests import fakes
from tests.acceptance.gateways import Gateway, gateway_with, start

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[2] / "examples" / "send_request.py"
AGENTS = {"agents": {"alice": {"vector": [1, 2], "model_name": "model-a"}}}
LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: .+$")


# Starting


@pytest.mark.parametrize(
    ("variable", "value"), [("LISTEN", "8000"), ("MAX_AGENTS", "many"), ("DRAIN_DELAY_S", "-1"), ("LOG_FORMAT", "xml")]
)
async def test_a_bad_value_is_one_line_and_exit_2(variable: str, value: str) -> None:
    process = await start(**{variable: value})
    stdout, stderr = await process.communicate()
    assert (process.returncode, stdout) == (2, b"")
    (line,) = stderr.decode().splitlines()
    assert line.startswith(f"rest_gateway: bad setting: GATEWAY_{variable}='{value}': ")


async def test_a_port_in_use_is_one_line_and_exit_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        address = f"127.0.0.1:{occupant.getsockname()[1]}"
        process = await start(LISTEN=address)
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode() == f"rest_gateway: cannot listen on {address}: {os.strerror(errno.EADDRINUSE)}\n"


async def test_a_host_that_is_not_ours_is_one_line_and_exit_1() -> None:
    process = await start(LISTEN="192.0.2.1:8000")
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert len(stderr.decode().splitlines()) == 1


async def test_help_lists_the_variables() -> None:
    process = await start("--help")
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    assert b"GATEWAY_ROUTER_WAIT_S" in stdout


async def test_an_unknown_argument_is_exit_2() -> None:
    process = await start("--port", "80")
    await process.communicate()
    assert process.returncode == 2


# Serving


async def test_without_a_router_it_lives_and_is_not_ready() -> None:
    async with gateway_with() as gateway, gateway.http() as http:
        assert (await http.get("/healthz")).status_code == 200
        body = (await http.get("/readyz")).json()
        assert (body["status"], body["router"]) == ("not ready", "unreachable")
        response = await http.post("/predict", json=AGENTS)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        await gateway.read_until("POST /predict 503")
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0
    assert [line for line in gateway.log if not LINE.match(line)] == []


async def test_json_logs_are_one_object_a_line() -> None:
    async with gateway_with(LOG_FORMAT="json", LOG_REQUESTS="all") as gateway, gateway.http() as http:
        await http.get("/healthz", headers={"X-Request-Id": "id-1"})
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0
    records = [json.loads(line) for line in gateway.log]
    (access,) = [record for record in records if record.get("path") == "/healthz"]
    assert (access["level"], access["status"], access["request_id"]) == ("INFO", 200, "id-1")


async def test_a_client_that_is_killed_cancels_its_call_at_the_router() -> None:
    async with (
        fakes.FakeRouter() as router,
        gateway_with(ROUTER=router.target) as gateway,
        connection_to(gateway) as writer,
    ):
        stream = await router.next_stream()
        writer.write(raw_request())
        call = await stream.next_call()
        writer.transport.abort()
        assert await stream.next_cancel() == call.call_id
        await gateway.read_until("POST /predict 499")


def raw_request() -> bytes:
    text = json.dumps(AGENTS).encode()
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


@contextlib.asynccontextmanager
async def connection_to(gateway: Gateway) -> AsyncIterator[asyncio.StreamWriter]:
    url = httpx.URL(gateway.url)
    _, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# Leaving


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "application/x-ndjson"])
async def test_a_signal_lets_it_answer_what_it_accepted_and_exit_0(signal_: signal.Signals, accept: str) -> None:
    async with (
        fakes.FakeRouter() as router,
        gateway_with(ROUTER=router.target) as gateway,
        gateway.http() as http,
    ):
        stream = await router.next_stream()
        answer = asyncio.create_task(http.post("/predict", json=AGENTS, headers={"Accept": accept}))
        call = await stream.next_call()
        gateway.process.send_signal(signal_)
        await gateway.read_until("draining")
        await stream.answer(*fakes.echo(call))
        response = await answer
        assert response.status_code == 200
        assert "[1.0,2.0]" in response.text
        assert await gateway.exit_status() == 0
    assert "stopped" in gateway.log[-1]


async def test_it_is_not_ready_and_accepts_until_the_drain_delay_is_over() -> None:
    async with gateway_with(DRAIN_DELAY_S="60") as gateway, gateway.http() as http:
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.read_until("draining")
        assert (await http.get("/readyz")).json()["status"] == "draining"
        assert (await http.get("/healthz")).status_code == 200


async def test_what_is_open_after_the_drain_timeout_gets_503_and_exit_is_0() -> None:
    async with (
        fakes.FakeRouter() as router,
        gateway_with(ROUTER=router.target, DRAIN_TIMEOUT_S="0.1") as gateway,
        gateway.http() as http,
    ):
        stream = await router.next_stream()
        answer = asyncio.create_task(http.post("/predict", json=AGENTS))
        await stream.next_call()
        gateway.process.send_signal(signal.SIGTERM)
        assert (await answer).status_code == 503
        assert await gateway.exit_status() == 0


@pytest.mark.parametrize(("signal_", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_second_signal_leaves_at_once(signal_: signal.Signals, status: int) -> None:
    async with gateway_with(DRAIN_DELAY_S="60") as gateway:
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.read_until("draining")
        gateway.process.send_signal(signal_)
        assert await gateway.exit_status() == status


# The example


async def run_example(url: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(sys.executable, str(EXAMPLE), url, stdout=PIPE, stderr=PIPE)
    stdout, stderr = await process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_example_prints_the_answer() -> None:
    async with fakes.FakeRouter(script=fakes.echo) as router, gateway_with(ROUTER=router.target) as gateway:
        await router.next_stream()
        status, stdout, stderr = await run_example(gateway.url)
    assert (status, stderr) == (0, "")
    head, _, document = stdout.partition("\n")
    assert head == "200 OK"
    sent = runpy.run_path(str(EXAMPLE))["REQUEST"]["agents"]
    assert json.loads(document)["results"] == {name: {"output": agent["vector"]} for name, agent in sent.items()}


async def test_the_example_says_when_no_gateway_is_there() -> None:
    status, stdout, stderr = await run_example("http://127.0.0.1:1")
    assert (status, stdout) == (1, "")
    assert stderr.startswith("no gateway at http://127.0.0.1:1")
    assert "Traceback" not in stderr
