"""A minute of everything at once, warm-up included, good, bad and given up, by real processes: then nothing is left.

Queue, open calls and requests in flight are 0, descriptors and threads are back where they were after a warm-up, and
the second half of the load has not made router and gateway larger. GROWTH_SECONDS: how long (25).

Would it see a leak? With 200 bytes kept for each request, by hand, the router ended half a minute 4.3 MB larger;
without, on an equally busy machine, router and gateway 0.1 and 0.2.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc.aio
import httpx
import numpy as np
import pytest

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from router_client import Agent, RouterClient
from tests.acceptance.processes import Program, running

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc"),
]

SEED = 20_261_205
GROWTH_S = float(os.environ.get("GROWTH_SECONDS", "25"))
# Pieces of work until the programs have come to their size, however long a busy machine takes for them.
WARM_UP_WORK = 8_000
SAMPLE_S = 0.5
# One socket of the router's more than before was seen twice in many runs, once still after 140 s. Why is not known, so
# one may be left over of 50,000 pieces of work, 60 connections and 2,000 cancels, and is told; a leak leaves many.
MAX_LEFT = 1
# gRPC may keep a connection that has not begun for 120 s; what is still there after this is kept for good.
SETTLE_S = 140.0
# Of the resident size, from the middle of the load to its end: a hundredth, and one arena more, for that is what Python
# takes memory in. (Over 300 s and 320,000 pieces a router grew by 1.0 MiB in the second half, most of which is gRPC's
# leak of 97 bytes per cancelled RPC, grpc/grpc#43360.)
MAX_GROWTH, MAX_GROWTH_BYTES = 0.01, 2**20
KEYS = [("churn", "buyer", 3), ("churn", "seller", 8), ("fraud", "buyer", 16), ("fraud", "", 32)]

Work = Callable[[random.Random], Awaitable[None]]


# The programs, seen from outside


class Usage(NamedTuple):
    """What a process holds."""

    descriptors: int
    sockets: int
    threads: int


def usage(program: Program) -> Usage:
    links = [_link(path) for path in Path(f"/proc/{program.pid}/fd").iterdir()]
    names = [path.read_text().strip() for path in Path(f"/proc/{program.pid}/task").glob("*/comm")]
    threads = len(names) - names.count("event_engine")  # gRPC's own, which come and go with its work
    return Usage(len(links), sum(link.startswith("socket:") for link in links), threads)


def _link(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(path.readlink())
    return ""


def connections(program: Program) -> list[str]:
    """Its TCP sockets, LOCAL-REMOTE in the kernel's hexadecimal and the state (01 established, 0A listens)."""
    inodes = {_link(path) for path in Path(f"/proc/{program.pid}/fd").iterdir()}
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return sorted(
        f"{local}-{remote} {state}"
        for _, local, remote, state, *_, inode in ((*line[:4], line[9]) for line in lines)
        if f"socket:[{inode}]" in inodes
    )


