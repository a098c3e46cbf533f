"""What the API document says of /v2: the Open Inference Protocol's shapes, examples that work, every answer.

Documentation only, as `schemas.openapi`; tests hold it to what is served.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rest_gateway.schemas.openapi import JsonObject, problem_answer, ref
from rest_gateway.schemas.openapi_jobs import TENANT, Operation, parameter

ParameterOut = bool | int | float | str


class RequestInput(BaseModel):
    """One input. Either `data`, or the parameter `binary_data_size` and bytes behind the JSON."""

    name: str = Field(max_length=256)
    datatype: str = Field(
        description="BOOL, UINT8 to UINT64, INT8 to INT64, FP16, FP32, FP64, BYTES, BF16 (binary only)."
    )
    shape: list[int] = Field(description="The first dimension is the rows, where the model takes batches.")
    data: list[Any] | None = Field(None, description="Row-major, flat or nested. BYTES as strings.")
    parameters: dict[str, ParameterOut] | None = Field(None, description="`binary_data_size`: bytes behind the JSON.")


class RequestedOutput(BaseModel):
    """One output that is wanted."""

    name: str
    parameters: dict[str, ParameterOut] | None = Field(
        None, description="`binary_data`: whether it comes as bytes behind the JSON."
    )


class InferRequest(BaseModel):
    """A request of the Open Inference Protocol. null is the same as leaving a member out."""

    id: str | None = Field(None, description="Comes back in the answer.")
    inputs: list[RequestInput] = Field(min_length=1)
    outputs: list[RequestedOutput] | None = Field(None, description="Those that are wanted; all without it.")
    parameters: dict[str, ParameterOut] | None = Field(
        None,
        description="`timeout` (microseconds), `priority` (0 and 1 interactive, from 2 on class batch), `agent_type`, "
        "`binary_data_output` (all outputs as bytes behind the JSON); others reach the model.",
    )


class ResponseOutput(BaseModel):
    """One output."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = Field(
        None, description="Row-major, flat. BYTES as strings; null: NaN or infinite. Not there where it is binary."
    )
    parameters: dict[str, ParameterOut] | None = Field(None, description="`binary_data_size`: bytes behind the JSON.")


class InferResponse(BaseModel):
    """The outputs, in the order in which they were asked for."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, ParameterOut] | None = None
    outputs: list[ResponseOutput]


class TensorDescription(BaseModel):
    """A tensor of a model; -1 stands for a dimension of any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDescription]
    outputs: list[TensorDescription]
    properties: dict[str, str] | None = None


class ModelEntry(BaseModel):
    """A model of the index."""

    name: str
    version: str | None = None
    state: str | None = Field(None, description="READY, UNAVAILABLE, …")
    reason: str | None = None


SCHEMAS = (InferRequest, InferResponse, ModelMetadata, ModelEntry)

# These work as they stand; the answers are those of mock_nn.
ONE_ROW: JsonObject = {
    "id": "r-17",
    "inputs": [{"name": "vector", "datatype": "FP32", "shape": [1, 3], "data": [0.1, 0.2, 0.3]}],
    "parameters": {"agent_type": "buyer"},
}
ONE_ROW_ANSWERED: JsonObject = {
    "model_name": "churn",
    "id": "r-17",
    "outputs": [{"name": "output", "datatype": "FP32", "shape": [1], "data": [0.14228487]}],
}
TWO_ROWS: JsonObject = {
    "inputs": [{"name": "vector", "datatype": "FP32", "shape": [2, 3], "data": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}],
    "outputs": [{"name": "output"}],
    "parameters": {"agent_type": "buyer", "timeout": 30_000_000},
}
METADATA: JsonObject = {
    "name": "churn",
    "versions": ["1"],
    "platform": "",
    "inputs": [{"name": "vector", "datatype": "FP32", "shape": [-1, -1]}],
    "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1]}],
}

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_INFER_PATH = "/v2/models/churn/infer"


def _problem(description: str, title: str, status: int, detail: str, instance: str = _INFER_PATH) -> JsonObject:
    return problem_answer(description, title, status, detail, instance, error=detail)


def _json(description: str, example: object, model: type[BaseModel] | None = None) -> JsonObject:
    content = {"example": example} if model is None else {"schema": ref(model), "example": example}
    return {"description": description, "content": {"application/json": content}}


_NO_MODEL = _problem("There is no such model.", "Not Found", 404, "no model 'chrun'")
_UNAVAILABLE = _problem(
    "No router, no model server, or a shutdown. Retry-After tells when to come back.",
    "Service Unavailable",
    503,
    "no router took the request in 2 s",
)
_LATE = _problem("The time was over before the answer.", "Gateway Timeout", 504, "deadline exceeded")
_COMMON: dict[int, JsonObject] = {
    501: _problem("The router has no such method.", "Not Implemented", 501, "Method not found!"),
    503: _UNAVAILABLE,
    504: _LATE,
}

