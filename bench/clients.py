"""The ways to ask, each reduced to `ask(variant)`. A load process must not be what is measured, so requests are built
once, and an answer is looked at no closer than it takes to tell success from failure.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools
import numpy as np
import orjson
from grpc import aio

from bench.orders import Order
from bench.workloads import AGENT_TYPE, DIM, INPUT, TEXT, WORKLOADS, AgentRow, Workload
from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.open_inference import open_inference_pb2 as oip
from router_client import RouterClient

CONNECT_TIMEOUT_S = 30.0
PREDICT = "/inference_router.v1.InferenceRouterService/Predict"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


class AskError(Exception):
    """A request was not answered as it should be."""


class Client(Protocol):
    """Callers of one load process; `ask` raises for an answer that is not the expected one."""

    async def open(self) -> None: ...

    async def ask(self, variant: int) -> None: ...

    async def aclose(self) -> None: ...


class UnaryClient:
    """`Predict`, all callers on one channel. Bytes in and bytes out: protobuf's work is the server's alone."""

    def __init__(self, address: str, workload: Workload) -> None:
        self._channel = aio.insecure_channel(address, CHANNEL_OPTIONS)
        self._call: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(PREDICT)
        self._requests = [_predict_request(agents) for agents in workload.requests()]
        self._lengths: list[int] = []

    async def open(self) -> None:
        """Ask each variant once; a good answer has the same length ever after, an agent's error has another."""
        for request in self._requests:
            answer = await self._call(request, timeout=CONNECT_TIMEOUT_S, wait_for_ready=True)
            for name, result in pb.PredictResponse.FromString(answer).results.items():
                if result.HasField("error"):
                    raise AskError(f"{name}: {result.error.code}: {result.error.message}")
            self._lengths.append(len(answer))

    async def ask(self, variant: int) -> None:
        answer = await self._call(self._requests[variant])
        if len(answer) != self._lengths[variant]:
            raise AskError(f"an answer of {len(answer)} bytes instead of {self._lengths[variant]}")

    async def aclose(self) -> None:
        await self._channel.close()


class ModelInferClient:
    """`ModelInfer` of the Open Inference Protocol with one row, all callers on one channel, bytes in and bytes out."""

    def __init__(self, address: str, workload: Workload, model_name: str) -> None:
        self._channel = aio.insecure_channel(address, CHANNEL_OPTIONS)
        self._call: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(MODEL_INFER)
        self._requests = [_model_infer_request(model_name, agents) for agents in workload.requests()]
        self._lengths: list[int] = []

    async def open(self) -> None:
        """Ask each variant once; a good answer has the same length ever after."""
        for request in self._requests:
            answer = await self._call(request, timeout=CONNECT_TIMEOUT_S, wait_for_ready=True)
            self._lengths.append(len(answer))

    async def ask(self, variant: int) -> None:
        answer = await self._call(self._requests[variant])
        if len(answer) != self._lengths[variant]:
            raise AskError(f"an answer of {len(answer)} bytes instead of {self._lengths[variant]}")

    async def aclose(self) -> None:
        await self._channel.close()


class StreamClient:
    """`RouterClient.infer`, all callers on one native stream."""

    def __init__(self, address: str, workload: Workload) -> None:
        self._client = RouterClient(address)
        self._requests = [_blocks(agents) for agents in workload.requests()]

    async def open(self) -> None:
        if not await self._client.wait_connected(CONNECT_TIMEOUT_S):
            raise AskError("no router")

    async def ask(self, variant: int) -> None:
        for answer in await self._client.infer(self._requests[variant]):
            if answer.HasField("error"):
                raise AskError(f"{answer.error.code}: {answer.error.message}")

    async def aclose(self) -> None:
        await self._client.aclose()


class HttpClient:
    """`POST` over HTTP/1.1, one kept-alive connection per caller (httpx would cost 1 ms per request)."""

    def __init__(self, address: str, bodies: Sequence[bytes], *, status: int, path: str = "/predict") -> None:
        self._host, self._port = _host_and_port(address)
        self._requests = [_http_request(address, path, body) for body in bodies]
        self._status = status
        self._idle: list[_Connection] = []
        self._all: list[_Connection] = []

    async def open(self) -> None:
        for variant in range(len(self._requests)):
            await self.ask(variant)

    async def ask(self, variant: int) -> None:
        connection = self._idle.pop() if self._idle else await self._connect()
        status, length = await connection.exchange(self._requests[variant])
        self._idle.append(connection)  # one that failed is dropped
        if status != self._status:
            raise AskError(f"HTTP {status}")
        self._check_length(variant, length)

    def _check_length(self, variant: int, length: int) -> None:
        """Raises AskError for an answer whose length tells that it is another one."""

    async def aclose(self) -> None:
        for connection in self._all:
            connection.close()

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        self._all.append(connection)
        return connection


