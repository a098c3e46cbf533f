"""The outermost layer of every request, as pure ASGI: request id, log line, metrics, and the net for the unexpected.

Not a BaseHTTPMiddleware: that would hide the client's disconnect from the routes.
"""

import logging
import re
import secrets
from time import perf_counter

from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rest_gateway.config import Settings
from rest_gateway.metrics import Metrics
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.problems import internal_problem
from rest_gateway.routes.record import Record, open_record

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"
ASSETS = "/docs-assets"
_ACCEPTED_ID = re.compile(rb"[ -~]{1,128}")
_CLOSE = (b"connection", b"close")


class AccessMiddleware:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics, open_requests: OpenRequests) -> None:
        self._app = app
        self._log_requests = settings.log_requests
        self._metrics = metrics
        self._open_requests = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; raises only cancellation."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = perf_counter()
        record = open_record(scope, _request_id(scope))
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._answer(scope, receive, send, record)
            finally:
                self._finish(scope, record, perf_counter() - started_s)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        is_started = False

        async def send_marked(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                record.status = message["status"]
                message["headers"] = [*message["headers"], *self._own_headers(record)]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:
            logger.exception("unexpected error request_id=%s", record.request_id)
            record.status = 500
            if not is_started:
                await internal_problem(scope)(scope, receive, send_marked)

    def _own_headers(self, record: Record) -> list[tuple[bytes, bytes]]:
        """The id; and while draining the wish that the client's next request goes to a connection elsewhere."""
        request_id = (b"x-request-id", record.request_id.encode("ascii"))
        return [request_id, _CLOSE] if self._open_requests.is_draining else [request_id]

    def _finish(self, scope: Scope, record: Record, duration_s: float) -> None:
        self._metrics.count_request(_route(scope), scope["method"], record.status, duration_s)
        if self._is_logged(record):
            _log(scope, record, duration_s)

    def _is_logged(self, record: Record) -> bool:
        has_failed = record.status >= 400 or record.failed_agents > 0
        return self._log_requests == "all" or (self._log_requests == "errors" and has_failed)


def _request_id(scope: Scope) -> str:
    """The client's own X-Request-Id when it is printable ASCII of at most 128 characters, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode("ascii") if _ACCEPTED_ID.fullmatch(value) else secrets.token_hex(16)
    return secrets.token_hex(16)


def _route(scope: Scope) -> str:
    """The template of the route that answered, whose values are few; never a path of which the client chose a part."""
    if "route" in scope:  # FastAPI's
        template: str = scope["route"].path
        return template
    endpoint = scope.get("endpoint")  # Starlette's
    if isinstance(endpoint, StaticFiles):
        return ASSETS
    return scope["path"] if endpoint is not None and not scope["path_params"] else UNMATCHED


def _log(scope: Scope, record: Record, duration_s: float) -> None:
    fields = {
        "method": scope["method"],
        "path": scope.get("raw_path", b"").decode("ascii", "backslashreplace"),
        "status": record.status,
        "duration_s": round(duration_s, 6),
        "agents": record.agents,
        "failed_agents": record.failed_agents,
        "request_id": record.request_id,
    }
    logger.info(
        "%(method)s %(path)s %(status)d in %(duration_s)f s agents=%(agents)d failed_agents=%(failed_agents)d "
        "request_id=%(request_id)s",
        fields,
        extra=fields,
    )
