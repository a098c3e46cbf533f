"""GATEWAY_WORKERS > 1 as a user runs it: several processes on one port, replaced when they die, drained together.

Which worker answers is the kernel's choice. A test that wants one in particular stops the others with SIGSTOP: what is
stopped accepts nothing, and the backlog is everybody's. Requests for the model "held" stay open at the fake router, on
the stream of the worker that accepted them, so that it is known whose they are.

Losses are counted by clients of a closed loop that try nothing twice. Lost is a request whose connection was made and
which got no whole answer; a connection that is refused is no request.
"""

import asyncio
import collections
import contextlib
import errno
import json
import os
import re
import select
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from tests import fakes
from tests.acceptance.gateways import environment, start

pytestmark = pytest.mark.anyio

PATIENCE_S = 60
LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \[\d+\] [\w.]+: .+$")
ENDED = r"worker (\d) pid=(\d+) "


class Gateway:
    """A supervisor and its workers; every line of their log is kept, in the order of its coming."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._news:
                self.log.append(line.decode().rstrip("\n"))
                self._news.notify_all()

    def found(self, pattern: str) -> list[re.Match[str]]:
        """All lines until now that match."""
        return [match for line in self.log if (match := re.search(pattern, line))]

    async def lines(self, pattern: str, count: int = 1) -> list[re.Match[str]]:
        """The lines that match, as soon as there are so many."""
        async with self._news, asyncio.timeout(PATIENCE_S):
            await self._news.wait_for(lambda: len(self.found(pattern)) >= count)
        return self.found(pattern)

    async def workers(self, count: int) -> list[int]:
        """The process ids of the workers, in the order in which they began to listen."""
        return [int(match[1]) for match in await self.lines(r"\[(\d+)\] .* listening on", count)]

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.found(r"starting \d workers for http://([\d.]+):(\d+)$")[0].groups()
        return host, int(port)

    async def exit_status(self) -> int:
        """Of the supervisor; when its log has ended, nobody is left to write it."""
        async with asyncio.timeout(PATIENCE_S):
            await self._reader
            return await self.process.wait()

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.exit_status()


@contextlib.asynccontextmanager
async def workers_with(count: int, **variables: str) -> AsyncIterator[Gateway]:
    """In a session of its own, as a terminal or a launcher starts it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rest_gateway"),
        env=environment(WORKERS=str(count), **variables),
        stderr=PIPE,
        start_new_session=True,
    )
    gateway = Gateway(process)
    try:
        yield gateway
    finally:
        await gateway.end()


def answer_all_but_held(call: pb.Call) -> list[pb.Answer]:
    return [] if call.blocks[0].model_name == "held" else fakes.echo(call)


