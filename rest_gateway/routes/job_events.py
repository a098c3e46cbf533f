"""GET /jobs/{job_id}/events: a job's changes as server-sent events.

    id: 3
    event: completed
    data: {"job_id": "…", "status": "completed", …}

`id` is the job's version: who comes back with Last-Event-ID is told what came after it. Between events a comment every
15 s keeps the connection alive. The stream ends after the terminal state, and when the gateway is about to leave.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Response
from starlette.types import Receive, Scope, Send

from rest_gateway.errors import ClientGoneError, ShuttingDownError
from rest_gateway.jobs.records import Job, StoreError
from rest_gateway.routes.job_documents import document_of
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.negotiation import MEDIA_TYPES
from rest_gateway.routes.record import record_of
from rest_gateway.routes.streaming import STREAM_HEADERS
from rest_gateway.schemas import json_text

logger = logging.getLogger(__name__)

# Proxies cut what is silent for 30 to 60 s.
HEARTBEAT_S = 15.0
_HEARTBEAT = b": still here\n\n"
# A client that lost the stream comes back after this, in milliseconds.
_RETRY = b"retry: 1000\n\n"


class JobEvents(Response):
    """Sends each change as it comes."""

    def __init__(self, changes: AsyncGenerator[Job | None, None], open_requests: OpenRequests) -> None:
        # Not super().__init__: that renders a body and promises its length.
        self.status_code = 200
        self.media_type = MEDIA_TYPES["sse"]
        self.background = None
        self.init_headers(STREAM_HEADERS)
        self._changes = changes
        self._open_requests = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything; a client that leaves ends it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            with self._open_requests.open() as lifetime:
                lifetime.watch(receive)
                await self._send_changes(send)
        except ClientGoneError:
            record_of(scope).status = 499
            return
        except (ShuttingDownError, StoreError) as exc:  # the client comes back and sees
            logger.debug("a stream of events ends: %s", exc)
        except Exception:
            logger.exception("unexpected error request_id=%s", record_of(scope).request_id)
        await send({"type": "http.response.body", "body": b""})

    async def _send_changes(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": _RETRY, "more_body": True})
        async with aclosing(self._changes) as changes:
            async for job in changes:
                body = _HEARTBEAT if job is None else _event(job)
                await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(job: Job) -> bytes:
    data = json_text.dump_line(document_of(job))
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (job.version, job.status.encode("ascii"), data)


def read_last_event_id(text: str | None) -> int:
    """The version that the client has seen; 0 for none, or for what no stream of ours has sent."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 10 else 0
