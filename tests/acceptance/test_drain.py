"""SIGTERM under load, to one program and to all together: no accepted request is lost, doubled or answered wrongly.

The clients are good clients: on UNAVAILABLE, 503 or a refused connection they wait as they are told and try again.
Three books are kept apart and compared: what the clients asked and got (every row holds its request's number, every
answer is compared with the mock's documented function), what gateway and router logged of every attempt under its id,
and how many rows the mocks computed.

An attempt without an answer was not accepted if it was refused in words (503 with Retry-After, UNAVAILABLE with
push-back), or if the program never had it: it is in nobody's log. Everything else is a loss.
"""

import asyncio
import itertools
import json
import random
import re
import select
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc.aio
import numpy as np
import pytest

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from router_client import Agent, RouterClient
from tests.acceptance.processes import Program, fixed_ports

pytestmark = pytest.mark.anyio

SEED = 20_261_204
RESTARTS_OF_EACH_KIND = 5
CALLERS_OF_EACH_WAY = 8
MAX_AGENTS = 5
PATIENCE_S = 60.0
# What the router says of a call that it has not accepted. One that was accepted and not answered has another text.
REFUSAL = "the router is shutting down and takes no more calls"
KEYS = [("churn", "buyer", 3), ("churn", "seller", 3), ("fraud", "buyer", 8), ("fraud", "", 4)]
STACK = ("busy mock", "mock", "router", "gateway")
KINDS: list[tuple[str, ...]] = [("router",), ("busy mock",), ("gateway",), STACK]

Agents = dict[str, Agent]
Answers = dict[str, list[float]]
Ask = Callable[[str, Agents], Awaitable[Answers]]


