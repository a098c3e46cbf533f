"""Answers that begin before they are complete: server-sent events and newline-delimited JSON.

The status is 200 as soon as the body stands, so whatever happens to an agent is an event, and every agent has exactly
one; `done` follows the last. A stream that ends without `done` was cut.
"""

import logging
from collections.abc import Callable
from contextlib import aclosing

from fastapi import Response
from starlette.types import Receive, Scope, Send

from rest_gateway.convert import Outcome
from rest_gateway.errors import ClientGoneError, Fault, ShuttingDownError
from rest_gateway.routes import problems
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.negotiation import MEDIA_TYPES, Form
from rest_gateway.routes.prediction import Prediction, Settled
from rest_gateway.routes.record import record_of
from rest_gateway.schemas import json_text

logger = logging.getLogger(__name__)

# Nobody on the way may keep the stream or hold it back; the second header is nginx's.
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_DONE: dict[str, object] = {"done": True}


class StreamedAnswer(Response):
    """Sends each outcome as it comes, one write for all that came together."""

    def __init__(self, prediction: Prediction, form: Form, open_requests: OpenRequests) -> None:
        # Not super().__init__: that renders a body and promises its length.
        self.status_code = 200
        self.media_type = MEDIA_TYPES[form]
        self.background = None
        self.init_headers(STREAM_HEADERS)
        self._prediction = prediction
        self._encode = _ENCODERS[form]
        self._open_requests = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything. A client that leaves ends it, and cancels the call at the router."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            rest = await self._send_while_open(scope, receive, send)
        except ClientGoneError:
            record_of(scope).status = 499
            return
        await send({"type": "http.response.body", "body": self._events(rest) + self._encode("done", _DONE)})

    async def _send_while_open(self, scope: Scope, receive: Receive, send: Send) -> Settled:
        """Sends what the router answers; returns the outcomes of those whom it will not answer any more."""
        try:
            with self._open_requests.open() as lifetime:
                lifetime.watch(receive)
                await self._send_outcomes(send)
        except ClientGoneError:
            raise
        except ShuttingDownError as exc:
            return self._prediction.fail_rest(Fault("UNAVAILABLE", exc.detail, exc.retry_after_s))
        except Exception:
            logger.exception("unexpected error request_id=%s", record_of(scope).request_id)
            return self._prediction.fail_rest(Fault("INTERNAL", "see the traceback before"))
        return []

    async def _send_outcomes(self, send: Send) -> None:
        async with aclosing(self._prediction.stream()) as settlements:
            async for settled in settlements:
                if settled:
                    await send({"type": "http.response.body", "body": self._events(settled), "more_body": True})

    def _events(self, settled: Settled) -> bytes:
        return b"".join([self._encode(*_event(name, outcome)) for name, outcome in settled])


def _event(name: str, outcome: Outcome) -> tuple[str, dict[str, object]]:
    if isinstance(outcome, Fault):
        return "error", {"agent": name, "error": problems.agent_error(outcome)}
    return "result", {"agent": name, **outcome}


def _sse(event: str, document: dict[str, object]) -> bytes:
    """JSON has no raw line breaks, so one data line holds it."""
    return b"event: %b\ndata: %b\n\n" % (event.encode("ascii"), json_text.dump_line(document))


def _ndjson(_event: str, document: dict[str, object]) -> bytes:
    """The members tell the event."""
    return json_text.dump_line(document) + b"\n"


_ENCODERS: dict[Form, Callable[[str, dict[str, object]], bytes]] = {"sse": _sse, "ndjson": _ndjson}
