"""What the API document says of jobs: their shape, examples that work, every answer of every route.

Documentation only, as `schemas.openapi`; tests hold it to what is served.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from rest_gateway.schemas import json_text
from rest_gateway.schemas.openapi import (
    ALL_ANSWERED,
    PREDICT_RESPONSES,
    JsonObject,
    PredictResponse,
    problem_answer,
    ref,
)

StatusOut = Literal["pending", "processing", "completed", "failed", "cancelled"]


class JobReceipt(BaseModel):
    """A job that was accepted: it is stored durably."""

    job_id: str = Field(json_schema_extra={"format": "uuid"})
    status: StatusOut


class SentimentOut(BaseModel):
    """The result of a text."""

    sentiment: Literal["positive", "negative"]
    confidence: float = Field(ge=0.5, le=1)


class JobErrorOut(BaseModel):
    """Why a job failed."""

    code: str = Field(description="A canonical gRPC code, such as DEADLINE_EXCEEDED.")
    message: str


class JobOut(BaseModel):
    """A job. Times are UTC, by the database's clock."""

    job_id: str = Field(json_schema_extra={"format": "uuid"})
    status: StatusOut
    kind: Literal["text", "agents"]
    result: SentimentOut | PredictResponse | None = Field(
        description="Of a text its sentiment; of agents what the waiting request is answered. A job of agents fails "
        "only if all of them do, and then `result` tells why, agent by agent."
    )
    error: JobErrorOut | None = Field(description="Set when the job failed.")
    attempt: int = Field(description="How often a gateway began to work on it.")
    version: int = Field(description="Rises with each change of status; the id of its events.")
    created_at: str = Field(json_schema_extra={"format": "date-time"})
    updated_at: str = Field(json_schema_extra={"format": "date-time"})
    started_at: str | None = Field(json_schema_extra={"format": "date-time"})
    finished_at: str | None = Field(json_schema_extra={"format": "date-time"})
    not_before: str | None = Field(
        json_schema_extra={"format": "date-time"}, description="A pending job waits until then: the router was away."
    )


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobOut]
    next_cursor: str | None = Field(description="`cursor` of the next page; null: there is none.")


SCHEMAS = (JobReceipt, JobOut, JobPage)

_ID = "01980a6e-5f3b-7c1d-9a2e-4b6c8d0e1f2a"
RECEIPT: JsonObject = {"job_id": _ID, "status": "processing"}
SENTIMENT: JsonObject = {"sentiment": "positive", "confidence": 0.8129}
COMPLETED: JsonObject = {
    "job_id": _ID,
    "status": "completed",
    "kind": "text",
    "result": SENTIMENT,
    "error": None,
    "attempt": 1,
    "version": 2,
    "created_at": "2026-07-01T12:00:00.000Z",
    "updated_at": "2026-07-01T12:00:05.012Z",
    "started_at": "2026-07-01T12:00:00.000Z",
    "finished_at": "2026-07-01T12:00:05.012Z",
    "not_before": None,
}
PROCESSING: JsonObject = COMPLETED | {
    "status": "processing",
    "result": None,
    "version": 1,
    "updated_at": "2026-07-01T12:00:00.000Z",
    "finished_at": None,
}
FAILED: JsonObject = COMPLETED | {
    "status": "failed",
    "result": None,
    "error": {"code": "UNKNOWN", "message": "the model raised ValueError"},
}
AGENTS_COMPLETED: JsonObject = COMPLETED | {"kind": "agents", "result": ALL_ANSWERED}
CANCELLED: JsonObject = COMPLETED | {"status": "cancelled", "result": None}
PAGE: JsonObject = {"jobs": [COMPLETED, FAILED], "next_cursor": "AAZjk2sNQAABmApuXzt8HZouS2yNDh8q"}
EVENTS = "retry: 1000\n\n" + "".join(
    f"id: {job['version']}\nevent: {job['status']}\ndata: {json_text.dump(job).decode()}\n\n"
    for job in (PROCESSING, COMPLETED)
)


def _answer(description: str, model: type[BaseModel], **examples: JsonObject) -> JsonObject:
    content = {"schema": ref(model), "examples": {name: {"value": value} for name, value in examples.items()}}
    return {"description": description, "content": {"application/json": content}}


def parameter(place: str, name: str, description: str, *, example: object = None, **schema: object) -> JsonObject:
    """One parameter of a route."""
    parameter: JsonObject = {
        "in": place,
        "name": name,
        "required": place == "path",
        "description": description,
        "schema": {"type": "string", **schema},
    }
    return parameter if example is None else parameter | {"example": example}