def request_for(model: str, *headers: bytes) -> bytes:
    body = json.dumps({"agents": {"alice": {"vector": [1, 2], "model_name": model}}}).encode()
    lines = [b"POST /predict HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def ask(address: tuple[str, int], request: bytes) -> tuple[int, str]:
    """Status and body. Raises OSError or IncompleteReadError where there is none."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        return await exchange(reader, writer, request)
    finally:
        writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, str]:
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    body = await reader.readexactly(int(length[1]))
    if b"connection: close" in head:
        writer.close()
    return int(head.split()[1]), body.decode()


async def get(address: tuple[str, int], path: str) -> tuple[int, str]:
    return await ask(address, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())


class Ledger:
    """What became of every request; `new` callers open a connection for each, the others as few as they may."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._news = asyncio.Condition()
        self._is_over = False
        self._callers: list[asyncio.Task[None]] = []

    def start(self, address: tuple[str, int], callers: int) -> None:
        request, last = request_for("fast"), request_for("fast", b"Connection: close")
        self._callers += [asyncio.create_task(self._call(address, last)) for _ in range(callers // 2)]
        self._callers += [asyncio.create_task(self._call(address, request)) for _ in range(callers - callers // 2)]

    async def _call(self, address: tuple[str, int], request: bytes) -> None:
        while not self._is_over:
            try:
                reader, writer = await asyncio.open_connection(*address)
            except ConnectionRefusedError:
                self.counts["refused"] += 1
                return
            with contextlib.closing(writer):
                while not (writer.is_closing() or self._is_over):
                    result = await outcome(exchange(reader, writer, request))
                    await self._count(result)
                    if result == "lost":
                        break

    async def _count(self, outcome: str) -> None:
        async with self._news:
            self.counts[outcome] += 1
            self._news.notify_all()

    async def answered(self, more: int) -> None:
        """Until so many more have been answered."""
        goal = self.counts["200"] + more
        async with self._news, asyncio.timeout(PATIENCE_S):
            await self._news.wait_for(lambda: self.counts["200"] >= goal)

    async def close(self) -> dict[str, int]:
        """Every caller finishes its request; the counts."""
        self._is_over = True
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._callers)
        print("ledger:", dict(self.counts))
        return dict(self.counts)


async def outcome(exchange: Awaitable[tuple[int, str]]) -> str:
    try:
        status, _ = await exchange
    except (OSError, asyncio.IncompleteReadError):
        return "lost"
    return str(status)


@contextlib.asynccontextmanager
async def only(worker: int, workers: list[int]) -> AsyncIterator[None]:
    """Of these workers this one alone is awake."""
    others = [pid for pid in workers if pid != worker]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: all(map(is_stopped, others)))
        yield
    finally:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def until(is_so: Callable[[], bool]) -> None:
    """For what nobody tells of."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def hold(router: fakes.FakeRouter, address: tuple[str, int], count: int) -> list[asyncio.Task[str]]:
    """So many requests, all at the router when this returns."""
    before = open_calls(router)
    requests = [asyncio.create_task(outcome(ask(address, request_for("held")))) for _ in range(count)]
    await until(lambda: open_calls(router) == before + count)
    return requests


def open_calls(router: fakes.FakeRouter) -> int:
    return sum(len(held_calls(stream)) for stream in router.streams)


def held_calls(stream: fakes.FakeStream) -> list[pb.Call]:
    return [call for message in stream.messages for call in message.calls if call.blocks[0].model_name == "held"]


async def release(router: fakes.FakeRouter) -> None:
    """Answers what is held. A stream of a dead worker cannot be written to, or not even that is known yet."""
    answers = [[answer for call in held_calls(stream) for answer in fakes.echo(call)] for stream in router.streams]
    writes = [stream.answer(*its) for stream, its in zip(router.streams, answers, strict=True)]
    await asyncio.gather(*writes, return_exceptions=True)


class Ends:
    """Waits for the end of processes that are not its children."""

    def __init__(self, pids: list[int]) -> None:
        self._fds = [os.pidfd_open(pid) for pid in pids]

    async def all(self) -> None:
        await asyncio.to_thread(self._wait)

    def _wait(self) -> None:
        for fd in self._fds:
            readable, _, _ = select.select([fd], [], [], PATIENCE_S)
            os.close(fd)
            assert readable, "a worker is left behind"


@contextlib.asynccontextmanager
async def ready_workers(count: int, **variables: str) -> AsyncIterator[tuple[fakes.FakeRouter, Gateway, list[int]]]:
    """Workers that listen and are connected to a router that answers all but what is held."""
    async with (
        fakes.FakeRouter(answer_all_but_held) as router,
        workers_with(count, ROUTER=router.target, **variables) as gateway,
    ):
        workers = await gateway.workers(count)
        for _ in workers:
            await router.next_stream()
        yield router, gateway, workers


# Serving


async def test_all_workers_answer_on_one_port_and_say_who_they_are_in_the_log() -> None:
    async with ready_workers(3, LOG_REQUESTS="all") as (_, gateway, workers):
        assert len({*workers, gateway.process.pid}) == 4
        for worker in workers:
            async with only(worker, workers):
                assert (await ask(gateway.address, request_for("fast")))[0] == 200
                await gateway.lines(rf" \[{worker}\] rest_gateway.routes.access: POST /predict 200 ")
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0
    assert [line for line in gateway.log if not LINE.match(line)] == []
    assert len(gateway.found(r"exited with status 0")) == 3


async def test_json_logs_have_the_pid_as_a_member() -> None:
    async with workers_with(2, LOG_FORMAT="json") as gateway:
        await gateway.lines("listening on", 2)
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0
    records = [json.loads(line) for line in gateway.log]
    assert len({record["pid"] for record in records}) == 3


async def test_metrics_are_the_sum_over_all_workers_whoever_is_asked() -> None:
    answered = 'gateway_requests_total{method="POST",route="/predict",status="200"} 5.0'
    async with ready_workers(2) as (router, gateway, workers):
        held = []
        for worker, count in zip(workers, (2, 3), strict=True):
            async with only(worker, workers):
                for _ in range(count):
                    await ask(gateway.address, request_for("fast"))
                held += await hold(router, gateway.address, count)
        await scrape(gateway.address, answered, "gateway_requests_in_flight 6.0")  # the held ones and the scrape
        for worker in workers:
            async with only(worker, workers):
                _, text = await get(gateway.address, "/metrics")
            assert answered in text.splitlines()
            assert processes(text) == set(workers)

        os.kill(workers[0], signal.SIGKILL)  # what it has counted stays; what it had in flight is gone
        replacement = (await gateway.workers(3))[2]
        text = await scrape(gateway.address, answered, "gateway_requests_in_flight 4.0")
        assert processes(text) == {workers[1], replacement}
        await release(router)
        assert sorted(await asyncio.gather(*held)) == ["200", "200", "200", "lost", "lost"]


async def scrape(address: tuple[str, int], *expected: str) -> str:
    """The metrics, when they hold these lines: a request is counted a moment after its answer was read."""
    async with asyncio.timeout(PATIENCE_S):
        while not {*expected} <= {*(text := (await get(address, "/metrics"))[1]).splitlines()}:
            pass
    return text


def processes(metrics: str) -> set[int]:
    return set(map(int, re.findall(r'process_cpu_seconds_total\{pid="(\d+)"\}', metrics)))


# Dying


async def test_a_killed_worker_is_replaced_and_only_its_own_requests_are_lost() -> None:
    ledger = Ledger()
    async with ready_workers(3) as (router, gateway, workers):
        requests = {}
        for worker in workers:
            async with only(worker, workers):
                requests[worker] = await hold(router, gateway.address, 8)
        ledger.start(gateway.address, 24)
        await ledger.answered(200)

        os.kill(workers[1], signal.SIGKILL)
        (ended,) = await gateway.lines(ENDED + "was killed by SIGKILL, served for")
        assert int(ended[2]) == workers[1]
        assert await asyncio.gather(*requests[workers[1]]) == ["lost"] * 8
        await ledger.answered(200)
        new = (await gateway.workers(4))[3]
        await router.next_stream()
        await ledger.answered(200)
        counts = await ledger.close()
        assert counts.keys() <= {"200", "lost"}
        assert counts.get("lost", 0) <= 24  # a caller has one request at a time: those in flight on the dead, if any

        async with only(new, [*workers[::2], new]):
            assert (await ask(gateway.address, request_for("fast")))[0] == 200
        await release(router)
        for worker in workers[::2]:
            assert await asyncio.gather(*requests[worker]) == ["200"] * 8
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0


async def test_connections_that_come_while_no_worker_lives_wait_for_the_next() -> None:
    async with ready_workers(2) as (_, gateway, workers):
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        waiting = [asyncio.create_task(ask(gateway.address, request_for("fast"))) for _ in range(8)]
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 8


async def test_a_worker_that_dies_again_and_again_is_started_again_later_and_later() -> None:
    async with workers_with(2) as gateway:
        await gateway.workers(2)
        for life in range(2, 5):
            victim = (await gateway.workers(life))[-1]
            os.kill(victim, signal.SIGKILL)
            number = next(int(m[1]) for m in await gateway.lines(ENDED, life - 1) if int(m[2]) == victim)
        pauses = [match[1] for match in await gateway.lines(rf"worker {number} is started again in ([\d.]+) s", 2)]
        assert pauses == ["0.5", "1"]
        gateway.process.send_signal(signal.SIGTERM)  # in the midst of a pause or of a start
        assert await gateway.exit_status() == 0


async def test_when_no_worker_can_start_it_gives_up_with_1(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'rest_gateway.worker' in sys.orig_argv: os._exit(7)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        async with workers_with(2) as gateway:
            assert await gateway.exit_status() == 1
    assert len(gateway.found(ENDED + "exited with status 7, served for 0.0 s")) >= 3
    assert len(gateway.found("giving up: no worker can start")) == 1
    assert [line for line in gateway.log if not LINE.match(line)] == []


async def test_one_worker_can_be_drained_by_hand_and_is_replaced_without_a_loss() -> None:
    ledger = Ledger()
    async with ready_workers(2, DRAIN_DELAY_S="0.2") as (_, gateway, workers):
        ledger.start(gateway.address, 24)
        await ledger.answered(200)
        os.kill(workers[0], signal.SIGTERM)
        (ended,) = await gateway.lines(ENDED + "exited with status 0")
        assert int(ended[2]) == workers[0]
        await gateway.workers(3)
        await ledger.answered(200)
        assert (await ledger.close()).keys() == {"200"}


# Leaving


@pytest.mark.parametrize("count", [1, 3])
async def test_a_stop_under_load_loses_no_accepted_request(count: int) -> None:
    ledger = Ledger()
    async with fakes.FakeRouter(answer_all_but_held) as router:
        async with workers_with(count, ROUTER=router.target, DRAIN_DELAY_S="0.2") as gateway:
            listening = await gateway.lines(r"listening on http://([\d.]+):(\d+)", count)
            for _ in range(count):
                await router.next_stream()
            ledger.start((listening[0][1], int(listening[0][2])), 48)
            await ledger.answered(400)
            gateway.process.send_signal(signal.SIGTERM)
            await ledger.answered(100)  # while it drains
            assert await gateway.exit_status() == 0
        counts = await ledger.close()
    assert counts.keys() == {"200", "refused"}, gateway.log
    assert counts["refused"] == 48


def by_the_terminal(gateway: Gateway) -> None:
    os.killpg(gateway.process.pid, signal.SIGINT)


def by_a_launcher(gateway: Gateway) -> None:
    os.killpg(gateway.process.pid, signal.SIGTERM)


def by_hand(gateway: Gateway) -> None:
    gateway.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("stop", [by_the_terminal, by_a_launcher, by_hand])
async def test_a_signal_is_one_signal_however_many_get_it(stop: Callable[[Gateway], None], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path))
        async with ready_workers(2) as (router, gateway, workers):
            held = []
            for worker in workers:
                async with only(worker, workers):
                    held += await hold(router, gateway.address, 2)
            stop(gateway)
            await gateway.lines("draining: not ready", 2)
            await release(router)
            assert await asyncio.gather(*held) == ["200"] * 4
            assert await gateway.exit_status() == 0
    assert os.listdir(tmp_path) == []
    assert "stopped" in gateway.log[-1]


async def test_every_worker_says_that_it_drains_and_accepts_until_the_delay_is_over() -> None:
    async with ready_workers(2, DRAIN_DELAY_S="60") as (_, gateway, workers):
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.lines("draining: not ready", 2)
        for worker in workers:
            async with only(worker, workers):
                status, body = await get(gateway.address, "/readyz")
                assert (status, json.loads(body)["status"]) == (503, "draining")
                assert (await ask(gateway.address, request_for("fast")))[0] == 200


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_second_signal_leaves_at_once_with_every_worker(second: signal.Signals, status: int) -> None:
    async with ready_workers(2, DRAIN_DELAY_S="60") as (_, gateway, workers):
        ends = Ends(workers)
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.lines("draining: not ready", 2)
        gateway.process.send_signal(second)
        assert await gateway.exit_status() == status
        await ends.all()


async def test_a_signal_while_the_workers_start_ends_them_too() -> None:
    async with workers_with(3) as gateway:
        await gateway.lines("starting 3 workers")
        os.killpg(gateway.process.pid, signal.SIGINT)
        assert await gateway.exit_status() == 0
    assert [line for line in gateway.log if not LINE.match(line)] == []


async def test_a_worker_that_gets_lost_in_the_drain_makes_it_a_failure() -> None:
    async with ready_workers(2, DRAIN_DELAY_S="60") as (_, gateway, workers):
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.lines("draining: not ready", 2)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert await gateway.exit_status() == 1


# Without a supervisor


async def test_when_the_supervisor_is_killed_the_workers_answer_what_they_accepted_and_end() -> None:
    async with ready_workers(2, DRAIN_DELAY_S="60") as (router, gateway, workers):
        ends, address = Ends(workers), gateway.address
        held = []
        for worker in workers:
            async with only(worker, workers):
                held += await hold(router, address, 2)
        gateway.process.kill()
        await gateway.lines("rest_gateway.worker: the supervisor is gone", 2)
        await release(router)
        assert await asyncio.gather(*held) == ["200"] * 4
        await ends.all()
        socket.create_server(address).close()  # the port is free


async def test_when_the_supervisor_is_killed_in_a_drain_the_workers_leave_at_once() -> None:
    async with ready_workers(2, DRAIN_DELAY_S="60") as (router, gateway, workers):
        ends = Ends(workers)
        (held,) = await hold(router, gateway.address, 1)
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.lines("draining: not ready", 2)
        gateway.process.kill()
        await ends.all()
        assert await held == "lost"


# Starting


async def test_a_port_in_use_is_one_line_and_exit_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        address = f"127.0.0.1:{occupant.getsockname()[1]}"
        process = await start(LISTEN=address, WORKERS="2")
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode() == f"rest_gateway: cannot listen on {address}: {os.strerror(errno.EADDRINUSE)}\n"


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
async def test_a_bad_number_is_one_line_and_exit_2(value: str) -> None:
    process = await start(WORKERS=value)
    _, stderr = await process.communicate()
    assert process.returncode == 2
    (line,) = stderr.decode().splitlines()
    assert line.startswith(f"rest_gateway: bad setting: GATEWAY_WORKERS='{value}': ")


async def test_help_tells_of_it() -> None:
    process = await start("--help")
    stdout, _ = await process.communicate()
    assert re.search(rb"GATEWAY_WORKERS +\w.* \(default 1\)", stdout)


async def test_without_a_place_for_the_metrics_it_is_one_line_and_exit_1() -> None:
    code = "import tempfile; tempfile.tempdir = '/nowhere'; from rest_gateway import __main__; exit(__main__.main([]))"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        env=environment(WORKERS="2"),
        stderr=PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 1
    (line,) = stderr.decode().splitlines()
    assert line.startswith("rest_gateway: cannot supervise 2 workers: ")


async def test_the_supervisor_is_spared_the_server() -> None:
    code = "import sys, rest_gateway.__main__; print({'grpc', 'fastapi', 'uvicorn', 'numpy'} & sys.modules.keys())"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=PIPE)
    stdout, _ = await process.communicate()
    assert stdout == b"set()\n"
