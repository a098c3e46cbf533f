"""What can go wrong in the gateway: whose fault it is, and whether a retry can help.

Knows no HTTP numbers: those stand in one table, in `routes/problems.py`. A `Fault` is one agent's and leaves its
neighbours alone; a `GatewayError` refuses the whole request.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one agent has no output.

    `code` is a canonical gRPC name. `retry_after_s` (seconds) is set when the router named a time after which the
    same request may succeed.
    """

    code: str
    detail: str
    retry_after_s: float | None = None


class GatewayError(Exception):
    """The request as a whole cannot be answered; the text is for the client.

    `retry_after_s` (seconds) says when the same request may succeed; None: it will fail again.
    """

    retry_after_s: float | None = None

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class NotJsonError(GatewayError):
    """The client's: the body does not parse."""


class BodyTooLargeError(GatewayError):
    """The client's: the body is over `max_body_bytes`."""


class UnsupportedMediaError(GatewayError):
    """The client's: a content encoding, or a content type that is not JSON."""


class NotAcceptableError(GatewayError):
    """The client's: nothing that it accepts is served."""


class InvalidRequestError(GatewayError):
    """The client's: JSON, but not a request."""


class ClientGoneError(GatewayError):
    """The client has left; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__("the client closed the connection before the answer was ready")


class ShuttingDownError(GatewayError):
    """Ours: the drain's time is over. Another gateway, or this one after its restart, can answer."""

    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the gateway is shutting down and could not wait for the answer")
