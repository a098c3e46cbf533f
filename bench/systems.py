"""How each system is started, in processes that it shares with no other.

    echo      bare grpc.aio server
    unary     mock ◄─ router
    infer     mock ◄─ router, asked by the Open Inference Protocol
    stream    mock ◄─ router
    rest      mock ◄─ router ◄─ gateway
    sqlite, postgresql                the same, for jobs that are kept there
    sqlite-store, postgresql-store    a database with many finished jobs, asked without programs in between

Free ports of the loopback only. The programs run in a directory that is gone afterwards and see none of the caller's
settings: a `router.yaml` or a ROUTER_ variable at hand would otherwise be measured, too.
"""

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bench.plan import Setting
from bench.postgres import Postgres
from bench.processes import BenchError, Program, running

ROOT = Path(__file__).resolve().parent.parent
OWN_SETTINGS = ("ROUTER_", "GATEWAY_", "MOCK_", "DATABASE_URL")
ANY_PORT = "127.0.0.1:0"
METRICS_TIMEOUT_S = 10.0
SETTLE_TIMEOUT_S = 60.0
S1_MODEL = "model-0"  # what workload S1 asks
FILL_TIMEOUT_S = 300.0  # of bench.job_rows.CHUNK rows

WAYS = {
    "echo": "unary",
    "unary": "unary",
    "infer": "infer",
    "stream": "stream",
    "rest": "rest",
    "sqlite": "submit",
    "postgresql": "submit",
    "sqlite-store": "store",
    "postgresql-store": "store",
}
"""Each system and the way it is asked."""


@dataclass(frozen=True, slots=True)
class BatchCount:
    """Batches that a router has dispatched until now, and their rows."""

    batches: float = 0.0
    rows: float = 0.0


@dataclass(frozen=True, slots=True)
class System:
    """A running system: where and in which way it is asked; the echo server plays the router's part."""

    way: str
    address: str
    router: Program | None = None
    gateway: Program | None = None
    mocks: Sequence[Program] = ()
    metrics_url: str = ""
    database: Program | None = None
    model_name: str = ""

    async def count_batches(self) -> BatchCount | None:
        """From the router's metrics; None for the echo server."""
        if not self.metrics_url:
            return None
        return _parse_batches(await asyncio.to_thread(_fetch, self.metrics_url))

    async def settle(self) -> None:
        """Until every job that was submitted has ended: the next case is not to pay for it."""
        give_up = time.monotonic() + SETTLE_TIMEOUT_S
        while self.way == "submit" and await asyncio.to_thread(self._has_jobs):
            if time.monotonic() > give_up:
                raise BenchError(f"what was submitted has not ended within {SETTLE_TIMEOUT_S:g} s")
            await asyncio.sleep(0.05)

    def _has_jobs(self) -> bool:
        url = f"http://{self.address}/jobs?limit=1&status="
        return any(json.loads(_fetch(url + status))["jobs"] for status in ("pending", "processing"))


