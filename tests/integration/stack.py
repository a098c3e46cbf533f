"""A router with its mock backends, in this process, on free ports of the loopback."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio
import numpy as np

from mock_nn.config import Fault, LatencyRange, MockConfig
from mock_nn.models import expected
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from router.config import Settings
from router.server import RouterServer

Stub: TypeAlias = "pb_grpc.InferenceRouterServiceAsyncStub"


class Gate:
    """Holds the batches of its mocks until the test says so; `entered` once there is one."""

    def __init__(self) -> None:
        self._is_open = asyncio.Event()
        self.entered = asyncio.Event()

    async def sleep(self, _seconds: float) -> None:
        self.entered.set()
        await self._is_open.wait()

    def mock(self) -> MockServer:
        return MockServer(mock_config(latency_s=1.0), sleep=self.sleep)

    def open(self) -> None:
        self._is_open.set()


def mock_config(
    *faults: Fault, latency_s: float = 0.0, listen: str = "127.0.0.1:0", output_width: int = 0
) -> MockConfig:
    latency = LatencyRange(latency_s, latency_s)
    return MockConfig(
        listen=listen,
        latency=latency,
        model_latencies={},  # the text model is as fast as the others
        faults=faults,
        is_quiet=True,
        output_width=output_width,
    )


def router_settings(
    addresses: Sequence[str],
    model: Mapping[str, object] | None = None,
    *,
    max_in_flight: int = 4,
    **changes: object,
) -> Settings:
    """`protocol` among the changes is the backend's."""
    protocol = changes.pop("protocol", "stream")
    given: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "metrics": None,
        "drain_delay_s": 0.0,
        "log_requests": "off",
        "backends": {"mock": {"addresses": list(addresses), "max_in_flight": max_in_flight, "protocol": protocol}},
        "models": [{"backend": "mock", **(model or {})}],
    }
    return Settings(**{**given, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Stack:
    """What a test needs of it."""

    mocks: Sequence[MockServer]
    router: RouterServer
    stub: Stub

    @property
    def mock(self) -> MockServer:
        (mock,) = self.mocks
        return mock

    def count(self, name: str, **labels: str) -> float:
        return self.router.metrics.registry.get_sample_value(name, labels) or 0.0

    async def until_queued(self, rows: int) -> None:
        """Return when exactly so many rows wait in the router."""
        await self.until_gauge("router_queued_rows", rows)

    async def until_gauge(self, name: str, value: float) -> None:
        """Return when a gauge of the router has a value; what brings it there has no event to wait for."""
        async with asyncio.timeout(10):
            while self.count(name) != value:  # noqa: ASYNC110
                await asyncio.sleep(0)


@asynccontextmanager
async def serving(
    *mocks: MockServer,
    model: Mapping[str, object] | None = None,
    max_in_flight: int = 4,
    **changes: object,
) -> AsyncIterator[Stack]:
    """A router in front of the mocks (by default one without latency), all stopped at the end."""
    mocks = mocks or (MockServer(mock_config()),)
    async with AsyncExitStack() as stack:
        for mock in mocks:
            await mock.start()
            stack.push_async_callback(mock.stop)
        addresses = [mock.address for mock in mocks]
        settings = router_settings(addresses, model, max_in_flight=max_in_flight, **changes)
        router = RouterServer(settings)
        await router.start()
        stack.push_async_callback(router.stop)
        channel = await stack.enter_async_context(open_channel(router.address))
        yield Stack(mocks, router, pb_grpc.InferenceRouterServiceStub(channel))


def open_channel(address: str) -> grpc.aio.Channel:
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(address, options=[*options, ("grpc.max_send_message_length", -1)])


def block(model: str, rows: Sequence[Sequence[float]], agent_type: str = "a") -> pb.Block:
    matrix = np.array(rows, "<f4")
    return pb.Block(
        agent_type=agent_type, model_name=model, rows=len(rows), dim=matrix.shape[1], vectors=matrix.tobytes()
    )


def truth(model: str, rows: Sequence[Sequence[float]], agent_type: str = "a") -> list[float]:
    """The mock's answers."""
    return [float(value) for value in expected(model, agent_type, np.array(rows, "<f4"))]


def floats(data: bytes) -> list[float]:
    return [float(value) for value in np.frombuffer(data, "<f4")]


class Stream:
    """A PredictStream held by a test."""

    def __init__(self, stub: Stub, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self.call = stub.PredictStream(metadata=metadata)
        self._ready: list[pb.Answer] = []
        self.messages: list[pb.PredictStreamResponse] = []

    async def send(self, *calls: pb.Call, cancels: Sequence[int] = ()) -> None:
        await self.call.write(pb.PredictStreamRequest(calls=calls, cancels=cancels))

    async def answer(self) -> pb.Answer:
        """The next answer."""
        while not self._ready:
            message = await self.message()
            assert message is not None, "the stream has ended"
            self._ready += message.answers
        return self._ready.pop(0)

    async def answers(self, calls: int) -> list[pb.Answer]:
        """Answers until so many calls are done."""
        found: list[pb.Answer] = []
        while sum(answer.done for answer in found) < calls:
            found.append(await self.answer())
        return found

    async def message(self) -> pb.PredictStreamResponse | None:
        """The next message; None at the end."""
        message = await self.call.read()
        if not isinstance(message, pb.PredictStreamResponse):
            return None
        self.messages.append(message)
        return message

    async def close(self) -> grpc.StatusCode:
        """Half-close and read to the end."""
        await self.call.done_writing()
        while await self.message() is not None:
            pass
        return await self.call.code()
