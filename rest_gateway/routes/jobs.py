"""/jobs: look at jobs, wait for them, cancel and delete them. What makes them is POST /predict."""

from typing import TypeVar, get_args

from fastapi import FastAPI, Request, Response

from rest_gateway.config import Settings
from rest_gateway.errors import InvalidRequestError
from rest_gateway.jobs.records import Job, Kind, Status
from rest_gateway.jobs.service import TERMINAL, Jobs
from rest_gateway.routes.job_documents import decode_cursor, document_of, page_document, parse_job_id
from rest_gateway.routes.job_events import HEARTBEAT_S, JobEvents, read_last_event_id
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.negotiation import MEDIA_TYPES, tenant_of
from rest_gateway.routes.preferences import read_preferences
from rest_gateway.routes.streaming import STREAM_HEADERS
from rest_gateway.routes.submission import DEFAULT_TENANT
from rest_gateway.schemas import json_text
from rest_gateway.schemas.openapi_jobs import JOB_OPERATIONS

DEFAULT_PAGE, LONGEST_PAGE = 50, 200
Choice = TypeVar("Choice", bound=str)


class JobRoutes:
    """The routes with what they need."""

    def __init__(self, jobs: Jobs, settings: Settings, open_requests: OpenRequests) -> None:
        self._jobs = jobs
        self._settings = settings
        self._open_requests = open_requests

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes; HEAD wherever there is GET."""
        for method, path, endpoint in (
            ("GET", "/jobs", self.list),
            ("GET", "/jobs/{job_id}", self.get),
            ("DELETE", "/jobs/{job_id}", self.delete),
            ("POST", "/jobs/{job_id}/cancel", self.cancel),
            ("GET", "/jobs/{job_id}/events", self.events),
        ):
            operation = JOB_OPERATIONS[method, path]
            app.add_api_route(
                path,
                endpoint,
                methods=[method],
                tags=["jobs"],
                summary=operation.summary,
                status_code=operation.status,
                response_class=Response,
                openapi_extra={"parameters": operation.parameters},
            )
            if method == "GET":
                app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    async def list(self, request: Request) -> Response:
        """The newest first, page by page: `next_cursor` of one answer is `cursor` of the next request."""
        query = request.query_params
        cursor = query.get("cursor")
        page = await self._jobs.list(
            self._tenant(request),
            limit=_read_limit(query.get("limit")),
            cursor=None if cursor is None else decode_cursor(cursor),
            status=_read_choice("status", query.get("status"), get_args(Status)),
            kind=_read_choice("kind", query.get("kind"), get_args(Kind)),
        )
        return _json(200, page_document(page))

    async def get(self, request: Request) -> Response:
        """One job as it is; with `Prefer: wait=N`, as soon as it has ended, at most N seconds later."""
        job_id, tenant = parse_job_id(request.path_params["job_id"]), self._tenant(request)
        preferences = read_preferences(request.headers)
        if preferences.wait_s is None:
            return _job(200, await self._jobs.get(job_id, tenant))
        with self._open_requests.open() as lifetime:
            lifetime.watch(request.receive)
            job = await self._jobs.wait(job_id, tenant, preferences.wait_s)
        applied = {"Preference-Applied": f"wait={preferences.wait_s}"}
        return _job(200 if job.status in TERMINAL else 202, job, applied)

    async def cancel(self, request: Request) -> Response:
        """Ends a job that has not ended. Cancelling twice is fine; the model's answer is not waited for."""
        job_id, tenant = parse_job_id(request.path_params["job_id"]), self._tenant(request)
        return _job(200, await self._jobs.cancel(job_id, tenant))

    async def delete(self, request: Request) -> Response:
        """Deletes a job that has ended, and frees its Idempotency-Key."""
        await self._jobs.delete(parse_job_id(request.path_params["job_id"]), self._tenant(request))
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        """The job's changes as they come; `Last-Event-ID` leaves out what the client has seen.

        204 tells a client who has seen the end that nothing follows, so that an EventSource does not come back.
        """
        job_id, tenant = parse_job_id(request.path_params["job_id"]), self._tenant(request)
        job = await self._jobs.get(job_id, tenant)
        seen = read_last_event_id(request.headers.get("last-event-id"))
        if job.status in TERMINAL and seen >= job.version:
            return Response(status_code=204)
        if request.method == "HEAD":
            return Response(headers=STREAM_HEADERS, media_type=MEDIA_TYPES["sse"])
        return JobEvents(self._jobs.changes(job_id, tenant, seen=seen, heartbeat_s=HEARTBEAT_S), self._open_requests)

    def _tenant(self, request: Request) -> str:
        return tenant_of(request.headers, self._settings) or DEFAULT_TENANT


def _read_limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_PAGE
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= LONGEST_PAGE):
        raise InvalidRequestError(f"limit must be a number from 1 to {LONGEST_PAGE}")
    return int(text)


def _read_choice(name: str, text: str | None, choices: tuple[Choice, ...]) -> Choice | None:
    if text is None:
        return None
    for choice in choices:
        if choice == text:
            return choice
    raise InvalidRequestError(f"{name} must be one of {', '.join(choices)}")


def _job(status: int, job: Job, headers: dict[str, str] | None = None) -> Response:
    return _json(status, document_of(job), {"Vary": "Prefer", **(headers or {})})


def _json(status: int, document: dict[str, object], headers: dict[str, str] | None = None) -> Response:
    no_store = {"Cache-Control": "no-store", **(headers or {})}
    return Response(json_text.dump(document), status, no_store, media_type=MEDIA_TYPES["json"])
