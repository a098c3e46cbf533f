"""A router and its model servers as processes, each on a port of its own that it keeps over its lives."""

import asyncio
import os
import re
import signal
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from tests.acceptance.processes import Program, fixed_ports

PATIENCE_S: Final = 20.0
POLL_S: Final = 0.01


class Server:
    """A model server's place: one process after the other on the same port."""

    def __init__(self, *arguments: str, module: str = "mock_nn", ports: int = 1) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in fixed_ports(ports)]
        listens = [text for address in self.addresses for text in ("--listen", address)]
        self._command = [module, *listens, *arguments]
        self.programs: list[Program] = []
        self.is_up = False

    @property
    def program(self) -> Program:
        """Its present life."""
        return self.programs[-1]

    async def start(self) -> None:
        """Begin a life, and return once it listens."""
        self.programs.append(Program(self._command))
        await asyncio.to_thread(self.program.wait_for, "listening on")
        self.is_up = True

    async def kill(self) -> None:
        """As a crash does it."""
        self.is_up = False
        self.program.send(signal.SIGKILL)
        await asyncio.to_thread(self.program.wait)

    def end(self) -> None:
        """Whatever happened: nothing of it stays."""
        for program in self.programs:
            program.end()


def mock(*arguments: str) -> Server:
    """The project's own model server."""
    return Server(*arguments, "--quiet")


def witness(record: Path, *arguments: str, ports: int = 1) -> Server:
    """The one that writes everything down."""
    return Server("--record", str(record), *arguments, module="tests.reliability.witness", ports=ports)


class Router:
    """The router's process, seen from outside."""

    def __init__(self, program: Program, address: str, metrics_url: str) -> None:
        self.program = program
        self.address = address
        self._metrics_url = metrics_url

    async def metrics(self) -> dict[str, float]:
        """All samples, by name with labels."""
        page = await asyncio.to_thread(self._read)
        pairs = (line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    async def metric(self, name: str) -> float:
        """The sum over all labels."""
        return total(await self.metrics(), name)

    async def wait_until(self, name: str, value: float, patience_s: float = PATIENCE_S) -> float:
        """Until the sum over all labels is at most (or, from below, at least) this; the seconds that took."""
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        async with asyncio.timeout(patience_s):
            is_above = await self.metric(name) > value
            # Another process, which can only be asked.
            while (await self.metric(name) > value) if is_above else (await self.metric(name) < value):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        return loop.time() - begun_at

    async def left_over(self, patience_s: float = PATIENCE_S) -> dict[str, float]:
        """What is still queued, open or in flight; nothing, once it has settled."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + patience_s
        while any((left := _left(await self.metrics())).values()) and loop.time() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        return left

    def resident_bytes(self) -> int:
        """Of its memory."""
        return int(Path(f"/proc/{self.program.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """That it has used so far."""
        fields = Path(f"/proc/{self.program.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> str:
        with urllib.request.urlopen(self._metrics_url) as page:
            content: bytes = page.read()
        return content.decode()


def total(metrics: Mapping[str, float], name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(value for sample, value in metrics.items() if re.fullmatch(rf"{name}(\{{.*\}})?", sample))


def _left(metrics: Mapping[str, float]) -> dict[str, float]:
    sent, back = total(metrics, "router_batch_rows_count"), total(metrics, "router_batches_total")
    return {
        "queued rows": total(metrics, "router_queued_rows"),
        "open calls": total(metrics, "router_open_calls"),
        "batches in flight": sent - back,
    }


@asynccontextmanager
async def cluster(
    backends: Mapping[str, Sequence[Server]],
    *,
    backend: Mapping[str, Any] | None = None,
    models: Sequence[Mapping[str, Any]] = (),
    **settings: Any,  # noqa: ANN401 -- as they stand in the file
) -> AsyncIterator[Router]:
    """Model servers and a router with all of them connected. `backend`, `models`: settings; each backend's the same."""
    servers = [server for group in backends.values() for server in group]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.end)
        content = {
            "listen": "127.0.0.1:0",
            "metrics": "127.0.0.1:0",
            "drain_delay_s": 0,
            "log_requests": "off",
            "backends": {
                name: {"addresses": [address for server in group for address in server.addresses], **(backend or {})}
                for name, group in backends.items()
            },
            "models": list(models) or [{"backend": next(iter(backends)), "max_batch_size": 16}],
            **settings,
        }
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="reliability-"))
        path = Path(directory) / "router.yaml"
        path.write_text(yaml.safe_dump(content))
        await asyncio.gather(*(server.start() for server in servers))
        program = Program(["router", "--config", str(path)])
        stack.callback(program.end)
        metrics_url = (await asyncio.to_thread(program.wait_for, r"metrics on (\S+)"))[1]
        address = (await asyncio.to_thread(program.wait_for, r"router listens on ([\d.:]+)"))[1]
        router = Router(program, address, metrics_url)
        await router.wait_until("router_ready_replicas", sum(len(server.addresses) for server in servers))
        yield router
