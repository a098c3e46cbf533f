"""What can go wrong with a call, and the answers the client makes up itself. Knows the wire's Error, no stream.

Whose fault, and can a retry help:

    UNAVAILABLE         nobody's here: no router, or its stream was lost; a retry can help
    DEADLINE_EXCEEDED   the caller's own time is over
    INVALID_ARGUMENT    the caller's: this call can never be sent
    INTERNAL            the router's: its answer does not fit the call (ProtocolError)
"""

from protos.inference_router.v1 import inference_router_pb2 as pb

RETRY_PUSHBACK_MS = 1000
"""A router restarts in a second or two, and this client looks for it every second."""


class ConnectError(Exception):
    """No router accepted a stream; the text says why. A later attempt can help."""


class ProtocolError(Exception):
    """An answer of the router does not fit its call. The call fails with INTERNAL, the stream goes on."""


def failure(code: str, message: str, *, retry_pushback_ms: int | None = None) -> pb.Answer:
    """Return the answer that fails every row of a call that is not answered yet."""
    return pb.Answer(error=pb.Error(code=code, message=message, retry_pushback_ms=retry_pushback_ms), done=True)


def unavailable(message: str) -> pb.Answer:
    """Return the failure of a call that found no router; nothing is known against trying again."""
    return failure("UNAVAILABLE", message, retry_pushback_ms=RETRY_PUSHBACK_MS)
