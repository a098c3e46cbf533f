"""What the unary methods of both services share: requests that cannot be read, ends by an error, who is still here."""

import asyncio
import itertools
import uuid
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from protos.inference_router.v1 import inference_router_pb2 as pb
from router.servicers.status import status_text, trailing_metadata

REQUEST_ID_KEY = "x-request-id"

Context = grpc.aio.ServicerContext[Any, Any]


class Readable(Protocol):
    """A class of messages."""

    @classmethod
    def FromString(cls, s: bytes) -> Self:  # noqa: N802 (protobuf's name)
        """Raises DecodeError."""


Message = TypeVar("Message", bound=Readable)


class Unreadable:
    """Stands for bytes that are no request; gRPC would take an error here for the service's own: UNKNOWN."""


def reader(message: type[Message]) -> Callable[[bytes], Message | Unreadable]:
    """What gRPC deserialises requests with."""

    def read(data: bytes) -> Message | Unreadable:
        try:
            return message.FromString(data)
        except DecodeError:
            return Unreadable()

    return read


class Rpcs:
    """The RPCs of a server that have not ended."""

    def __init__(self) -> None:
        # State: RPCs by number, and what wakes those who wait for their end.
        self._open: set[int] = set()
        self._numbers = itertools.count()
        self._has_ended = asyncio.Event()

    def watch(self, context: Context) -> None:
        """Know of the RPC until it has ended, which is after its handler: gRPC has yet to send what that returned."""
        number = next(self._numbers)

        def ended(_: object) -> None:
            self._open.discard(number)
            self._has_ended.set()

        self._open.add(number)
        context.add_done_callback(ended)  # type: ignore[arg-type]  # the stubs want a class that exists in none

    async def wait_until_answered(self) -> None:
        """Return when every RPC that is open now has ended: its answers are handed to the kernel, not only computed."""
        rpcs = self._open.copy()
        while not rpcs.isdisjoint(self._open):
            self._has_ended.clear()
            await self._has_ended.wait()


async def abort(context: Context, error: pb.Error, *more_metadata: tuple[str, str]) -> NoReturn:
    """End an RPC by an error."""
    pushback = error.retry_pushback_ms if error.HasField("retry_pushback_ms") else None
    metadata = (*trailing_metadata(pushback), *more_metadata)
    await context.abort(grpc.StatusCode[error.code], status_text(error.message), metadata)
    raise AssertionError("abort() returned: this is a bug")


def seconds_left(context: Context) -> float | None:
    """Until the RPC's deadline; None without one, which the stubs do not know."""
    return context.time_remaining()


def request_id(context: Context, told: str = "") -> str:
    """The caller's x-request-id, else what its message tells, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value
    return told or uuid.uuid4().hex