def resident_bytes(program: Program) -> int:
    return int(Path(f"/proc/{program.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Stack(NamedTuple):
    router: Program
    gateway: Program
    router_address: str
    metrics: str
    gateway_address: str

    @property
    def programs(self) -> dict[str, Program]:
        return {"router": self.router, "gateway": self.gateway}


@contextmanager
def mock_router_and_gateway() -> Iterator[Stack]:
    quick = {"ROUTER_LOG_REQUESTS": "off", "GATEWAY_LOG_REQUESTS": "off"}
    with ExitStack() as stack:
        flags = ("--latency", "0.002-0.02", "--latency", "slow=0.5", "--fault", "poison:value=666", "--quiet")
        mock = stack.enter_context(running("mock_nn", "--listen", "127.0.0.1:0", *flags))
        router = stack.enter_context(
            running(
                "router",
                ROUTER_LISTEN="127.0.0.1:0",
                ROUTER_METRICS="127.0.0.1:0",
                ROUTER_BACKENDS__MOCK__ADDRESSES=json.dumps([mock.wait_for(r"listening on ([\d.:]+)")[1]]),
                **quick,
            )
        )
        metrics = router.wait_for(r"metrics on (\S+)")[1]
        router_address = router.wait_for(r"router listens on ([\d.:]+)")[1]
        gateway = stack.enter_context(
            running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER=router_address, **quick)
        )
        yield Stack(router, gateway, router_address, metrics, gateway.wait_for(r"listening on http://([\d.:]+)")[1])


# The load


_NUMBERS = np.random.default_rng(SEED).uniform(-9, 9, 10_000).astype("<f4").tolist()


def draw(rng: random.Random, most: int = 8, model_name: str | None = None) -> dict[str, Agent]:
    agents = {}
    for number in range(rng.randint(1, most)):
        model, agent_type, dim = rng.choice(KEYS)
        first = rng.randrange(len(_NUMBERS) - dim)
        vector = _NUMBERS[first : first + dim]
        agents[f"agent {number}"] = Agent(model_name=model_name or model, vector=vector, agent_type=agent_type)
    return agents


def check(agents: dict[str, Agent], outputs: dict[str, list[float]]) -> None:
    """Every answer is its row's."""
    assert outputs.keys() == agents.keys()
    for name, agent in agents.items():
        right = expected(agent.model_name, agent.agent_type, np.array([agent.vector], "<f4"))[:1]
        assert np.array(outputs[name], "<f4").tobytes() == right.tobytes()


def to_json(agents: dict[str, Agent], **more: object) -> bytes:
    wanted = {
        name: {"vector": list(agent.vector), "model_name": agent.model_name, "agent_type": agent.agent_type}
        for name, agent in agents.items()
    }
    return json.dumps({"agents": wanted, **more}).encode()


def to_proto(agents: dict[str, Agent], timeout_s: float | None = None) -> pb.PredictRequest:
    wanted = {
        name: pb.Agent(vector=agent.vector, model_name=agent.model_name, agent_type=agent.agent_type)
        for name, agent in agents.items()
    }
    return pb.PredictRequest(agents=wanted, timeout_s=timeout_s)


# Too late for the model, or too many wait ahead to be in time.
LATE = {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
GOOD_AGENT = b'{"vector": [1, 2], "model_name": "m"}'
# (body, headers, status)
BAD_BODIES: list[tuple[bytes, dict[str, str], int]] = [
    (b"", {}, 400),
    (b"{", {}, 400),
    (b"\xff\xfe", {}, 400),
    (b'{"agents": {"a": {"vector": [NaN], "model_name": "m"}}}', {}, 400),
    (b"[" * 50_000, {}, 400),
    (b"[]", {}, 422),
    (b"{}", {}, 422),
    (b'{"agents": {}}', {}, 422),
    (b'{"agents": {"a": 1}}', {}, 422),
    (b'{"agents": {"a": {"vector": [], "model_name": "m"}}}', {}, 422),
    (b'{"agents": {"a": {"vector": [1e39], "model_name": "m"}}}', {}, 422),
    (b'{"agents": {"a": {"vector": ["x"], "model_name": "m"}}}', {}, 422),
    (b'{"agents": {"a": {"vector": [1], "model_name": ""}}}', {}, 422),
    (b'{"agents": {"a": %b, "a": %b}}' % (GOOD_AGENT, GOOD_AGENT), {}, 422),
    (b'{"agents": {%b}}' % b",".join(b'"%d": %b' % (n, GOOD_AGENT) for n in range(1025)), {}, 422),
    (b'{"agents": {"a": %b}, "timeout_s": -1}' % GOOD_AGENT, {}, 422),
    (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415),
    (b'{"agents": {"a": %b}}' % GOOD_AGENT, {"Accept": "image/png"}, 406),
]
BAD_REQUESTS = [
    pb.PredictRequest(),
    pb.PredictRequest(agents={"a": pb.Agent(model_name="m")}),
    pb.PredictRequest(agents={"a": pb.Agent(model_name="", vector=[1])}),
    pb.PredictRequest(agents={"a": pb.Agent(model_name="m", vector=[float("nan")])}),
    pb.PredictRequest(agents={"a": pb.Agent(model_name="m", vector=[1])}, tenant="x" * 300),
    pb.PredictRequest(agents={str(n): pb.Agent(model_name="m", vector=[1]) for n in range(1025)}),
]
RAW_REQUESTS = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n{",
]


class Load:
    """Every way to use, misuse and leave the programs; each of `works` is repeated by its number of callers."""

    def __init__(self, stack: Stack, http: httpx.AsyncClient, channel: grpc.aio.Channel, client: RouterClient) -> None:
        self._stack = stack
        self._http = http
        self._stub: pb_grpc.InferenceRouterServiceAsyncStub = pb_grpc.InferenceRouterServiceStub(channel)
        self._raw_unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference_router.v1.InferenceRouterService/Predict"
        )
        self._client = client
        self._until = self._enough = 0.0
        self.done: Counter[str] = Counter()
        self.works: dict[str, tuple[Work, int]] = {
            "rest json": (self._rest_json, 8),
            "rest sse": (self._rest_sse, 1),
            "rest ndjson": (self._rest_ndjson, 1),
            "rest deadline": (self._rest_deadline, 1),
            "rest disconnect": (self._rest_disconnect, 1),
            "rest bad": (self._rest_bad, 1),
            "rest raw": (self._rest_raw, 1),
            "rest other": (self._rest_other, 1),
            "unary": (self._unary, 4),
            "unary deadline": (self._unary_deadline, 1),
            "unary cancel": (self._unary_cancel, 1),
            "unary bad": (self._unary_bad, 1),
            "stream": (self._stream, 4),
            "stream partly bad": (self._stream_partly_bad, 1),
            "stream deadline": (self._stream_deadline, 1),
            "stream cancel": (self._stream_cancel, 2),
            "stream of its own": (self._stream_of_its_own, 1),
        }

    async def run(self, *, seconds: float = math.inf, pieces: float = math.inf) -> None:
        """For so long, or until so much is done."""
        self._until, self._enough = asyncio.get_running_loop().time() + seconds, pieces
        async with asyncio.TaskGroup() as group:
            for name, (work, callers) in self.works.items():
                for number in range(callers):
                    group.create_task(self._repeat(name, work, random.Random(f"{SEED} {name} {number}")))

    def _is_over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._until or self.done.total() >= self._enough

    async def _repeat(self, name: str, work: Work, rng: random.Random) -> None:
        while not self._is_over():
            await work(rng)
            self.done[name] += 1

    # REST

    async def _post(self, body: bytes, **headers: str) -> httpx.Response:
        return await self._http.post("/predict", content=body, headers=headers)

    async def _rest_json(self, rng: random.Random) -> None:
        """100 requests on a connection, without the client library: it would take more time than both programs."""
        async with self._connection() as (reader, writer):
            for _ in range(100):
                agents = draw(rng)
                body = to_json(agents, explain=rng.random() < 0.2)
                writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert head.startswith("http/1.1 200 "), head
                content = await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
                check(agents, {name: result["output"] for name, result in json.loads(content)["results"].items()})
                self.done["rest json"] += 1
                if self._is_over():
                    return

    async def _rest_sse(self, rng: random.Random) -> None:
        agents = draw(rng)
        response = await self._post(to_json(agents), Accept="text/event-stream")
        assert response.text.endswith('event: done\ndata: {"done":true}\n\n')
        assert response.text.count("event: result") == len(agents)

    async def _rest_ndjson(self, rng: random.Random) -> None:
        agents = draw(rng)
        response = await self._post(to_json(agents), Accept="application/x-ndjson")
        *results, done = map(json.loads, response.text.splitlines())
        assert done == {"done": True}
        check(agents, {result["agent"]: result["output"] for result in results})

    async def _rest_deadline(self, rng: random.Random) -> None:
        response = await self._post(to_json(draw(rng, model_name="slow"), timeout_s=rng.uniform(0.0001, 0.02)))
        assert response.status_code in (504, 429), response.text

    async def _rest_disconnect(self, rng: random.Random) -> None:
        """The request is written, wholly or not; then the client is gone, in the midst of whatever happens to it."""
        accept = rng.choice(["application/json", "text/event-stream"])
        body = to_json(draw(rng, model_name=rng.choice(["slow", "churn"])))
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        async with self._connection() as (_, writer):
            writer.write((head.encode() + body)[: rng.choice([len(head), None])])
            await writer.drain()
            await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.05]))
            writer.transport.abort()

    async def _rest_bad(self, rng: random.Random) -> None:
        body, headers, status = rng.choice(BAD_BODIES)
        response = await self._post(body, **headers)
        assert response.status_code == status, (body[:80], response.text)

    async def _rest_raw(self, rng: random.Random) -> None:
        async with self._connection() as (reader, writer):
            writer.write(rng.choice(RAW_REQUESTS))
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()

    async def _rest_other(self, rng: random.Random) -> None:
        paths = {"/healthz": 200, "/readyz": 200, "/metrics": 200, "/nowhere": 404, "/predict": 405}
        path, status = rng.choice(list(paths.items()))
        assert (await self._http.get(path)).status_code == status

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._stack.gateway_address.split(":"))
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    # Unary gRPC

    async def _unary(self, rng: random.Random) -> None:
        agents = draw(rng)
        response = await self._stub.Predict(to_proto(agents))
        check(agents, {name: list(result.output) for name, result in response.results.items()})

    async def _unary_deadline(self, rng: random.Random) -> None:
        agents = draw(rng, model_name="slow")
        seconds = rng.uniform(0.001, 0.05)
        call = rng.choice([(to_proto(agents), seconds), (to_proto(agents, seconds), None)])
        codes = set()
        try:
            response = await self._stub.Predict(call[0], timeout=call[1])
            codes |= {result.error.code for result in response.results.values()}
        except grpc.aio.AioRpcError as error:  # all for the same reason
            codes.add(error.code().name)
        assert codes <= LATE

    async def _unary_cancel(self, rng: random.Random) -> None:
        call = self._stub.Predict(to_proto(draw(rng, model_name="slow")))
        await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.05]))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def _unary_bad(self, rng: random.Random) -> None:
        number = rng.randrange(len(BAD_REQUESTS) + 1)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await (self._stub.Predict(BAD_REQUESTS[number]) if number < len(BAD_REQUESTS) else self._raw_unary(b"\xff"))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    # The native stream

    async def _stream(self, rng: random.Random) -> None:
        agents = [draw(rng) for _ in range(16)]
        explain = rng.random() < 0.2
        for asked, results in zip(
            agents, await asyncio.gather(*(self._client.predict(one, explain=explain) for one in agents)), strict=True
        ):
            check(asked, {name: result.output for name, result in results.items()})
        self.done["stream"] += len(agents) - 1

    async def _stream_partly_bad(self, rng: random.Random) -> None:
        """A row that the router refuses, and one of which the model dies, among good ones."""
        good = draw(rng)
        bad = {"nan": Agent("churn", [float("nan")]), "none": Agent("", [1.0]), "poison": Agent("poisoned", [666.0])}
        results = await self._client.predict(good | bad)
        check(good, {name: results[name].output for name in good})
        codes = {name: error.code for name in bad if (error := results[name].error)}
        assert codes == {"nan": "INVALID_ARGUMENT", "none": "INVALID_ARGUMENT", "poison": "UNKNOWN"}, codes

    async def _stream_deadline(self, rng: random.Random) -> None:
        results = await self._client.predict(draw(rng, model_name="slow"), timeout_s=rng.uniform(0.0001, 0.02))
        assert all(result.error and result.error.code in LATE for result in results.values())

    async def _stream_cancel(self, rng: random.Random) -> None:
        call = asyncio.create_task(self._client.predict(draw(rng, model_name="slow")))
        await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.05]))
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()

    async def _stream_of_its_own(self, rng: random.Random) -> None:
        """A client that comes, leaves calls behind and goes, politely, abruptly or with nonsense."""
        manner = rng.choice(["politely", "abruptly", "nonsense"])
        channel = grpc.aio.insecure_channel(
            self._stack.router_address, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )
        async with channel:
            open_stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
                "/inference_router.v1.InferenceRouterService/PredictStream"
            )
            stream = open_stream()
            block = pb.Block(model_name="slow", rows=2, dim=1, vectors=bytes(8))
            calls = [pb.Call(call_id=number, blocks=[block]) for number in range(10)]
            await stream.write(pb.PredictStreamRequest(calls=calls, cancels=[3]).SerializeToString())
            if manner == "abruptly":
                return
            if manner == "nonsense":
                await stream.write(b"\xff\xff\xff")
            await stream.done_writing()
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await stream.read() is not grpc.aio.EOF:
                    pass


