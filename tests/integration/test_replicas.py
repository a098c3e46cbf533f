"""Probes and lost batches with real servers: those that never answer, know no probes, are not ready, or are busy."""

import asyncio
import functools
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.core.types import BatchAnswer
from router.dispatch.pool import ReplicaPool, Rules
from router.dispatch.replica import Replica
from router.errors import StreamLost
from tests.unit.router.dispatch.client import Key

pytestmark = pytest.mark.anyio

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

PATIENCE_S = 30.0
# Misses come after 0.3 s each.
INTERVAL_S = 0.4


def reply(request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
    """Zeros for every row."""
    rows = request.inputs[0].shape[0]
    response = pb.ModelInferResponse(id=request.id, raw_output_contents=[np.zeros(rows, "<f4").tobytes()])
    response.outputs.add(name="output", datatype="FP32", shape=[rows])
    return pb.ModelStreamInferResponse(infer_response=response)


def handlers(model: "Model | SyncModel") -> grpc.GenericRpcHandler:
    """The three methods that a pool calls."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerLive": grpc.unary_unary_rpc_method_handler(
            model.live, pb.ServerLiveRequest.FromString, pb.ServerLiveResponse.SerializeToString
        ),
        "ServerReady": grpc.unary_unary_rpc_method_handler(
            model.ready, pb.ServerReadyRequest.FromString, pb.ServerReadyResponse.SerializeToString
        ),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            model.infer, pb.ModelInferRequest.FromString, pb.ModelStreamInferResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)


class Model:
    """A model server that answers probes and batches when the test lets it."""

    def __init__(self) -> None:
        self.probes = 0
        self.batches = 0
        self.lost_batches = 0
        self.is_ready = True
        self.knows_probes = True
        self.may_answer_probes = asyncio.Event()
        self.may_answer_probes.set()
        self.may_answer_batches = asyncio.Event()
        self.may_answer_batches.set()
        self.address = ""

    async def live(self, _request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        self.probes += 1
        await self.may_answer_probes.wait()
        if not self.knows_probes:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what?")
        return pb.ServerLiveResponse(live=True)

    async def ready(self, _request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        if not self.knows_probes:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what?")
        return pb.ServerReadyResponse(ready=self.is_ready)

    async def infer(
        self, requests: AsyncIterator[pb.ModelInferRequest], _context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async for request in requests:
            self.batches += 1
            try:
                await self.may_answer_batches.wait()
            except asyncio.CancelledError:
                self.lost_batches += 1
                raise
            yield reply(request)


@asynccontextmanager
async def pool_of(*models: Model) -> AsyncIterator[tuple[ReplicaPool, Key]]:
    """A pool connected to servers of these models, and a key that sends batches."""
    servers = []
    for model in models:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((handlers(model),))
        model.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)
    try:
        async with connected(*(model.address for model in models)) as (pool, key):
            yield pool, key
    finally:
        await asyncio.gather(*(server.stop(None) for server in servers))


@asynccontextmanager
async def connected(*addresses: str) -> AsyncIterator[tuple[ReplicaPool, Key]]:
    connect = functools.partial(Replica, batch_timeout_s=60.0, max_message_bytes=2**20, max_in_flight=100)
    rules = Rules(max_in_flight=1, ejection_s=30, probe_interval_s=INTERVAL_S, batch_timeout_s=60, resolve_interval_s=5)
    pool = ReplicaPool(connect, addresses, rules)
    pool.start()
    try:
        await until(lambda: pool.count_ready() == len(addresses))
        yield pool, Key(pool)
    finally:
        await pool.aclose()


async def until(condition: Callable[[], bool]) -> None:
    """There is no event of all that is waited for here."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def kinds(key: Key) -> list[str]:
    return ["answer" if isinstance(end, BatchAnswer) else type(end).__name__ for end in key.ends]


async def test_an_idle_server_that_never_answers_gets_no_batch_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    mute, other = Model(), Model()
    mute.may_answer_probes.clear()
    async with pool_of(mute, other) as (_, key):
        caplog.set_level("INFO")
        await until(lambda: f"{mute.address} gives no sign of life" in caplog.text)
        await key.exchange(4)
        assert (mute.batches, other.batches) == (0, 4)
        mute.may_answer_probes.set()
        await until(lambda: f"{mute.address} answers again" in caplog.text)
        await key.exchange(1)
        assert (mute.batches, other.batches) == (1, 4)


async def test_a_server_that_cannot_be_reached_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        replica = Replica(address, batch_timeout_s=60.0, max_message_bytes=2**20, max_in_flight=100)
        replica.start(lambda: None)
        complaint = f"backend {address} cannot be reached, trying on"
        await until(lambda: complaint in caplog.text)
        taken.listen()
        taken.setblocking(False)
        loop = asyncio.get_running_loop()
        peer, _ = await asyncio.wait_for(loop.sock_accept(taken), PATIENCE_S)
        peer.close()  # that was an attempt more, and one that failed again
        await replica.aclose()
    assert caplog.text.count(complaint) == 1


async def test_a_server_without_the_probes_is_alive(caplog: pytest.LogCaptureFixture) -> None:
    foreign = Model()
    foreign.knows_probes = False
    async with pool_of(foreign) as (_, key):
        await until(lambda: foreign.probes >= 4)
        await key.exchange(1)
        assert kinds(key) == ["answer"]
        assert "sign of life" not in caplog.text


async def test_a_server_that_is_not_ready_gets_batches_while_no_other_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    unready, other = Model(), Model()
    unready.is_ready = False
    async with pool_of(unready, other) as (_, key):
        await until(lambda: f"{unready.address} says that it is not ready" in caplog.text)
        await key.exchange(4)
        assert (unready.batches, other.batches) == (0, 4)
        other.is_ready = False
        await until(lambda: f"{other.address} says that it is not ready" in caplog.text)
        key.send(2)
        await key.wait()
        assert (unready.batches, other.batches) == (1, 5)


async def test_a_server_that_answers_no_probe_while_it_computes_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    busy = Model()
    async with pool_of(busy) as (_, key):
        key.learn([busy.address], 5.0)
        busy.may_answer_batches.clear()
        busy.may_answer_probes.clear()
        key.send()
        asked = busy.probes
        await until(lambda: busy.probes >= asked + 4)
        busy.may_answer_batches.set()
        busy.may_answer_probes.set()
        await key.wait()
        assert kinds(key) == ["answer"]
        assert "sign of life" not in caplog.text


async def test_a_frozen_server_loses_its_batch_and_its_late_answer_is_never_read() -> None:
    frozen, other = Model(), Model()
    async with pool_of(frozen, other) as (_, key):
        key.learn([frozen.address, other.address], 0.05)
        frozen.may_answer_batches.clear()
        frozen.may_answer_probes.clear()
        key.send()
        await until(lambda: len(key.ends) == 1)
        (lost,) = key.ends
        assert isinstance(lost, StreamLost)
        assert "gave no sign of life" in str(lost)
        await until(lambda: frozen.lost_batches == 1)
        await key.exchange(3)
        assert (frozen.batches, other.batches) == (1, 3)
        assert kinds(key) == ["StreamLost", "answer", "answer", "answer"]


class SyncModel:
    """A model server of threads: each stream keeps one for as long as it is open."""

    def live(self, _request: pb.ServerLiveRequest, _context: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def ready(self, _request: pb.ServerReadyRequest, _context: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=True)

    def infer(
        self, requests: Iterator[pb.ModelInferRequest], _context: object
    ) -> Iterator[pb.ModelStreamInferResponse]:
        return map(reply, requests)


async def test_a_server_whose_threads_all_have_a_stream_is_not_taken_for_dead(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((handlers(SyncModel()),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        async with connected(address) as (_, key):
            for _ in range(3):
                await key.exchange(1)
                await asyncio.sleep(4 * INTERVAL_S)  # with its only thread at an idle stream of ours, at first
            assert kinds(key) == ["answer"] * 3
            assert "sign of life" not in caplog.text
    finally:
        server.stop(None).wait()