class RestClient(HttpClient):
    """Agents that wait for their answers: a good one has the same length ever after."""

    def __init__(self, address: str, workload: Workload) -> None:
        super().__init__(address, [_agents_body(agents) for agents in workload.requests()], status=200)
        self._lengths: dict[int, int] = {}

    def _check_length(self, variant: int, length: int) -> None:
        expected = self._lengths.setdefault(variant, length)
        if length != expected:
            raise AskError(f"an answer of {length} bytes instead of {expected}")


class RestInferClient(HttpClient):
    """The Open Inference Protocol in JSON, one row; ids in the answers may differ in length."""

    def __init__(self, address: str, workload: Workload, model_name: str) -> None:
        bodies = [_infer_body(agents) for agents in workload.requests()]
        super().__init__(address, bodies, status=200, path=f"/v2/models/{model_name}/infer")


class SubmitClient(HttpClient):
    """Texts, each kept as a job when its answer comes."""

    def __init__(self, address: str) -> None:
        super().__init__(address, [orjson.dumps({"text": TEXT})], status=202)


class _Connection(asyncio.Protocol):
    """A connection with at most one request on its way; llhttp reads the answers."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._length = 0
        self._answer: asyncio.Future[tuple[int, int]] | None = None

    async def exchange(self, request: bytes) -> tuple[int, int]:
        """The status and the body's length."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise AskError("the gateway closed a connection")
        self._length = 0
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(AskError(f"the gateway closed a connection: {exc}"))

    def on_body(self, body: bytes) -> None:
        self._length += len(body)

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._length))


WAYS: dict[str, type[UnaryClient] | type[StreamClient] | type[RestClient]] = {
    "unary": UnaryClient,
    "stream": StreamClient,
    "rest": RestClient,
}
INFER_WAYS: dict[str, type[ModelInferClient] | type[RestInferClient]] = {
    "infer": ModelInferClient,
    "rest-infer": RestInferClient,
}


def make_client(order: Order) -> Client:
    """The callers that an order asks for."""
    if order.way == "submit":
        return SubmitClient(order.address)
    if order.way == "store":
        # The store's own modules, of which the other load processes need to know nothing.
        from bench.store_clients import STORE_CLIENTS  # noqa: PLC0415

        return STORE_CLIENTS[order.workload](order)
    workload = WORKLOADS[order.workload]
    assert isinstance(workload, Workload)
    if order.way in INFER_WAYS:
        return INFER_WAYS[order.way](order.address, workload, order.model_name)
    return WAYS[order.way](order.address, workload)


def _predict_request(agents: list[AgentRow]) -> bytes:
    return pb.PredictRequest(
        agents={
            agent.name: pb.Agent(agent_type=AGENT_TYPE, model_name=agent.model_name, vector=agent.vector)
            for agent in agents
        }
    ).SerializeToString()


def _model_infer_request(model_name: str, agents: list[AgentRow]) -> bytes:
    tensor = oip.ModelInferRequest.InferInputTensor(name=INPUT, datatype="FP32", shape=[len(agents), DIM])
    rows = np.array([agent.vector for agent in agents], "<f4").tobytes()
    return oip.ModelInferRequest(model_name=model_name, inputs=[tensor], raw_input_contents=[rows]).SerializeToString()


def _infer_body(agents: list[AgentRow]) -> bytes:
    rows = [agent.vector for agent in agents]
    return orjson.dumps({"inputs": [{"name": INPUT, "datatype": "FP32", "shape": [len(rows), DIM], "data": rows}]})


def _blocks(agents: list[AgentRow]) -> list[pb.Block]:
    rows = defaultdict(list)
    for agent in agents:
        rows[agent.model_name].append(agent.vector)
    return [
        pb.Block(
            agent_type=AGENT_TYPE,
            model_name=model_name,
            rows=len(vectors),
            dim=len(vectors[0]),
            vectors=np.array(vectors, "<f4").tobytes(),
        )
        for model_name, vectors in rows.items()
    ]


def _agents_body(agents: list[AgentRow]) -> bytes:
    return orjson.dumps(
        {
            "agents": {
                agent.name: {"vector": agent.vector, "model_name": agent.model_name, "agent_type": AGENT_TYPE}
                for agent in agents
            }
        }
    )


def _http_request(address: str, path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(f"//{address}")
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
