"""Errors on the wire: RFC 9457 problem documents, and the one table that maps codes to HTTP."""

import logging
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from rest_gateway import errors
from rest_gateway.errors import Fault, GatewayError
from rest_gateway.jobs.records import JobNotFound, KeyReused, StoreError, StoreUnavailable, TooManyJobs, WrongState
from rest_gateway.routes.record import record_of
from rest_gateway.schemas import json_text

logger = logging.getLogger(__name__)

# Canonical gRPC codes to HTTP. A code that is missing here is the backend's: UNKNOWN.
STATUS_OF_CODE = {
    "INVALID_ARGUMENT": 422,
    "NOT_FOUND": 404,
    "DEADLINE_EXCEEDED": 504,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "CANCELLED": 499,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "ABORTED": 409,
    "UNKNOWN": 502,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
}
STATUS_OF_ERROR: dict[type[GatewayError], int] = {
    errors.NotJsonError: 400,
    errors.NotAcceptableError: 406,
    errors.BodyTooLargeError: 413,
    errors.UnsupportedMediaError: 415,
    errors.InvalidRequestError: 422,
    errors.ClientGoneError: 499,
    errors.ShuttingDownError: 503,
}
# What the store of jobs says, in the words of its clients. {} is its own text; what is fixed hides the database's.
STORE_ERRORS: tuple[tuple[type[StoreError], int, str], ...] = (
    (JobNotFound, 404, "there is no such job"),
    (WrongState, 409, "{}"),
    (KeyReused, 422, "this Idempotency-Key belongs to a job with another body"),
    (TooManyJobs, 429, "too many jobs wait"),
    (StoreUnavailable, 503, "the database of the jobs is away"),
)
STORE_RETRY_AFTER_S = 2.0
# When all agents failed, and not all alike, the first of these that is present speaks for the request.
PRECEDENCE = (500, 503, 502, 504, 501, 429, 409, 403, 401, 404, 422, 499)

INTERNAL_DETAIL = "internal error; the log tells more under this request id"
DEFAULT_RETRY_AFTER_S = 1.0
_TITLES = {499: "Client Closed Request"}