@asynccontextmanager
async def load_on(stack: Stack) -> AsyncIterator[Load]:
    async with AsyncExitStack() as exits:
        limits = httpx.Limits(max_connections=None)
        url = f"http://{stack.gateway_address}"
        http = await exits.enter_async_context(
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, limits=limits)
        )
        # A pool of connections of its own: with gRPC's shared one this channel's would stay open.
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(stack.router_address, options))
        client = await exits.enter_async_context(RouterClient(stack.router_address))
        yield Load(stack, http, channel, client)


# The measurement


async def sample(programs: dict[str, Program], sizes: dict[str, list[int]]) -> None:
    while True:
        for name, program in programs.items():
            sizes[name].append(resident_bytes(program))
        await asyncio.sleep(SAMPLE_S)


async def open_work(stack: Stack) -> dict[str, float]:
    """What waits or runs, by the programs' own account."""
    async with httpx.AsyncClient(trust_env=False) as http:
        router = (await http.get(stack.metrics)).text
        gateway = (await http.get(f"http://{stack.gateway_address}/metrics")).text
    return {
        "queued rows": _value(router, "router_queued_rows"),
        "open calls": _value(router, "router_open_calls"),
        # Less the one that asks.
        "requests in flight": _value(gateway, "gateway_requests_in_flight") - 1,
    }


