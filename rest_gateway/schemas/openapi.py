"""What the API document says: shapes as Pydantic models, examples that work, and every answer of every route.

Documentation only: requests are checked by `schemas.predict`, which costs a fraction. A test holds the two together.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

JsonObject = dict[str, Any]


class AgentIn(BaseModel):
    """One row for one model. Further members are ignored."""

    vector: list[float] = Field(
        min_length=1, max_length=65_536, description="Finite as float32. Vectors of one model may differ in length."
    )
    model_name: str = Field(min_length=1, max_length=256)
    agent_type: str | None = Field("", max_length=256, description="What kind of agent this is; part of the batch key.")


class PredictRequest(BaseModel):
    """Exactly one of `agents` and `text`. null is the same as leaving a member out; further members are ignored."""

    agents: dict[str, AgentIn] | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="Agents by name; names are at most 256 characters. A fault inside one agent is that agent's only.",
    )
    text: str | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        description="Answered by a job: is it positive or negative? Not blank, without U+0000.",
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="Seconds to wait; the router's default without it, and never above its maximum. A job fails when "
        "it has not ended by then, and never has longer than the gateway's own limit.",
    )
    explain: bool | None = Field(False, description="Asks for an `explanation` with each result.")
    priority_class: Literal["interactive", "batch"] | None = Field(
        "interactive", description="Rows of class batch have the seats of a matrix that interactive rows leave."
    )


class ExplanationOut(BaseModel):
    """Where the time of an answer went."""

    queued_s: float = Field(description="Seconds in the router's queue.")
    backend_s: float = Field(description="Seconds between dispatch and the model server's answer.")
    batch_id: str
    batch_rows: int = Field(description="Rows in the batch, of all callers.")
    replica: str = Field(description="Address of the model server.")
    attempts: int = Field(description="How often the row was sent to a model server; 0: its answer was kept.")


class AgentResult(BaseModel):
    """One agent's answer."""

    output: list[float | None] = Field(
        description="float32 values in their shortest decimal form: one, or k for a model with k outputs. null: NaN or "
        "infinite."
    )
    explanation: ExplanationOut | None = Field(None, description="Present when the request asked with `explain`.")


class AgentError(BaseModel):
    """Why one agent has no output."""

    status: int = Field(description="The HTTP status that this error alone would have.")
    code: str = Field(description="A canonical gRPC code, such as INVALID_ARGUMENT.")
    detail: str
    retry_after_s: float | None = Field(description="Seconds after which a retry may succeed, if that is known.")


class PredictResponse(BaseModel):
    """Every name of the request, either in `results` or in `errors`."""

    results: dict[str, AgentResult]
    errors: dict[str, AgentError]


class Problem(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(title="Problem")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str = Field(description="The X-Request-Id of the answer, to be found in the logs.")
    errors: dict[str, AgentError] | None = Field(None, description="Present when all agents failed, by name.")
    error: str | None = Field(None, description="Present below /v2: the same as `detail`.")


def component_schemas(*more: type[BaseModel]) -> JsonObject:
    """The models for `components.schemas` of the document."""
    models: tuple[type[BaseModel], ...] = (PredictRequest, PredictResponse, Problem, *more)
    _, definitions = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: JsonObject = definitions["$defs"]
    return schemas


def ref(model: type[BaseModel]) -> JsonObject:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


# Examples. Each of them works as it stands; the answers are those of mock_nn.
THREE_AGENTS: JsonObject = {
    "agents": {
        "alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"},
        "bob": {"vector": [0.4, 0.5, 0.6], "model_name": "churn", "agent_type": "buyer"},
        "carol": {"vector": [0.7, 0.8, 0.9], "model_name": "fraud", "agent_type": "seller"},
    },
    "timeout_s": 30,
}
ONE_BAD_AGENT: JsonObject = {
    "agents": {
        "alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"},
        "bob": {"vector": [0.4, "x"], "model_name": "fraud"},
    }
}
WITH_EXPLANATION: JsonObject = {
    "agents": {"alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"}},
    "explain": True,
    "priority_class": "batch",
}
A_TEXT: JsonObject = {"text": "This product is amazing!"}
BOBS_ERROR: JsonObject = {
    "status": 422,
    "code": "INVALID_ARGUMENT",
    "detail": "vector[1] must be a number, not a string",
    "retry_after_s": None,
}
ALL_ANSWERED: JsonObject = {
    "results": {"alice": {"output": [0.14228487]}, "bob": {"output": [0.18661243]}, "carol": {"output": [-0.45477247]}},
    "errors": {},
}
SOME_ANSWERED: JsonObject = {"results": {"alice": {"output": [0.14228487]}}, "errors": {"bob": BOBS_ERROR}}
EXPLAINED: JsonObject = {
    "results": {
        "alice": {
            "output": [0.14228487],
            "explanation": {
                "queued_s": 0.002,
                "backend_s": 4.1,
                "batch_id": "17",
                "batch_rows": 5,
                "replica": "127.0.0.1:50061",
                "attempts": 1,
            },
        }
    },
    "errors": {},
}
SSE_STREAM = (
    'event: error\ndata: {"agent":"bob","error":{"status":422,"code":"INVALID_ARGUMENT",'
    '"detail":"vector[1] must be a number, not a string","retry_after_s":null}}\n\n'
    'event: result\ndata: {"agent":"alice","output":[0.14228487]}\n\n'
    'event: done\ndata: {"done":true}\n\n'
)
NDJSON_STREAM = (
    '{"agent":"bob","error":{"status":422,"code":"INVALID_ARGUMENT",'
    '"detail":"vector[1] must be a number, not a string","retry_after_s":null}}\n'
    '{"agent":"alice","output":[0.14228487]}\n'
    '{"done":true}\n'
)