@dataclass
class Launcher:
    """Starts programs, which live until `stack` is closed.

    `directory` is theirs; job databases are below `databases`, or in `postgres` where it is started. `say` tells how
    far it is.
    """

    stack: AsyncExitStack
    directory: Path
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    databases: Path = Path()
    postgres: Postgres | None = None
    say: Callable[[str], None] = print

    async def start_system(self, name: str, setting: Setting) -> System:
        """One of WAYS."""
        if name == "echo":
            echo = await self.start("echo", "bench.echo")
            return System(WAYS[name], await address_of(echo), echo)
        if WAYS[name] == "store":
            return await self._start_store(name, setting)
        mocks = [await self._start_mock(name, setting) for _ in range(setting.replicas)]
        router = await self._start_router(name, setting, [await address_of(mock) for mock in mocks])
        metrics_url = (await router.wait_for(r"metrics on (\S+)"))[1]
        address = await address_of(router)
        if WAYS[name] not in ("rest", "submit"):
            model_name = S1_MODEL if name == "infer" else ""
            return System(WAYS[name], address, router, mocks=mocks, metrics_url=metrics_url, model_name=model_name)
        database = {"DATABASE_URL": await self._new_database(name)} if WAYS[name] == "submit" else {}
        gateway = await self.start(
            f"gateway of {name}", "rest_gateway", GATEWAY_LISTEN=ANY_PORT, GATEWAY_ROUTER=address, **database
        )
        return System(
            WAYS[name], await address_of(gateway), router, gateway, mocks, metrics_url, self._database_program(name)
        )

    async def _start_store(self, name: str, setting: Setting) -> System:
        """A database with finished jobs in it."""
        url = await self._new_database(name)
        rows = setting.job_rows
        filling = await self.start(f"rows of {name}", "bench.job_rows", url, f"{rows}")
        filled = 0
        while filled < rows:
            filled = int(await filling.read_line(FILL_TIMEOUT_S))
            self.say(f"filled {filled:,} of {rows:,} finished jobs into {name}")
        await filling.wait_done()
        return System(WAYS[name], url, database=self._database_program(name))

    async def _new_database(self, name: str) -> str:
        if not name.startswith("postgresql"):
            return f"sqlite:///{self.databases / name}.sqlite3"
        assert self.postgres is not None
        return await self.postgres.create_database(name)

    def _database_program(self, name: str) -> Program | None:
        return self.postgres.program if self.postgres is not None and name.startswith("postgresql") else None

    async def start(self, name: str, *arguments: str, **environment: str) -> Program:
        """Run `python -m` with `arguments`."""
        inherited = {key: value for key, value in os.environ.items() if not _is_foreign(key)}
        inherited["PYTHONPATH"] = str(ROOT)
        inherited["DATABASE_URL"] = f"sqlite:///{self.directory}/{name}.sqlite3"  # not the one that is in use here
        return await self.stack.enter_async_context(
            running(
                name,
                *arguments,
                environment=inherited | dict(self.extra_environment) | environment,
                directory=self.directory,
            )
        )

    async def _start_mock(self, name: str, setting: Setting) -> Program:
        flags = ("--listen", ANY_PORT, "--latency", f"{setting.latency_s:g}", "--quiet")
        return await self.start(f"mock of {name}", "mock_nn", *flags)

    async def _start_router(self, name: str, setting: Setting, mock_addresses: Sequence[str]) -> Program:
        config = {
            "backends": {"mock": {"addresses": mock_addresses, "max_in_flight": setting.max_in_flight}},
            "models": [{"backend": "mock", "max_batch_size": 64, "max_queue_delay_s": setting.max_queue_delay_s}],
        }
        return await self.start_router(name, config)

    async def start_router(self, name: str, config: Mapping[str, object]) -> Program:
        """A router with these settings."""
        path = self.directory / f"{name}.yaml"
        path.write_text(json.dumps(config))  # which is YAML
        return await self.start(
            f"router of {name}",
            "router",
            "--config",
            str(path),
            ROUTER_LISTEN=ANY_PORT,
            ROUTER_METRICS=ANY_PORT,
        )


async def address_of(program: Program) -> str:
    """Where it says that it listens."""
    return (await program.wait_for(r"listen\w* on (?:http://)?(127\.0\.0\.1:\d+)"))[1]


def _is_foreign(variable: str) -> bool:
    return variable.startswith(OWN_SETTINGS) or variable.lower().endswith("_proxy")


def _fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=METRICS_TIMEOUT_S) as response:
        content: bytes = response.read()
    return content.decode()


def _parse_batches(text: str) -> BatchCount:
    totals = {"router_batch_rows_count": 0.0, "router_batch_rows_sum": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
    return BatchCount(totals["router_batch_rows_count"], totals["router_batch_rows_sum"])