def _value(page: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.split(" ")[0].split("{")[0] == name)


NOTHING = {"queued rows": 0, "open calls": 0, "requests in flight": 0}


async def settled(stack: Stack, is_settled: Callable[[dict[str, Usage]], bool]) -> dict[str, Usage]:
    """What the programs hold when nothing is open any more; each look is requests of its own. The last look counts."""
    give_up_s = asyncio.get_running_loop().time() + SETTLE_S
    while True:
        work = await open_work(stack)
        held = {name: usage(program) for name, program in stack.programs.items()}
        if (work == NOTHING and is_settled(held)) or asyncio.get_running_loop().time() > give_up_s:
            assert work == NOTHING
            return held


@pytest.mark.timeout(GROWTH_S + 400)
async def test_a_minute_of_everything_leaves_nothing_behind() -> None:
    with mock_router_and_gateway() as stack:
        async with load_on(stack) as load:
            await load.run(pieces=WARM_UP_WORK)
        # The prober's connections are of the past when two looks agree.
        before = await stable(stack)
        connected = {name: connections(program) for name, program in stack.programs.items()}

        sizes: dict[str, list[int]] = {name: [] for name in stack.programs}
        async with load_on(stack) as load:
            sampler = asyncio.create_task(sample(stack.programs, sizes))
            await load.run(seconds=GROWTH_S)
            sampler.cancel()
            await asyncio.wait([sampler])
        after = await settled(stack, lambda held: all(fits(held[name], before[name]) for name in held))
        for name, program in stack.programs.items():
            if after[name] != before[name]:
                print(f"{name}: TCP before {connected[name]}, after {connections(program)}")

    print(f"\nseed {SEED}, {GROWTH_S:g} s: {sum(load.done.values())} pieces of work: {dict(load.done)}")
    growth = {name: growth_bytes(samples) for name, samples in sizes.items()}
    for name, samples in sizes.items():
        quarters = ", ".join(f"{level / 2**20:.2f}" for level in levels(samples))
        print(
            f"{name}: resident {quarters} MiB at each quarter, {growth[name] / 1024:+.0f} KiB in the second half,"
            f" at most {allowed_bytes(samples) / 1024:.0f}; {before[name]} before, {after[name]} after"
        )
    for name, samples in sizes.items():
        assert fits(after[name], before[name]), name
        assert growth[name] < allowed_bytes(samples), name


async def stable(stack: Stack) -> dict[str, Usage]:
    """What is held when two looks in a row agree."""
    last: dict[str, Usage] = {}

    def is_like_last(held: dict[str, Usage]) -> bool:
        nonlocal last
        last, before = held, last
        return held == before

    return await settled(stack, is_like_last)


def fits(after: Usage, before: Usage) -> bool:
    """No more of anything, but for one connection."""
    most = before._replace(descriptors=before.descriptors + MAX_LEFT, sockets=before.sockets + MAX_LEFT)
    return all(now <= then for now, then in zip(after, most, strict=True))


def levels(samples: list[int]) -> list[float]:
    """The size at the start, a quarter, half, three quarters and the end: medians of a tenth of the samples around."""
    width = max(1, len(samples) // 10)
    starts = (round(quarter / 4 * (len(samples) - width)) for quarter in range(5))
    return [statistics.median(samples[start : start + width]) for start in starts]


def growth_bytes(samples: list[int]) -> float:
    """From the middle to the end."""
    return levels(samples)[4] - levels(samples)[2]


def allowed_bytes(samples: list[int]) -> float:
    return MAX_GROWTH * statistics.median(samples) + MAX_GROWTH_BYTES
