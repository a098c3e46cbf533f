"""/v2 as a whole, called through ASGI, with a fake router behind it."""

import asyncio
import gzip
import json
import logging
import threading
import zlib
from collections.abc import Callable, Sequence

import httpx
import numpy as np
import pytest

from mock_nn.models import expected
from protos.open_inference import open_inference_pb2 as oip
from rest_gateway.config import Settings
from rest_gateway.routes import open_inference as routes
from rest_gateway.schemas import openapi, openapi_open_inference
from rest_gateway.schemas.open_inference import InferCall, parse_infer
from router_client import InferError
from tests.unit.rest_gateway.fake_router import FakeRouter, infer_failure
from tests.unit.rest_gateway.test_app import client_of, parts_of

pytestmark = pytest.mark.anyio

ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5]}]}
RAW = np.array([1, 2.5], "<f4").tobytes()
BINARY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}
INFER = "/v2/models/m/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"


async def send(
    router: FakeRouter,
    path: str = INFER,
    content: bytes | None = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    settings: Settings | None = None,
) -> httpx.Response:
    async with client_of(router, settings) as client:
        return await client.request(method, path, content=content, headers=headers)


async def infer(router: FakeRouter, body: object = ROW, **headers: str) -> httpx.Response:
    return await send(router, INFER, json.dumps(body).encode(), headers=headers)


def is_problem(response: httpx.Response, status: int, detail: str) -> bool:
    document = response.json()
    has_form = response.headers["content-type"] == "application/problem+json" and document["status"] == status
    return response.status_code == status and has_form and document["error"] == document["detail"] == detail


# Inference


