"""What can go wrong, the exceptions of the clients, and the answers that RouterClient makes up itself.

Knows the wire's Error, no stream and no HTTP library. Whose fault, and can a retry help:

    InvalidArgument     the caller's: the same request fails again
    NotFound            the caller's: no such model or job
    Aborted             the caller's: the job's state does not allow it
    Unauthenticated, PermissionDenied, Unimplemented
                        the caller's, or of whoever runs the server
    DeadlineExceeded    the caller's time was over first; a retry needs more of it. A TimeoutError, too
    ResourceExhausted   too much at once; a retry helps after `retry_after_s`
    Unavailable         nobody is there, or is leaving, or was lost; a retry can help
    ModelFailed         the model refused the row or answered nonsense
    JobFailed           the job ended as failed or cancelled (in jobs.py)
    Internal            a bug of a server, or an answer that does not fit its call (ProtocolError)
"""

from collections.abc import Mapping
from dataclasses import dataclass

from protos.inference_router.v1 import inference_router_pb2 as pb

RETRY_PUSHBACK_MS = 1000
"""A router restarts in a second or two, and this client looks for it every second."""


@dataclass(frozen=True, slots=True)
class AgentError:
    """Why an agent failed: a canonical gRPC code by name, a text, and when a retry may succeed, if that is known."""

    code: str
    message: str
    retry_pushback_ms: int | None = None


class ConnectError(Exception):
    """No router accepted a stream; the text says why. A later attempt can help."""


class ProtocolError(Exception):
    """An answer of the router does not fit its call. The call fails with INTERNAL, the stream goes on."""


class RouterError(Exception):
    """A request that has no answer; what AsyncClient and Client raise. Catch a subclass, or this for all of them.

    ``code`` is a canonical gRPC code by name and ``message`` a text for people. ``retry_after_s``: seconds after which
    a retry may succeed, None where nobody named a time. ``agents``: why each agent failed, by name, where a request
    with agents has failed in all of them or was asked to raise for any.
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after_s: float | None = None,
        agents: Mapping[str, AgentError] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.retry_after_s = retry_after_s
        self.agents = dict(agents or {})

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InvalidArgument(RouterError):
    """The caller's fault; the same request fails again."""

    code = "INVALID_ARGUMENT"


class NotFound(RouterError):
    """There is no such model or job."""

    code = "NOT_FOUND"


class Aborted(RouterError):
    """The job's state does not allow it: cancel of one that has ended, delete of one that has not."""

    code = "ABORTED"


class Unauthenticated(RouterError):
    """Who asks is not known; of a proxy in front, usually."""

    code = "UNAUTHENTICATED"


class PermissionDenied(RouterError):
    """Who asks may not."""

    code = "PERMISSION_DENIED"


class Unimplemented(RouterError):
    """The server does not know the method."""

    code = "UNIMPLEMENTED"


class DeadlineExceeded(RouterError, TimeoutError):
    """The caller's time was over first. What was under way is cancelled, but for a job, which goes on."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(RouterError):
    """Too much waits already; a retry after ``retry_after_s`` may succeed."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(RouterError):
    """Nobody is there, is leaving, or was lost on the way; a later retry may succeed."""

    code = "UNAVAILABLE"


class ModelFailed(RouterError):
    """The model refused the row, or its server failed; the text is the model's own."""


class Internal(RouterError):
    """A bug of the router or the gateway; its log tells more."""

    code = "INTERNAL"


_ERRORS: dict[str, type[RouterError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        Aborted,
        Unauthenticated,
        PermissionDenied,
        Unimplemented,
        DeadlineExceeded,
        ResourceExhausted,
        Unavailable,
        Internal,
        ModelFailed,
    )
}


def error_of(
    code: str,
    message: str,
    *,
    retry_after_s: float | None = None,
    agents: Mapping[str, AgentError] | None = None,
) -> RouterError:
    """Return the exception for a canonical code; one that is not in the tree is the plain RouterError."""
    return _ERRORS.get(code, RouterError)(message, code=code, retry_after_s=retry_after_s, agents=agents)


def failure(code: str, message: str, *, retry_pushback_ms: int | None = None) -> pb.Answer:
    """Return the answer that fails every row of a call that is not answered yet."""
    return pb.Answer(error=pb.Error(code=code, message=message, retry_pushback_ms=retry_pushback_ms), done=True)


def unavailable(message: str) -> pb.Answer:
    """Return the failure of a call that found no router; nothing is known against trying again."""
    return failure("UNAVAILABLE", message, retry_pushback_ms=RETRY_PUSHBACK_MS)