PREDICT_BODY: JsonObject = {
    "required": True,
    "content": {
        "application/json": {
            "schema": ref(PredictRequest),
            "examples": {
                "three agents, two models": {"value": THREE_AGENTS},
                "one bad agent": {"summary": "answered 207", "value": ONE_BAD_AGENT},
                "with an explanation": {"value": WITH_EXPLANATION},
                "a text": {"summary": "answered 202 with a job", "value": A_TEXT},
            },
        }
    },
}


def problem_answer(
    description: str, title: str, status: int, detail: str, instance: str = "/predict", **more: object
) -> JsonObject:
    """A problem document as one answer of a route."""
    example = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": instance,
        "request_id": "5b0b8a1c6f7d4e0f9c2a4d7e8b6c1f03",
        **more,
    }
    content = {"application/problem+json": {"schema": ref(Problem), "example": example}}
    return {"description": description, "content": content}


_NO_ROUTER = {"status": 503, "code": "UNAVAILABLE", "detail": "no router", "retry_after_s": 1.0}
_ALL_BY_CODE = "also when all agents failed so"

PREDICT_RESPONSES: dict[int | str, JsonObject] = {
    200: {
        "description": "Every agent was answered. In a stream: each agent's event as it comes, whatever it is, then "
        "`done`; a stream without `done` was cut. With a job: the job, which ended within `Prefer: wait`, or was "
        "found by its `Idempotency-Key`.",
        "content": {
            "application/json": {
                "schema": ref(PredictResponse),
                "examples": {
                    "three agents, two models": {"value": ALL_ANSWERED},
                    "with an explanation": {"value": EXPLAINED},
                },
            },
            "text/event-stream": {"schema": {"type": "string"}, "example": SSE_STREAM},
            "application/x-ndjson": {"schema": {"type": "string"}, "example": NDJSON_STREAM},
        },
    },
    207: {
        "description": "Some agents failed.",
        "content": {"application/json": {"schema": ref(PredictResponse), "example": SOME_ANSWERED}},
    },
    400: problem_answer("The body is not JSON.", "Bad Request", 400, "the body is not JSON: NaN is not a JSON number"),
    404: problem_answer(
        "All agents ask for models that do not exist.",
        "Not Found",
        404,
        "no model 'chrun' for agent type 'buyer'",
        errors={
            "alice": {
                "status": 404,
                "code": "NOT_FOUND",
                "detail": "no model 'chrun' for agent type 'buyer'",
                "retry_after_s": None,
            }
        },
    ),
    406: problem_answer(
        "Accept excludes all three forms.",
        "Not Acceptable",
        406,
        "this route answers application/json, text/event-stream, application/x-ndjson",
    ),
    413: problem_answer(
        "The body is too large.", "Request Entity Too Large", 413, "the body has more than 8,388,608 bytes"
    ),
    415: problem_answer(
        "The body is encoded, or says that it is not JSON.",
        "Unsupported Media Type",
        415,
        "the Content-Type must be application/json",
    ),
    422: problem_answer(
        f"The body is not a request; {_ALL_BY_CODE}.",
        "Unprocessable Entity",
        422,
        BOBS_ERROR["detail"],
        errors={"bob": BOBS_ERROR},
    ),
    429: problem_answer(
        "The router is full: all agents were refused. Or too many jobs wait. Retry-After tells when to come back.",
        "Too Many Requests",
        429,
        "the queue is full",
        errors={
            "alice": {"status": 429, "code": "RESOURCE_EXHAUSTED", "detail": "the queue is full", "retry_after_s": 0.8}
        },
    ),
    500: problem_answer(
        "A bug of ours.", "Internal Server Error", 500, "internal error; the log tells more under this request id"
    ),
    501: problem_answer(
        f"The model cannot do it; {_ALL_BY_CODE}.",
        "Not Implemented",
        501,
        "not implemented",
        errors={"alice": {"status": 501, "code": "UNIMPLEMENTED", "detail": "not implemented", "retry_after_s": None}},
    ),
    502: problem_answer(
        "The model failed for all agents.",
        "Bad Gateway",
        502,
        "the model raised ValueError",
        errors={
            "alice": {"status": 502, "code": "UNKNOWN", "detail": "the model raised ValueError", "retry_after_s": None}
        },
    ),
    503: problem_answer(
        "No router, no model server, a shutdown, or no database for a job. Retry-After tells when to come back.",
        "Service Unavailable",
        503,
        "no router",
        errors={"alice": _NO_ROUTER},
    ),
    504: problem_answer(
        "The time of all agents was over before their answers.",
        "Gateway Timeout",
        504,
        "deadline exceeded",
        errors={
            "alice": {
                "status": 504,
                "code": "DEADLINE_EXCEEDED",
                "detail": "deadline exceeded",
                "retry_after_s": None,
            }
        },
    ),
}


def _json_example(description: str, example: JsonObject) -> JsonObject:
    return {"description": description, "content": {"application/json": {"example": example}}}


HEALTHZ_RESPONSES: dict[int | str, JsonObject] = {200: _json_example("The event loop turns.", {"status": "ok"})}
READYZ_RESPONSES: dict[int | str, JsonObject] = {
    200: _json_example(
        "New requests are welcome. A `database` that is `away` costs jobs, not predictions.",
        {"status": "ready", "router": "connected", "database": "connected"},
    ),
    503: _json_example(
        "Draining, no router, or a process that has not looked for jobs yet.",
        {"status": "not ready", "router": "unreachable", "database": "unknown"},
    ),
}
METRICS_RESPONSES: dict[int | str, JsonObject] = {
    200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