_JOB_ID = parameter("path", "job_id", "Of the answer that made the job.", format="uuid")
_WAIT = parameter("header", "Prefer", "`wait=10` waits up to 10 s (at most 60) for the job's end.")
TENANT = parameter(
    "header",
    "X-Tenant",
    "On whose account the request is, printable ASCII. Ignored unless the gateway trusts its clients to say so.",
    maxLength=256,
)
PREDICT_PARAMETERS: list[JsonObject] = [
    parameter(
        "header",
        "Prefer",
        "`respond-async`: agents are answered 202 with a job. `wait=10` (at most 60): whoever gets a job waits up to "
        "10 s for its end. What was honoured stands in `Preference-Applied`.",
    ),
    parameter(
        "header",
        "Idempotency-Key",
        "Makes it safe to repeat a request that makes a job: the same key with the same body finds the same job, as "
        "long as the job is kept. Quoted or bare, at most 255 characters.",
        maxLength=257,
    ),
    TENANT,
]

_UNAVAILABLE = problem_answer(
    "The database is away. Retry-After tells when to come back.",
    "Service Unavailable",
    503,
    "the database of the jobs is away",
    f"/jobs/{_ID}",
)
_NOT_FOUND = problem_answer("There is no such job.", "Not Found", 404, "there is no such job", f"/jobs/{_ID}")
_COMMON: dict[int, JsonObject] = {404: _NOT_FOUND, 503: _UNAVAILABLE}


def _conflict(description: str, detail: str) -> JsonObject:
    return problem_answer(description, "Conflict", 409, detail, f"/jobs/{_ID}")


@dataclass(frozen=True)
class Operation:
    """One route, for the document."""

    summary: str
    responses: dict[int, JsonObject]
    parameters: list[JsonObject] = field(default_factory=list)
    body: JsonObject | None = None

    @property
    def status(self) -> int:
        """The usual one."""
        return min(self.responses)


JOB_OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/jobs"): Operation(
        "List jobs",
        {
            200: _answer("A page of jobs, without their inputs.", JobPage, page=PAGE),
            422: problem_answer(
                "A parameter is not what it must be.",
                "Unprocessable Entity",
                422,
                "limit must be a number from 1 to 200",
                "/jobs",
            ),
            503: _UNAVAILABLE,
        },
        [
            parameter("query", "limit", "Jobs of a page.", type="integer", minimum=1, maximum=200, default=50),
            parameter("query", "cursor", "`next_cursor` of the page before."),
            parameter("query", "status", "Only these.", enum=[*StatusOut.__args__]),  # type: ignore[attr-defined]
            parameter("query", "kind", "Only these.", enum=["text", "agents"]),
            TENANT,
        ],
    ),
    ("GET", "/jobs/{job_id}"): Operation(
        "Look at a job, or wait for its end",
        {
            200: _answer(
                "The job. With `Prefer: wait`: it has ended.",
                JobOut,
                completed=COMPLETED,
                processing=PROCESSING,
                failed=FAILED,
                agents=AGENTS_COMPLETED,
            ),
            202: _answer("With `Prefer: wait`: it has not ended within that time.", JobOut, processing=PROCESSING),
            **_COMMON,
        },
        [_JOB_ID, _WAIT, TENANT],
    ),
    ("DELETE", "/jobs/{job_id}"): Operation(
        "Delete a job that has ended",
        {
            204: {"description": "It is gone, and its Idempotency-Key with it."},
            409: _conflict("It has not ended; cancel it first.", "the job is processing"),
            **_COMMON,
        },
        [_JOB_ID, TENANT],
    ),
    ("POST", "/jobs/{job_id}/cancel"): Operation(
        "Cancel a job",
        {
            200: _answer("It is cancelled, now or before.", JobOut, cancelled=CANCELLED),
            409: _conflict("It has ended otherwise.", "the job is completed"),
            **_COMMON,
        },
        [_JOB_ID, TENANT],
    ),
    ("GET", "/jobs/{job_id}/events"): Operation(
        "Follow a job",
        {
            200: {
                "description": "Server-sent events named by the status; `id` is the job's version, `data` the job. The "
                "stream ends after the terminal state.",
                "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EVENTS}},
            },
            204: {"description": "`Last-Event-ID` is the job's last version: nothing follows."},
            **_COMMON,
        },
        [_JOB_ID, parameter("header", "Last-Event-ID", "The last `id` that the client has seen."), TENANT],
    ),
}


def predict_responses() -> dict[str, Any]:
    """The answers of POST /predict with those by jobs among them."""
    responses = {str(status): answer for status, answer in PREDICT_RESPONSES.items()}
    answered = responses["200"]["content"]["application/json"]
    job = {
        "schema": {"anyOf": [answered["schema"], ref(JobOut)]},
        "examples": answered["examples"] | {"a text, waited for": {"value": COMPLETED}},
    }
    responses["200"] = responses["200"] | {"content": responses["200"]["content"] | {"application/json": job}}
    accepted = _answer("A job was stored. `Location` names it.", JobReceipt, accepted=RECEIPT)
    return dict(sorted((responses | {"202": accepted}).items()))