INFER_RESPONSES: dict[int, JsonObject] = {
    200: {
        "description": "Every row was answered. With binary outputs `Inference-Header-Content-Length` tells where the "
        "JSON ends and their bytes begin.",
        "content": {
            "application/json": {"schema": ref(InferResponse), "example": ONE_ROW_ANSWERED},
            "application/octet-stream": _BINARY,
        },
    },
    400: _problem("The body cannot be read.", "Bad Request", 400, "the body is not JSON: NaN is not a JSON number"),
    404: _NO_MODEL,
    413: _problem("The body is too large.", "Request Entity Too Large", 413, "the body has more than 8,388,608 bytes"),
    415: _problem(
        "The body has a Content-Encoding that is neither gzip nor deflate.",
        "Unsupported Media Type",
        415,
        "a Content-Encoding other than gzip and deflate is not supported",
    ),
    422: _problem(
        "The request, or a tensor of it, is not what it must be.",
        "Unprocessable Entity",
        422,
        'input "vector": data has 2 elements, which is not FP32[1, 3]',
    ),
    429: _problem(
        "The router is full. Retry-After tells when to come back.", "Too Many Requests", 429, "the queue is full"
    ),
    500: _problem(
        "A bug of ours.", "Internal Server Error", 500, "internal error; the log tells more under this request id"
    ),
    502: _problem("The model failed.", "Bad Gateway", 502, "the model raised ValueError"),
    503: _UNAVAILABLE,
    504: _LATE,
}
INFER_BODY: JsonObject = {
    "required": True,
    "content": {
        "application/json": {
            "schema": ref(InferRequest),
            "examples": {"one row": {"value": ONE_ROW}, "two rows, nested": {"value": TWO_ROWS}},
        },
        "application/octet-stream": _BINARY,
    },
}

_MODEL = parameter("path", "model_name", "May have slashes, as they are or as %2F.", example="churn", maxLength=256)
_VERSION = parameter("path", "model_version", "As the model server calls it.", example="1", maxLength=256)
_HEADER_LENGTH = parameter(
    "header",
    "Inference-Header-Content-Length",
    "Bytes of the JSON, where bytes of inputs follow it: those with `binary_data_size`, in their order.",
    type="integer",
    minimum=0,
)


def _of_a_model(*names: JsonObject) -> dict[tuple[str, str], Operation]:
    """The routes of a model, without or with a version in their paths."""
    root = "/v2/models/{model_name}" + "/versions/{model_version}" * (len(names) - 1)
    not_ready = _problem(
        "It is not ready; or no router, or a shutdown.",
        "Service Unavailable",
        503,
        "the model 'churn' is not ready",
        "/v2/models/churn/ready",
    )
    return {
        ("POST", f"{root}/infer"): Operation("Infer", INFER_RESPONSES, [*names, _HEADER_LENGTH, TENANT], INFER_BODY),
        ("GET", root): Operation(
            "Describe a model",
            {200: _json("Its inputs and outputs.", METADATA, ModelMetadata), 404: _NO_MODEL, **_COMMON},
            [*names],
        ),
        ("GET", f"{root}/ready"): Operation(
            "Ask whether a model is ready",
            {
                200: _json("It can be asked.", {"name": "churn", "ready": True}),
                404: _NO_MODEL,
                **_COMMON,
                503: not_ready,
            },
            [*names],
        ),
        ("GET", f"{root}/config"): Operation(
            "Describe a model as Triton does",
            {
                200: _json("As far as the router knows.", {"name": "churn", "max_batch_size": 64}),
                404: _NO_MODEL,
                **_COMMON,
            },
            [*names],
        ),
    }


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v2"): Operation(
        "Describe the server",
        {
            200: _json(
                "Its name, version and extensions.",
                {"name": "inference-router", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
            ),
            **_COMMON,
        },
    ),
    ("GET", "/v2/health/live"): Operation(
        "Ask whether the gateway lives", {200: _json("The event loop turns.", {"live": True})}
    ),
    ("GET", "/v2/health/ready"): Operation(
        "Ask whether new requests are welcome",
        {200: _json("They are.", {"ready": True}), **_COMMON},
    ),
    **_of_a_model(_MODEL),
    **_of_a_model(_MODEL, _VERSION),
    ("POST", "/v2/repository/index"): Operation(
        "List the models",
        {
            200: {
                "description": "Those that the router knows of.",
                "content": {
                    "application/json": {
                        "schema": {"type": "array", "items": ref(ModelEntry)},
                        "example": [{"name": "churn", "version": "1", "state": "READY"}],
                    }
                },
            },
            **_COMMON,
        },
        body={
            "required": False,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
                    "example": {"ready": True},
                }
            },
        },
    ),
}
