"""One table: what an error of the router is called on the wire."""

import math

import grpc

from protos.inference_router.v1 import inference_router_pb2 as pb
from router.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    ModelFailed,
    NotFound,
    ResourceExhausted,
    RouterError,
    Unavailable,
    Unsupported,
)

CODES: dict[type[RouterError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Cancelled: grpc.StatusCode.CANCELLED,
    # The model's own failure: neither the caller's fault nor a bug of ours.
    ModelFailed: grpc.StatusCode.UNKNOWN,
    InternalError: grpc.StatusCode.INTERNAL,
}

# Half of what gRPC takes for all of a status' headers.
MAX_STATUS_BYTES = 4096
# gRPC clients whose retry policy lists the code wait this many milliseconds before they try again.
PUSHBACK_KEY = "grpc-retry-pushback-ms"


def status_of(error: RouterError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return CODES[type(error)]


def pushback_ms(error: RouterError) -> int | None:
    """Milliseconds to wait before a retry, rounded up; None where no time is known."""
    return None if error.retry_after_s is None else math.ceil(error.retry_after_s * 1000)


def to_proto(error: RouterError) -> pb.Error:
    """The error as a message of the native API."""
    return pb.Error(code=status_of(error).name, message=error.message, retry_pushback_ms=pushback_ms(error))


def status_text(message: str) -> str:
    """The message as far as it fits into a status: gRPC percent-encodes it, and a header over 8 KiB costs the call."""
    room = MAX_STATUS_BYTES
    for position, char in enumerate(message):
        room -= 1 if char.isascii() and char.isprintable() and char != "%" else 3 * len(char.encode())
        if room < 0:
            return message[:position]
    return message


def trailing_metadata(retry_pushback_ms: int | None) -> tuple[tuple[str, str], ...]:
    """What goes with a failed RPC."""
    return () if retry_pushback_ms is None else ((PUSHBACK_KEY, str(retry_pushback_ms)),)