def problem(
    scope: Scope,
    status: int,
    detail: str,
    *,
    agent_errors: Mapping[str, object] | None = None,
    retry_after_s: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document. 429 and 503 always carry Retry-After: whole seconds, rounded up, 1 if nobody named a time.

    Below /v2 it has a member `error` as well, the only one that clients of the Open Inference Protocol read.
    """
    path = raw_path(scope)
    document: dict[str, object] = {
        "type": "about:blank",
        "title": _TITLES.get(status) or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": path,
        "request_id": record_of(scope).request_id,
    }
    if is_open_inference(path):
        document["error"] = detail
    if agent_errors is not None:
        document["errors"] = agent_errors
    all_headers = dict(headers or {})
    if status in (429, 503):
        all_headers["Retry-After"] = str(ceil(DEFAULT_RETRY_AFTER_S if retry_after_s is None else retry_after_s))
    return Response(json_text.dump(document), status, all_headers, media_type="application/problem+json")


def raw_path(scope: Scope) -> str:
    """The path as the client wrote it, percent-encoded."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path.partition(b"?")[0].decode("ascii", "replace")


def is_open_inference(path: str) -> bool:
    """Whether the path is the Open Inference Protocol's."""
    return path.startswith("/v2/") or path == "/v2"


def known_code(code: str) -> str:
    """The code, or UNKNOWN for one that no table holds: it is a backend's own."""
    return code if code in STATUS_OF_CODE else "UNKNOWN"


def agent_error(fault: Fault, internal_detail: str = INTERNAL_DETAIL) -> dict[str, Any]:
    """One entry of `errors`. The text of an INTERNAL is not the client's business: see `log_internal`."""
    code = known_code(fault.code)
    status = STATUS_OF_CODE[code]
    return {
        "status": status,
        "code": code,
        "detail": internal_detail if status == 500 else fault.detail,
        "retry_after_s": fault.retry_after_s,
    }


def fault_problem(scope: Scope, fault: Fault) -> Response:
    """The problem of a request that is one question, and failed."""
    error = agent_error(fault)
    log_internal(scope, [fault])
    return problem(scope, error["status"], error["detail"], retry_after_s=fault.retry_after_s)


def method_problem(scope: Scope, methods: Iterable[str]) -> Response:
    """405, with the methods that the route has."""
    allowed = ", ".join(methods)
    return problem(scope, 405, f"this route answers {allowed}", headers={"Allow": allowed})


def no_route_problem(scope: Scope) -> Response:
    """404 for a path that leads nowhere."""
    return problem(scope, 404, "there is no such route")


def log_internal(scope: Scope, faults: Iterable[Fault]) -> None:
    """What `agent_error` keeps from the client, one line for each different text."""
    for detail in {fault.detail for fault in faults if fault.code == "INTERNAL"}:
        logger.error("internal error: %s request_id=%s", detail, record_of(scope).request_id)


def all_failed(scope: Scope, agent_errors: Mapping[str, Mapping[str, Any]]) -> Response:
    """The problem of a request whose agents (at least one) all failed."""
    speakers, detail = who_speaks(agent_errors)
    return problem(
        scope,
        speakers[0]["status"],
        detail,
        agent_errors=agent_errors,
        retry_after_s=_latest(error["retry_after_s"] for error in speakers),
    )


def who_speaks(agent_errors: Mapping[str, Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The errors that speak for all agents (at least one), which all failed; and one text for them."""
    present = {error["status"] for error in agent_errors.values()}
    status = next(status for status in PRECEDENCE if status in present)
    speakers = [error for error in agent_errors.values() if error["status"] == status]
    return speakers, _summary(speakers, len(agent_errors))


def _summary(speakers: list[Mapping[str, Any]], agents: int) -> str:
    details = {error["detail"] for error in speakers}
    if len(speakers) == agents and len(details) == 1:
        return str(details.pop())
    return f"all {agents:,} agents failed; errors tells why, agent by agent"


def _latest(retry_times_s: Iterable[float | None]) -> float | None:
    return max((seconds for seconds in retry_times_s if seconds is not None), default=None)


def malformed_http(status: int, detail: str) -> bytes:
    """The answer to bytes that are no HTTP request, or too many for one, after which the connection closes."""
    title = HTTPStatus(status).phrase
    body = json_text.dump({"type": "about:blank", "title": title, "status": status, "detail": detail})
    head = (
        b"HTTP/1.1 %d %b\r\ncontent-type: application/problem+json\r\n"
        b"content-length: %d\r\nconnection: close\r\n\r\n" % (status, title.encode(), len(body))
    )
    return head + body


def internal_problem(scope: Scope) -> Response:
    """Fixed text for the unexpected."""
    return problem(scope, 500, INTERNAL_DETAIL)


async def _gateway_error(request: Request, exc: GatewayError) -> Response:
    return problem(request.scope, STATUS_OF_ERROR[type(exc)], exc.detail, retry_after_s=exc.retry_after_s)


async def _store_error(request: Request, exc: StoreError) -> Response:
    status, text = next((status, text) for kind, status, text in STORE_ERRORS if isinstance(exc, kind))
    return problem(request.scope, status, text.format(exc), retry_after_s=STORE_RETRY_AFTER_S)


async def _http_exception(request: Request, exc: HTTPException) -> Response:
    """Starlette's own: no route (404), no such method (405)."""
    if exc.status_code == 405:
        return method_problem(request.scope, _allowed_methods(request))
    if exc.status_code == 404:
        return no_route_problem(request.scope)
    return problem(request.scope, exc.status_code, exc.detail, headers=exc.headers)


def _allowed_methods(request: Request) -> list[str]:
    if isinstance(request.scope.get("endpoint"), StaticFiles):
        return ["GET", "HEAD"]
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in matching for method in route.methods or ()})


def add_handlers(app: FastAPI) -> None:
    """Every error that a route may raise becomes a problem document; the unexpected is caught in `access`."""
    # Starlette calls a handler with exceptions of its class only, and types every handler as taking any.
    app.add_exception_handler(GatewayError, _gateway_error)  # type: ignore[arg-type]
    app.add_exception_handler(StoreError, _store_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_exception)  # type: ignore[arg-type]
