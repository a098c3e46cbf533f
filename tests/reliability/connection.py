"""A native stream by hand, for the ledger: `router_client` hides what must be counted, such as rows answered twice."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc.aio

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from tests.reliability.ledger import Call, Key, Ledger, Matrix

Stream: TypeAlias = "grpc.aio.StreamStreamCall[pb.PredictStreamRequest, pb.PredictStreamResponse]"
CALLS_PER_MESSAGE = 500
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
]


class Connection:
    """One native stream. One task writes all that is ready, one reads."""

    def __init__(self, ledger: Ledger, address: str) -> None:
        self.ledger = ledger
        self._address = address
        self._calls: deque[pb.Call] = deque()
        self._cancels: list[int] = []
        self._is_ready = asyncio.Event()

    def ask(
        self,
        key: Key,
        matrix: Matrix,
        *,
        timeout_s: float = 60.0,
        label: str = "",
        tenant: str = "",
        is_batch_class: bool = False,
        explain: bool = False,
    ) -> Call:
        """Send a call; its end is told by `call.ended`."""
        call = self.ledger.open_call(key, matrix, timeout_s, label)
        block = pb.Block(
            agent_type=key.agent_type,
            model_name=key.model_name,
            rows=len(matrix),
            dim=matrix.shape[1],
            vectors=matrix.tobytes(),
        )
        priority = pb.PRIORITY_CLASS_BATCH if is_batch_class else pb.PRIORITY_CLASS_INTERACTIVE
        self._calls.append(
            pb.Call(
                call_id=call.number,
                timeout_s=timeout_s,
                tenant=tenant,
                priority_class=priority,
                explain=explain,
                blocks=[block],
            )
        )
        self._is_ready.set()
        return call

    def cancel(self, call: Call) -> None:
        """Give up; a call that is over stays as it is."""
        if self.ledger.give_up(call):
            self._cancels.append(call.number)
            self._is_ready.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Connection"]:
        """Open for the length of a block."""
        async with grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel:
            stub: pb_grpc.InferenceRouterServiceAsyncStub = pb_grpc.InferenceRouterServiceStub(channel)
            stream = stub.PredictStream()
            tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                stream.cancel()

    async def _read(self, stream: Stream) -> None:
        async for response in stream:
            for answer in response.answers:
                self.ledger.take(answer)

    async def _write(self, stream: Stream) -> None:
        while True:
            await self._is_ready.wait()
            calls = list(itertools.islice(_drained(self._calls), CALLS_PER_MESSAGE))
            cancels, self._cancels = self._cancels, []
            if not self._calls:
                self._is_ready.clear()
            await stream.write(pb.PredictStreamRequest(calls=calls, cancels=cancels))


def _drained(calls: "deque[pb.Call]") -> Iterator[pb.Call]:
    while calls:
        yield calls.popleft()