class Refused(Exception):
    """An attempt that was, by the client's account, not accepted."""

    def __init__(self, reason: str, wait_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s


# The programs


class Stack:
    """Two mocks, a router and a gateway, each of which always starts on its own port."""

    def __init__(self) -> None:
        busy, mock, router, metrics, gateway = (f"127.0.0.1:{port}" for port in fixed_ports(5))
        self.router, self.gateway = router, gateway
        common = ("mock_nn", "--latency", "0.05-0.15")
        # The busy one is restarted alone as well. The router goes on using the streams that it has open to it, so it
        # is cut at its drain timeout, and the router runs those batches again. The other is only stopped with all, and
        # must stay until the router has no more work for it.
        self._commands: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
            "busy mock": ((*common, "--listen", busy, "--drain-timeout", "0.5"), {}, "listening on"),
            "mock": ((*common, "--listen", mock, "--drain-delay", "0.8", "--seed", "1"), {}, "listening on"),
            "router": (
                ("router",),
                {
                    "ROUTER_LISTEN": router,
                    "ROUTER_METRICS": metrics,
                    "ROUTER_BACKENDS__MOCK__ADDRESSES": json.dumps([busy, mock]),
                    "ROUTER_DRAIN_DELAY_S": "0.5",
                    "ROUTER_LOG_REQUESTS": "all",
                },
                "router listens on",
            ),
            "gateway": (
                ("rest_gateway",),
                {
                    "GATEWAY_LISTEN": gateway,
                    "GATEWAY_ROUTER": router,
                    "GATEWAY_DRAIN_DELAY_S": "0.2",
                    "GATEWAY_LOG_REQUESTS": "all",
                },
                "listening on",
            ),
        }
        self._running: dict[str, Program] = {}
        # Of every life of every program:
        self._programs: list[tuple[str, Program]] = []

    async def start(self, names: tuple[str, ...]) -> None:
        for name in names:
            arguments, environment, _ = self._commands[name]
            self._running[name] = Program(list(arguments), environment)
            self._programs.append((name, self._running[name]))
        await asyncio.gather(*(self.wait_for(name, self._commands[name][2]) for name in names))

    async def wait_for(self, name: str, line: str) -> None:
        await asyncio.to_thread(self._running[name].wait_for, line)

    def terminate(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._running[name].send(signal.SIGTERM)

    async def ended(self, names: tuple[str, ...]) -> dict[str, int]:
        """The exit codes."""
        codes = await asyncio.gather(*(asyncio.to_thread(self._running[name].wait) for name in names))
        return dict(zip(names, codes, strict=True))

    def logs(self, *names: str) -> Iterator[str]:
        """The lines of all lives that have ended."""
        return (line for name, program in self._programs if name in names for line in program.lines)

    def end(self) -> None:
        for _, program in self._programs:
            program.end()


@contextmanager
def stack_of_programs() -> Iterator[Stack]:
    stack = Stack()
    try:
        yield stack
    finally:
        stack.end()


# The clients


class RestClient:
    """One keep-alive connection, by hand: no client library that tries again by itself."""

    def __init__(self, gateway: str) -> None:
        self._address = gateway.split(":")
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, attempt: str, agents: Agents) -> Answers:
        reader, writer = await self._connected()
        writer.write(_http_request(attempt, agents))
        try:
            status = await reader.readline()
        except ConnectionError:
            status = b""
        if not status:
            self.close()
            raise Refused("connection closed before the answer", 0)
        return await self._rest_of_answer(reader, int(status.split()[1]))

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._connection is not None and _has_something_to_read(self._connection[1]):
            self.close()  # nothing was asked: that is its end
        if self._connection is None:
            try:
                self._connection = await asyncio.open_connection(*self._address)
            except OSError:
                raise Refused("connection refused", 0.2) from None
        return self._connection

    async def _rest_of_answer(self, reader: asyncio.StreamReader, status: int) -> Answers:
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().lower().partition(":")
            headers[name] = value.strip()
        content = json.loads(await reader.readexactly(int(headers["content-length"])))
        if headers.get("connection") == "close":
            assert await reader.read() == b""
            self.close()
        if status == 503:
            raise Refused("503", float(headers["retry-after"]))
        assert (status, content.get("errors")) == (200, {}), content
        return {name: result["output"] for name, result in content["results"].items()}

    def close(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None


def _has_something_to_read(writer: asyncio.StreamWriter) -> bool:
    poller = select.poll()
    poller.register(writer.get_extra_info("socket"), select.POLLIN)
    return bool(poller.poll(0))


def _http_request(attempt: str, agents: Agents) -> bytes:
    wanted = {
        name: {"vector": list(agent.vector), "model_name": agent.model_name, "agent_type": agent.agent_type}
        for name, agent in agents.items()
    }
    body = json.dumps({"agents": wanted}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: gateway\r\nX-Request-Id: {attempt}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def unary_ask(stub: "pb_grpc.InferenceRouterServiceAsyncStub") -> Ask:
    async def ask(attempt: str, agents: Agents) -> Answers:
        request = pb.PredictRequest(
            agents={
                name: pb.Agent(vector=agent.vector, model_name=agent.model_name, agent_type=agent.agent_type)
                for name, agent in agents.items()
            }
        )
        try:
            response = await stub.Predict(request, metadata=(("x-request-id", attempt),))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            pushback_ms = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
            if pushback_ms is None:
                raise Refused("UNAVAILABLE, no router", 0.2) from error
            raise Refused("UNAVAILABLE, push-back", int(pushback_ms) / 1000) from error
        assert not any(result.HasField("error") for result in response.results.values()), response
        return {name: list(result.output) for name, result in response.results.items()}

    return ask


def stream_ask(client: RouterClient) -> Ask:
    async def ask(attempt: str, agents: Agents) -> Answers:
        results = await client.predict(agents, request_id=attempt)
        errors = [result.error for result in results.values() if result.error is not None]
        if len(errors) == len(results) and all(error.code == "UNAVAILABLE" for error in errors):
            raise Refused("UNAVAILABLE, push-back", (errors[0].retry_pushback_ms or 0) / 1000)
        assert not errors, errors
        return {name: result.output for name, result in results.items()}

    return ask


def draw(rng: random.Random, number: int) -> Agents:
    """Rows that say whose they are: the request's number, the row's, and chance."""
    agents = {}
    for row in range(rng.randint(1, MAX_AGENTS)):
        model, agent_type, dim = rng.choice(KEYS)
        vector = np.array([number, row, *(rng.uniform(-9, 9) for _ in range(dim - 2))], "<f4").tolist()
        agents[f"agent {row}"] = Agent(model_name=model, vector=vector, agent_type=agent_type)
    return agents


def is_right(agents: Agents, answers: Answers) -> bool:
    return answers.keys() == agents.keys() and all(
        np.array(answers[name], "<f4").tobytes()
        == expected(agent.model_name, agent.agent_type, np.array([agent.vector], "<f4"))[:1].tobytes()
        for name, agent in agents.items()
    )


# The books


class Attempt(NamedTuple):
    """What its client saw of it: `reason` is empty when it was answered."""

    way: str
    reason: str


@dataclass
class Ledger:
    """The clients' own book."""

    attempts: dict[str, Attempt] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    faults: list[str] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(holds)

    async def note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    @property
    def refusals(self) -> Counter[str]:
        return Counter(f"{attempt.way}: {attempt.reason}" for attempt in self.attempts.values() if attempt.reason)


class Load:
    """Callers of all ways, in a closed loop until they are told to stop."""

    def __init__(self, ways: dict[str, list[Ask]]) -> None:
        self.ledger = Ledger()
        self.ways = list(ways)
        self._numbers = itertools.count(1)
        self._is_over = False
        self._tasks = [
            asyncio.create_task(self._call(way, ask, random.Random(f"{SEED} {way} {number}")))
            for way, asks in ways.items()
            for number, ask in enumerate(asks)
        ]

    async def stop(self) -> None:
        """Return when every caller has its answer."""
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _call(self, way: str, ask: Ask, rng: random.Random) -> None:
        while not self._is_over:
            number = next(self._numbers)
            agents = draw(rng, number)
            self.ledger.in_flight[way] += 1
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answers = await self._ask_until_accepted(way, number, ask, agents)
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is a loss, and the others go on
                self.ledger.faults.append(f"request {number} by {way}: lost: {error!r}")
            else:
                if not is_right(agents, answers):
                    self.ledger.faults.append(f"request {number} by {way}: wrong: {answers}")
                self.ledger.answered[way] += 1
                self.ledger.rows += len(agents)
            self.ledger.in_flight[way] -= 1
            await self.ledger.note()
            await asyncio.sleep(rng.choice((0, 0.02, 0.3)))

    async def _ask_until_accepted(self, way: str, number: int, ask: Ask, agents: Agents) -> Answers:
        for turn in itertools.count():
            attempt = f"{way}-{number}-{turn}"
            try:
                answers = await ask(attempt, agents)
            except Refused as refusal:
                self.ledger.attempts[attempt] = Attempt(way, refusal.reason)
                await asyncio.sleep(refusal.wait_s)
            else:
                self.ledger.attempts[attempt] = Attempt(way, "")
                return answers
        raise AssertionError


@asynccontextmanager
async def load_on(stack: Stack) -> AsyncIterator[Load]:
    backoff = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
    rest = [RestClient(stack.gateway) for _ in range(CALLERS_OF_EACH_WAY)]
    async with (
        grpc.aio.insecure_channel(stack.router, options=[("grpc.enable_http_proxy", 0), *backoff]) as channel,
        RouterClient(stack.router) as client,
    ):
        stub: pb_grpc.InferenceRouterServiceAsyncStub = pb_grpc.InferenceRouterServiceStub(channel)
        load = Load(
            {
                "rest": [one.ask for one in rest],
                "unary": [unary_ask(stub)] * CALLERS_OF_EACH_WAY,
                "stream": [stream_ask(client)] * CALLERS_OF_EACH_WAY,
            }
        )
        try:
            yield load
        finally:
            await load.stop()
            for one in rest:
                one.close()


_ROUTER_LINE = re.compile(r"router\.access: Predict\w* (\w+), \d+ rows in [\d.]+ s(?:: (.*))? request_id=(\S+)$")
_GATEWAY_LINE = re.compile(r"POST /predict (\d+) in [\d.]+ s (.*) request_id=(\S+)$")
_BATCH_LINE = re.compile(r" batch .* rows=(\d+) ")


class Record(NamedTuple):
    """What a program says that it has done with an attempt."""

    outcome: str
    detail: str | None


def records(lines: Iterator[str], pattern: re.Pattern[str]) -> dict[str, list[Record]]:
    """By attempt."""
    found: dict[str, list[Record]] = {}
    for line in lines:
        if match := pattern.search(line):
            found.setdefault(match[3], []).append(Record(match[1], match[2]))
    return found


def losses(ledger: Ledger, at_gateway: dict[str, list[Record]], at_router: dict[str, list[Record]]) -> Iterator[str]:
    """Attempts that were accepted by somebody's account and not answered by another's, and those answered twice."""
    for name, attempt in ledger.attempts.items():
        gateway, router = at_gateway.get(name, []), at_router.get(name, [])
        done = [record for record in router if record != Record("UNAVAILABLE", REFUSAL)]
        if attempt.way == "rest":
            outcomes = [record.outcome for record in gateway]
            if outcomes != {"": ["200"], "503": ["503"]}.get(attempt.reason, []):
                yield f"{name}: {attempt.reason or 'answered'}, and the gateway says {gateway}"
        if [record.outcome for record in done] != ([] if attempt.reason else ["OK"]):
            yield f"{name}: {attempt.reason or 'answered'}, and the router says {router}"


@pytest.mark.timeout(300)  # about a minute, and two where others use the machine
async def test_20_restarts_under_load_lose_no_accepted_request() -> None:
    with stack_of_programs() as stack:
        await stack.start(STACK)
        async with load_on(stack) as load:
            restarts = 0
            for _, names in itertools.product(range(RESTARTS_OF_EACH_KIND), KINDS):
                await restart_under_load(stack, load, names)
                restarts += 1
        stack.terminate(STACK)
        assert await stack.ended(STACK) == dict.fromkeys(STACK, 0)
        ledger = load.ledger
        at_gateway = records(stack.logs("gateway"), _GATEWAY_LINE)
        at_router = records(stack.logs("router"), _ROUTER_LINE)
        computed = sum(int(match[1]) for line in stack.logs("mock", "busy mock") if (match := _BATCH_LINE.search(line)))

    lost = [*ledger.faults, *losses(ledger, at_gateway, at_router)]
    print(
        f"\nseed {SEED}: {restarts} restarts ({restarts // len(KINDS)} of each of {', '.join(map(' + '.join, KINDS))})"
        f"\nrequests answered {dict(ledger.answered)}, rows {ledger.rows}, computed again {computed - ledger.rows}"
        f"\nattempts refused and made again {dict(ledger.refusals)}, lost={len(lost)}"
    )
    assert lost == []
    assert computed >= ledger.rows


async def restart_under_load(stack: Stack, load: Load, names: tuple[str, ...]) -> None:
    """SIGTERM while requests of every way are open; over when every way has answers that were asked afterwards."""
    ledger = load.ledger
    await ledger.wait_until(lambda: all(ledger.in_flight[way] for way in load.ways))
    stack.terminate(names)
    assert await stack.ended(names) == dict.fromkeys(names, 0)
    await stack.start(names)
    before = ledger.answered.copy()
    enough = CALLERS_OF_EACH_WAY // 2
    await ledger.wait_until(lambda: all(ledger.answered[way] >= before[way] + enough for way in load.ways))


async def test_what_the_gateway_accepts_after_sigterm_to_all_is_answered_though_nothing_was_open_before() -> None:
    """A mock without an open stream used to leave at once, and the router's new calls found no backend."""
    with stack_of_programs() as stack:
        await stack.start(STACK)
        stack.terminate(STACK)
        await asyncio.gather(*(stack.wait_for(name, "draining") for name in STACK))
        rest = RestClient(stack.gateway)
        agents = draw(random.Random(SEED), 1)
        assert is_right(agents, await rest.ask("late", agents))
        rest.close()
        assert await stack.ended(STACK) == dict.fromkeys(STACK, 0)