async def test_json_in_and_json_out() -> None:
    router = FakeRouter()
    response = await infer(router, ROW | {"id": "r-1"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "model_name": "m",
        "id": "r-1",
        "outputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}],
    }
    ((request, _),) = router.infer_calls
    assert (request.model_name, request.raw_input_contents[0]) == ("m", RAW)


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/json", "text/plain"])
async def test_bytes_in_and_bytes_out_whatever_the_content_type(content_type: str | None) -> None:
    text = json.dumps(BINARY | {"parameters": {"binary_data_output": True}}).encode()
    headers = {HEADER_LENGTH: str(len(text))} | ({} if content_type is None else {"Content-Type": content_type})
    response = await send(FakeRouter(), INFER, text + RAW, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/octet-stream")
    end = int(response.headers[HEADER_LENGTH])
    (output,) = json.loads(response.content[:end])["outputs"]
    assert output == {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    assert response.content[end:] == RAW


async def test_large_bodies_are_read_beside_the_loop_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four million numbers, the last of them bad, held everybody up for more than a second."""
    threads: list[str] = []
    under_way: list[None] = []

    def parse(body: bytes, header_length: str | None) -> InferCall:
        threads.append(threading.current_thread().name)
        under_way.append(None)
        assert len(under_way) == 1
        call = parse_infer(body, header_length)
        under_way.pop()
        return call

    monkeypatch.setattr(routes, "parse_infer", parse)
    text = json.dumps(ROW).encode()
    async with client_of(FakeRouter()) as client:
        for size in (routes.LARGE_BODY_BYTES, routes.LARGE_BODY_BYTES + 1):
            content = text.ljust(size)
            answers = await asyncio.gather(*(client.post(INFER, content=content) for _ in range(2)))
            assert [answer.status_code for answer in answers] == [200, 200]
    here = threading.current_thread().name
    assert [name == here for name in threads] == [True, True, False, False]


async def test_what_the_request_says_reaches_the_router() -> None:
    router = FakeRouter()
    headers = {"X-Request-Id": "r-17", "X-Tenant": "acme"}
    body = json.dumps(ROW | {"id": "mine", "parameters": {"timeout": 2_000_000, "priority": 2}}).encode()
    await send(router, "/v2/models/a/b/versions/3/infer", body, headers=headers)
    await send(router, INFER, body, headers=headers, settings=Settings(trust_tenant=True))
    (request, options), (_, trusting) = router.infer_calls
    assert (request.model_name, request.model_version, request.id) == ("a/b", "3", "mine")
    assert request.parameters["priority"].int64_param == 2
    assert options == {"timeout_s": 2.0, "tenant": "", "request_id": "r-17"}
    assert trusting["tenant"] == "acme"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("INVALID_ARGUMENT", 422),
        ("NOT_FOUND", 404),
        ("DEADLINE_EXCEEDED", 504),
        ("RESOURCE_EXHAUSTED", 429),
        ("UNAVAILABLE", 503),
        ("UNKNOWN", 502),
        ("UNIMPLEMENTED", 501),
        ("SOMETHING_ELSE", 502),
    ],
)
async def test_a_failure_is_a_problem_that_clients_of_the_protocol_can_read(code: str, status: int) -> None:
    assert is_problem(await infer(FakeRouter(open_inference=infer_failure(code, "because"))), status, "because")


async def test_a_time_to_come_back_is_rounded_up_to_whole_seconds() -> None:
    response = await infer(FakeRouter(open_inference=infer_failure("RESOURCE_EXHAUSTED", "full", 1200)))
    assert response.headers["retry-after"] == "2"


async def test_an_internal_error_is_told_to_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    response = await infer(FakeRouter(open_inference=infer_failure("INTERNAL", "secret")))
    assert is_problem(response, 500, "internal error; the log tells more under this request id")
    assert "secret" in caplog.text


async def test_a_bug_is_a_problem_too(caplog: pytest.LogCaptureFixture) -> None:
    response = await infer(FakeRouter(error=RuntimeError("secret")))
    assert is_problem(response, 500, "internal error; the log tells more under this request id")
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "fragment"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"{}", {HEADER_LENGTH: "x"}, 400, HEADER_LENGTH),
        (b"[" * 100_000, {}, 400, "nested too deeply"),
        (b"{}", {}, 422, "the request has no inputs"),
        (b" " * (8 * 1024 * 1024 + 1), {}, 413, "more than 8,388,608 bytes"),
        (b"{}", {"Content-Encoding": "br"}, 415, "other than gzip and deflate"),
        (b"{}", {"Content-Encoding": "gzip"}, 400, "the body is not gzip"),
        (gzip.compress(b"{}", mtime=0)[:-1], {"Content-Encoding": "gzip"}, 400, "cut off, or more follows"),
        (gzip.compress(b"{}", mtime=0) + b"x", {"Content-Encoding": "gzip"}, 400, "cut off, or more follows"),
        (zlib.compress(b" " * (8 * 1024 * 1024 + 1)), {"Content-Encoding": "deflate"}, 413, "more than 8,388,608"),
        (gzip.compress(bytes(10**9 // 8), mtime=0), {"Content-Encoding": "gzip"}, 413, "more than 8,388,608"),
    ],
)
async def test_a_bad_body_is_refused_before_the_router_hears_of_it(
    content: bytes, headers: dict[str, str], status: int, fragment: str
) -> None:
    router = FakeRouter()
    response = await send(router, INFER, content, headers=headers)
    assert fragment in response.json()["error"]
    assert is_problem(response, status, response.json()["detail"])
    assert router.infer_calls == []


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("identity", bytes),
        ("", bytes),
    ],
)
async def test_a_compressed_body_is_unpacked(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    text = json.dumps(BINARY).encode()
    headers = {"Content-Encoding": encoding, HEADER_LENGTH: str(len(text))}
    response = await send(FakeRouter(), INFER, pack(text + RAW), headers=headers)
    assert response.json()["outputs"][0]["data"] == [1.0, 2.5]


async def test_a_body_of_just_the_limit_may_be_packed() -> None:
    body = json.dumps(ROW).encode()
    padded = body + b" " * (8 * 1024 * 1024 - len(body))
    response = await send(FakeRouter(), INFER, gzip.compress(padded, mtime=0), headers={"Content-Encoding": "gzip"})
    assert response.status_code == 200


@pytest.mark.parametrize("tenant", ["x" * 257, "\t"])
async def test_a_tenant_that_cannot_be_one_is_refused(tenant: str) -> None:
    response = await send(
        FakeRouter(), content=b"{}", headers={"X-Tenant": tenant}, settings=Settings(trust_tenant=True)
    )
    assert response.status_code == 422
    assert response.json()["error"].startswith("X-Tenant")


async def test_the_drains_end_is_a_503() -> None:
    router = FakeRouter()
    router.close_gate()
    parts = parts_of(router)
    async with client_of(router, parts=parts) as client:
        waiting = asyncio.create_task(client.post(INFER, json=ROW))
        await router.entered.wait()
        parts.open_requests.end_all()
        response = await waiting
    assert is_problem(response, 503, "the gateway is shutting down and could not wait for the answer")
    assert router.cancelled.is_set()


# Metrics and the access log


async def test_requests_are_counted_by_the_template_of_their_route() -> None:
    router = FakeRouter()
    parts = parts_of(router)
    async with client_of(router, parts=parts) as client:
        await client.post("/v2/models/a/b/infer", json=ROW)
        await client.post("/v2/models/a/b/versions/1/infer", json=ROW)
        await client.get("/v2/models/other")
        await client.get("/v2/nowhere")
    text = parts.metrics.render().decode()
    for route, method, status in (
        ("/v2/models/{model_name}/infer", "POST", 200),
        ("/v2/models/{model_name}/versions/{model_version}/infer", "POST", 200),
        ("/v2/models/{model_name}", "GET", 200),
        ("unmatched", "GET", 404),
    ):
        assert f'gateway_requests_total{{method="{method}",route="{route}",status="{status}"}} 1.0' in text


async def test_a_failed_request_stands_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await send(FakeRouter(), "/v2/models/a%2Fb/infer", b"{}", headers={"X-Request-Id": "mine"})
    assert "POST /v2/models/a%2Fb/infer 422 in " in caplog.text
    assert "request_id=mine" in caplog.text


# Questions


@pytest.mark.parametrize(
    ("path", "question", "document"),
    [
        ("/v2", ("server_metadata",), {"name": "fake", "version": "7", "extensions": ["binary_tensor_data"]}),
        ("/v2/health/ready", ("server_ready",), {"ready": True}),
        ("/v2/models/a/b/ready", ("model_ready", "a/b", ""), {"name": "a/b", "ready": True}),
        ("/v2/models/m/versions/2/ready", ("model_ready", "m", "2"), {"name": "m", "ready": True}),
        (
            "/v2/models/m/versions/2",
            ("model_metadata", "m", "2"),
            {"name": "m", "versions": ["1"], "platform": "test", "inputs": [], "outputs": []},
        ),
        ("/v2/models/m/config", ("model_config", "m", ""), {"name": "m", "max_batch_size": 0}),
    ],
)
async def test_questions_go_to_the_router(path: str, question: tuple[str, ...], document: object) -> None:
    router = FakeRouter()
    response = await send(router, path, method="GET")
    assert (response.status_code, response.json(), router.questions) == (200, document, [question])
    assert (await send(router, path, method="HEAD")).status_code == 200


@pytest.mark.parametrize(("content", "is_ready"), [(b"", "False"), (b'{"ready": true}', "True")])
async def test_the_index_may_be_of_ready_models(content: bytes, is_ready: str) -> None:
    router = FakeRouter()
    response = await send(router, "/v2/repository/index", content)
    assert (response.status_code, response.json()) == (200, [{"name": "m", "state": "READY"}])
    assert router.questions == [("repository_index", is_ready)]


async def test_liveness_asks_nobody() -> None:
    router = FakeRouter(is_connected=False)
    response = await send(router, "/v2/health/live", method="GET")
    assert (response.status_code, response.json(), router.questions) == (200, {"live": True}, [])


@pytest.mark.parametrize(
    ("is_connected", "is_ready", "is_draining", "detail"),
    [
        (True, True, True, "the gateway is draining"),
        (False, True, False, "no router"),
        (True, False, False, "the router is not ready"),
    ],
)
async def test_readiness_needs_a_router_that_is_ready_and_no_drain(
    is_connected: bool, is_ready: bool, is_draining: bool, detail: str
) -> None:
    router = FakeRouter(is_connected=is_connected, answers={"server_ready": is_ready})
    parts = parts_of(router)
    if is_draining:
        parts.open_requests.start_drain()
    async with client_of(router, parts=parts) as client:
        response = await client.get("/v2/health/ready")
    assert is_problem(response, 503, detail)
    assert response.headers["retry-after"] == "1"


async def test_a_model_that_is_not_ready_is_a_503() -> None:
    response = await send(FakeRouter(answers={"model_ready": False}), "/v2/models/m/ready", method="GET")
    assert is_problem(response, 503, "the model 'm' is not ready")


@pytest.mark.parametrize(
    ("question", "path"),
    [
        ("server_ready", "/v2/health/ready"),
        ("server_metadata", "/v2"),
        ("model_ready", "/v2/models/m/ready"),
        ("model_metadata", "/v2/models/m"),
        ("model_config", "/v2/models/m/config"),
    ],
)
async def test_a_question_that_fails_is_a_problem(question: str, path: str) -> None:
    router = FakeRouter(answers={question: InferError("NOT_FOUND", "no model 'm'")})
    assert is_problem(await send(router, path, method="GET"), 404, "no model 'm'")


# Paths that lead nowhere


@pytest.mark.parametrize("path", ["/v2/models/m/stats", "/v2/nowhere", "/v2/repository/models/m/load"])
async def test_an_unknown_path_is_a_problem_with_an_error(path: str) -> None:
    """`stats` is a model's metadata by its path, of a name that the router does not know."""
    router = FakeRouter(answers={"model_metadata": InferError("NOT_FOUND", "there is no such route")})
    assert is_problem(await send(router, path, method="GET"), 404, "there is no such route")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", INFER, "POST"), ("DELETE", "/v2", "GET, HEAD"), ("GET", "/v2/repository/index", "POST")],
)
async def test_another_method_is_a_problem_with_an_error(method: str, path: str, allowed: str) -> None:
    response = await send(FakeRouter(), path, method=method)
    assert is_problem(response, 405, f"this route answers {allowed}")
    assert response.headers["allow"] == allowed


async def test_other_paths_have_problems_as_before() -> None:
    response = await send(FakeRouter(), "/v2x", method="GET")
    assert response.status_code == 404
    assert "error" not in response.json()


# The API document


def as_the_mock(request: oip.ModelInferRequest) -> oip.ModelInferResponse:
    rows = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(request.inputs[0].shape)
    values = expected(request.model_name, request.parameters["agent_type"].string_param, rows)
    response = oip.ModelInferResponse(model_name=request.model_name, id=request.id)
    response.outputs.add(name="output", datatype="FP32", shape=values.shape)
    response.raw_output_contents.append(values.astype("<f4").tobytes())
    return response


async def test_the_examples_are_what_gateway_and_mock_answer() -> None:
    router = FakeRouter(open_inference=as_the_mock)
    one = await send(router, "/v2/models/churn/infer", json.dumps(openapi_open_inference.ONE_ROW).encode())
    assert one.json() == openapi_open_inference.ONE_ROW_ANSWERED
    two = await send(router, "/v2/models/churn/infer", json.dumps(openapi_open_inference.TWO_ROWS).encode())
    assert two.json()["outputs"][0]["shape"] == [2]


async def test_the_example_of_every_answer_has_its_form() -> None:
    models = {model.__name__: model for model in (*openapi_open_inference.SCHEMAS, openapi.Problem)}
    checked = 0
    for operation in openapi_open_inference.OPERATIONS.values():
        for status, answer in operation.responses.items():
            for content in answer["content"].values():
                reference = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                if reference:
                    model = models[reference].model_validate(content["example"])
                    checked += 1
                    assert getattr(model, "status", status) == status
    assert checked > 20


async def test_every_route_is_documented_with_its_parameters() -> None:
    async with client_of(FakeRouter()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    for (method, path), operation in openapi_open_inference.OPERATIONS.items():
        told = paths[path][method.lower()]
        in_path = [parameter["name"] for parameter in told.get("parameters", []) if parameter["in"] == "path"]
        assert in_path == names_in(path)
        assert set(told["responses"]) == {str(status) for status in operation.responses}
        assert ("requestBody" in told) is (method == "POST")


def names_in(path: str) -> Sequence[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]
