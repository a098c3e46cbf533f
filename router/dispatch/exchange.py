"""Exchanges: the ways of a batch to a server and of its answer back.

A stream carries one batch at a time, so no answer can be taken for another's and no batch waits behind another.
Whatever goes wrong on a stream ends that stream only.
"""

import asyncio
import logging
import re
from collections import deque
from typing import NoReturn

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router.core.answer import model_text
from router.dispatch.wire import translate, translate_status
from router.errors import BackendError, Malformed, Refused, StreamLost

logger = logging.getLogger(__name__)

# Ids of the batches a stream carried last: an answer that repeats one of them is late or double and is passed over.
REMEMBERED_IDS = 16

_REQUEST_ID = re.compile(r"^\[request id: (?P<id>[^\]]*)\] ?")

StreamCall = grpc.aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]


class Stream:
    """One ModelStreamInfer call; one exchange at a time."""

    def __init__(self, call: StreamCall, address: str) -> None:
        self._call = call
        self._address = address
        self._carried: deque[str] = deque(maxlen=REMEMBERED_IDS)
        self.idle_since = 0.0

    @property
    def is_over(self) -> bool:
        return self._call.done()

    def close(self) -> None:
        """A dropped call is never collected (grpc/grpc#43462), a cancelled one is."""
        self._call.cancel()

    async def exchange(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Write a batch, read its answer. After an error the stream is of no more use."""
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            await self._raise_lost_write(error)
        try:
            response = await self._read_own(request.id)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self._address) from error
        self._carried.append(request.id)
        return response

    async def _raise_lost_write(self, error: Exception) -> NoReturn:
        """The server ended the stream before or while we wrote: its status tells why, if it gave one.

        A write that races with the peer's death fails with INTERNAL, which is a loss too.
        """
        code = await self._call.code()
        if code in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL):
            raise StreamLost(f"stream to {self._address} lost while writing") from error
        raise translate_status(code, await self._call.details(), self._address) from error

    async def _read_own(self, batch_id: str) -> pb.ModelInferResponse:
        while True:
            message = await self._call.read()
            if not isinstance(message, pb.ModelStreamInferResponse):
                raise await self._ended()
            answered = _answered_id(message)
            if answered in self._carried:
                logger.warning("backend %s repeated its answer to batch %s; passed over", self._address, answered)
            elif message.error_message and answered in ("", batch_id):
                raise Refused(model_text(_REQUEST_ID.sub("", message.error_message)))
            elif answered != batch_id:
                raise Malformed(f"{self._address} answered batch {answered!r} when asked for {batch_id!r}")
            else:
                return message.infer_response

    async def _ended(self) -> BackendError:
        """The server closed the stream without an answer; OK is no answer either."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return StreamLost(f"{self._address} closed the stream without an answer")
        return translate_status(code, await self._call.details(), self._address)


def _answered_id(message: pb.ModelStreamInferResponse) -> str:
    match = _REQUEST_ID.match(message.error_message)
    return match["id"] if match else message.infer_response.id
