"""The application as a whole, called through ASGI, with a fake router behind it."""

import json
import logging
import re
from collections.abc import Sequence
from typing import Literal

import httpx
import numpy as np
import pytest

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.app import Parts, create_app, make_parts
from rest_gateway.config import Settings
from rest_gateway.schemas import openapi, openapi_jobs, openapi_open_inference
from tests.unit.rest_gateway.fake_router import FakeRouter, failing, failing_by_model, sum_answers
from tests.unit.rest_gateway.jobs.fake_store import FakeStore

pytestmark = pytest.mark.anyio

ALICE = {"vector": [0.1, 0.2, 0.3], "model_name": "model-a"}
BOB = {"vector": [1.5, -2.5], "model_name": "model-b", "agent_type": "trader"}
BAD = {"vector": [], "model_name": "model-a"}


def parts_of(router: FakeRouter, settings: Settings | None = None) -> Parts:
    """With a worker that has looked for jobs, and does no more."""
    parts = make_parts(router, FakeStore(), settings or Settings())
    parts.jobs.worker.has_tried_to_claim = True
    return parts


def client_of(router: FakeRouter, settings: Settings | None = None, parts: Parts | None = None) -> httpx.AsyncClient:
    app = create_app(parts or parts_of(router, settings), settings or Settings())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def predict(
    router: FakeRouter, body: object, settings: Settings | None = None, headers: dict[str, str] | None = None
) -> httpx.Response:
    async with client_of(router, settings) as client:
        return await client.post("/predict", content=json.dumps(body), headers=headers)


# POST /predict, JSON


async def test_every_agent_answered_is_a_200_in_the_order_of_the_request() -> None:
    response = await predict(FakeRouter(), {"agents": {"bob": BOB, "alice": ALICE}})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.text == '{"results":{"bob":{"output":[-1.0]},"alice":{"output":[0.6]}},"errors":{}}'


async def test_an_agent_that_fails_at_the_gateway_or_at_the_router_makes_a_207() -> None:
    router = FakeRouter(failing_by_model(model_b="UNKNOWN"))
    response = await predict(router, {"agents": {"alice": ALICE, "bob": BOB, "carl": BAD}})
    assert response.status_code == 207
    assert response.json() == {
        "results": {"alice": {"output": [0.6]}},
        "errors": {
            "bob": {"status": 502, "code": "UNKNOWN", "detail": "model-b failed", "retry_after_s": None},
            "carl": {"status": 422, "code": "INVALID_ARGUMENT", "detail": "vector is empty", "retry_after_s": None},
        },
    }


async def test_when_all_fail_the_first_by_precedence_speaks() -> None:
    response = await predict(FakeRouter(failing("UNAVAILABLE", "no router", 1500)), {"agents": {"a": ALICE, "c": BAD}})
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["retry-after"] == "2"
    assert [error["status"] for error in response.json()["errors"].values()] == [503, 422]


async def test_a_request_of_faulty_agents_only_never_reaches_the_router() -> None:
    router = FakeRouter()
    response = await predict(router, {"agents": {"a": BAD, "b": {"vector": [1]}}})
    assert response.status_code == 422
    assert [error["detail"] for error in response.json()["errors"].values()] == [
        "vector is empty",
        "model_name is missing",
    ]
    assert router.calls == []


async def test_an_agent_that_the_router_forgets_is_an_internal_error() -> None:
    response = await predict(FakeRouter(lambda blocks: sum_answers(blocks)[:1]), {"agents": {"a": ALICE, "b": BOB}})
    assert response.status_code == 207
    assert response.json()["errors"]["b"]["code"] == "INTERNAL"


async def test_what_the_request_says_reaches_the_router() -> None:
    router = FakeRouter()
    body = {"agents": {"b": BOB}, "timeout_s": 2, "explain": True, "priority_class": "batch"}
    await predict(router, body, headers={"X-Request-Id": "mine", "X-Tenant": "acme"})
    ((blocks, options),) = router.calls
    assert [(block.agent_type, block.model_name, block.rows, block.dim) for block in blocks] == [
        ("trader", "model-b", 1, 2)
    ]
    assert options == {
        "timeout_s": 2.0,
        "priority_class": pb.PRIORITY_CLASS_BATCH,
        "tenant": "",
        "explain": True,
        "request_id": "mine",
    }


async def test_a_tenant_is_passed_on_only_where_it_is_trusted() -> None:
    router, trusting = FakeRouter(), Settings(trust_tenant=True)
    await predict(router, {"agents": {"b": BOB}}, trusting, headers={"X-Tenant": "acme"})
    await predict(router, {"agents": {"b": BOB}}, trusting)
    assert [options["tenant"] for _, options in router.calls] == ["acme", ""]
    response = await predict(router, {"agents": {"b": BOB}}, trusting, headers={"X-Tenant": "x" * 257})
    assert response.status_code == 422


async def test_the_explanation_is_there_when_the_router_sends_one() -> None:
    def script(blocks: Sequence[pb.Block]) -> list[pb.Answer]:
        answers = sum_answers(blocks)
        answers[0].explanation.batch_rows = 5
        return answers

    response = await predict(FakeRouter(script), {"agents": {"a": ALICE}, "explain": True})
    assert response.json()["results"]["a"]["explanation"]["batch_rows"] == 5


# POST /predict, streams


async def test_ndjson_has_a_line_for_each_agent_and_a_last_one() -> None:
    body = {"agents": {"alice": ALICE, "carl": BAD, "bob": BOB}}
    response = await predict(FakeRouter(), body, headers={"Accept": "application/x-ndjson"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    bad = {"status": 422, "code": "INVALID_ARGUMENT", "detail": "vector is empty", "retry_after_s": None}
    assert [json.loads(line) for line in response.text.splitlines()] == [
        {"agent": "carl", "error": bad},
        {"agent": "alice", "output": [0.6]},
        {"agent": "bob", "output": [-1.0]},
        {"done": True},
    ]


async def test_server_sent_events_name_what_happened() -> None:
    router = FakeRouter(failing_by_model(model_b="NOT_FOUND"))
    response = await predict(
        router, {"agents": {"al\nice": ALICE, "bob": BOB}}, headers={"Accept": "text/event-stream"}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.text == (
        'event: result\ndata: {"agent":"al\\nice","output":[0.6]}\n\n'
        'event: error\ndata: {"agent":"bob","error":{"status":404,"code":"NOT_FOUND","detail":"model-b failed",'
        '"retry_after_s":null}}\n\n'
        'event: done\ndata: {"done":true}\n\n'
    )


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_stream_tells_every_agent_of_a_call_that_failed(accept: str) -> None:
    response = await predict(
        FakeRouter(failing("UNAVAILABLE")), {"agents": {"a": ALICE, "b": BOB}}, headers={"Accept": accept}
    )
    assert response.text.count('"status":503') == 2
    assert response.text.rstrip().endswith('{"done":true}')


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_stream_with_faulty_agents_only_ends_without_the_router(accept: str) -> None:
    router = FakeRouter()
    response = await predict(router, {"agents": {"a": BAD}}, headers={"Accept": accept})
    assert response.text.count('"status":422') == 1
    assert response.text.rstrip().endswith('{"done":true}')
    assert router.calls == []


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_fault_of_the_body_is_a_problem_also_for_a_stream(accept: str) -> None:
    response = await predict(FakeRouter(), {"agents": {}}, headers={"Accept": accept})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_bug_in_mid_stream_tells_the_rest_and_the_log(accept: str, caplog: pytest.LogCaptureFixture) -> None:
    router = FakeRouter(error=RuntimeError("secret"))
    response = await predict(router, {"agents": {"a": ALICE, "b": BOB}}, headers={"Accept": accept})
    assert response.text.count('"code":"INTERNAL"') == 2
    assert response.text.rstrip().endswith('{"done":true}')
    assert "secret" not in response.text
    assert "secret" in caplog.text


# Faults of the request


@pytest.mark.parametrize(
    ("content", "headers", "status", "fragment"),
    [
        (b"", {}, 400, "not JSON"),
        (b"{", {}, 400, "not JSON"),
        (b'{"agents": {"a": {"vector": [NaN], "model_name": "m"}}}', {}, 400, "NaN is not a JSON number"),
        (b"[" * 3_000, {}, 400, "nested too deeply"),
        (b"{}", {"Accept": "text/html"}, 406, "application/json, text/event-stream"),
        (b" " * 101, {}, 413, "more than 100 bytes"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type must be application/json"),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
        (b"{}", {}, 422, "exactly one of agents and text"),
        (b'{"text": "hi", "agents": {}}', {}, 422, "exactly one of agents and text"),
        (b'{"text": " "}', {}, 422, "text is blank"),
        (b'{"text": "hi"}', {"Accept": "text/event-stream"}, 406, "its events are at /jobs/{job_id}/events"),
        (b'{"text": "hi"}', {"Idempotency-Key": "a b"}, 422, "the Idempotency-Key must be a quoted string"),
        (b'{"agents": {"a": {}, "a": {}}}', {}, 422, 'the name "a" more than once'),
        (b'{"agents": {"\\ud800": {"model_name": "m", "vector": [1]}}}', {}, 422, "lone surrogate"),
        (b'{"agents": {"a": {"model_name": "m", "vector": [1e999]}}}', {}, 422, "not finite as a float32"),
    ],
)
async def test_a_fault_of_the_request_is_a_problem_document(
    content: bytes, headers: dict[str, str], status: int, fragment: str
) -> None:
    max_body_bytes = 100 if status == 413 else 10_000
    async with client_of(FakeRouter(), Settings(max_body_bytes=max_body_bytes)) as client:
        response = await client.post("/predict", content=content, headers=headers)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert fragment in json.dumps(document, ensure_ascii=False).replace('\\"', '"')
    assert document["status"] == status
    assert document["instance"] == "/predict"
    assert document["request_id"] == response.headers["x-request-id"]


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    async with client_of(FakeRouter(), Settings(max_body_bytes=100)) as client:
        body = json.dumps({"agents": {"a": ALICE}}).ljust(100)
        assert (await client.post("/predict", content=body)).status_code == 200
        assert (await client.post("/predict", content=body + " ")).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/predict", "POST"), ("POST", "/healthz", "GET, HEAD"), ("DELETE", "/", "GET, HEAD")],
)
async def test_a_wrong_method_is_told_the_right_ones(method: str, path: str, allow: str) -> None:
    async with client_of(FakeRouter()) as client:
        response = await client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    assert response.json()["title"] == "Method Not Allowed"


@pytest.mark.parametrize("path", ["/nope", "/predict/", "/jobs/", "/jobs/1/2", "/%00", "/%ff%fe"])
async def test_an_unknown_path_is_a_404_problem(path: str) -> None:
    async with client_of(FakeRouter()) as client:
        response = await client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["instance"] == path


async def test_the_unexpected_has_a_fixed_text_and_the_log_has_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    response = await predict(
        FakeRouter(error=RuntimeError("secret")), {"agents": {"a": ALICE}}, headers={"X-Request-Id": "id-7"}
    )
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert "request_id=id-7" in caplog.text


# Request ids, logs, metrics


@pytest.mark.parametrize(("sent", "is_kept"), [("abc-123", True), ("x" * 128, True), ("a b", True), ("x" * 129, False)])
async def test_a_request_id_of_128_printable_characters_is_kept(sent: str, is_kept: bool) -> None:
    async with client_of(FakeRouter()) as client:
        response = await client.get("/healthz", headers={"X-Request-Id": sent})
    assert (response.headers["x-request-id"] == sent) is is_kept


@pytest.mark.parametrize("sent", [b"a\tb", b"\xff", b"caf\xc3\xa9", b""])
async def test_any_other_request_id_is_replaced(sent: bytes) -> None:
    async with client_of(FakeRouter()) as client:
        response = await client.get("/healthz", headers=[(b"x-request-id", sent)])
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize(("log_requests", "logged"), [("off", []), ("errors", [404, 207]), ("all", [404, 200, 207])])
async def test_requests_are_logged_as_the_operator_asks(
    caplog: pytest.LogCaptureFixture, log_requests: Literal["off", "errors", "all"], logged: list[int]
) -> None:
    caplog.set_level(logging.INFO, "rest_gateway")
    async with client_of(FakeRouter(), Settings(log_requests=log_requests)) as client:
        await client.get("/nope")
        await client.get("/healthz")
        await client.post("/predict", json={"agents": {"a": ALICE, "c": BAD}}, headers={"X-Request-Id": "id-1"})
    assert [vars(record)["status"] for record in caplog.records] == logged
    if logged:
        assert "POST /predict 207" in caplog.text
        assert "agents=2 failed_agents=1 request_id=id-1" in caplog.text


async def test_metrics_count_requests_and_agents_under_bounded_labels() -> None:
    async with client_of(FakeRouter()) as client:
        await client.post("/predict", json={"agents": {"a": ALICE, "b": BOB, "c": BAD}})
        for path in ("/nope", "/nope/2", "/predict/x"):
            await client.get(path)
        await client.request("BREW", "/healthz")
        await client.get("/openapi.json")
        for number in range(3):  # a path below a mount is the client's own choice
            await client.get(f"/docs-assets/{number}")
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        'gateway_requests_total{method="POST",route="/predict",status="207"} 1.0',
        'gateway_requests_total{method="GET",route="unmatched",status="404"} 3.0',
        'gateway_requests_total{method="other",route="/healthz",status="405"} 1.0',
        'gateway_requests_total{method="GET",route="/openapi.json",status="200"} 1.0',
        'gateway_requests_total{method="GET",route="/docs-assets",status="404"} 3.0',
        'gateway_agents_total{code="OK"} 2.0',
        'gateway_agents_total{code="INVALID_ARGUMENT"} 1.0',
        'gateway_request_duration_seconds_count{route="/predict"} 1.0',
        "gateway_requests_in_flight 1.0",
    ):
        assert line in response.text.splitlines()


# Operations and the API document


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_says_that_the_loop_turns(method: str) -> None:
    async with client_of(FakeRouter(is_connected=False)) as client:
        assert (await client.request(method, "/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("is_connected", "has_tried", "is_draining", "status", "body"),
    [
        (True, True, False, 200, {"status": "ready", "router": "connected"}),
        (False, True, False, 503, {"status": "not ready", "router": "unreachable"}),
        (True, False, False, 503, {"status": "not ready", "router": "connected"}),
        (True, True, True, 503, {"status": "draining", "router": "connected"}),
        (False, False, True, 503, {"status": "draining", "router": "unreachable"}),
    ],
)
async def test_readiness_needs_a_router_and_a_look_for_jobs(
    is_connected: bool, has_tried: bool, is_draining: bool, status: int, body: dict[str, str]
) -> None:
    router = FakeRouter(is_connected=is_connected)
    parts = parts_of(router)
    parts.jobs.worker.has_tried_to_claim = has_tried
    if is_draining:
        parts.open_requests.start_drain()
    async with client_of(router, parts=parts) as client:
        response = await client.get("/readyz")
    assert (response.status_code, response.json()) == (status, body | {"database": "unknown"})
    assert ("close" in response.headers.get("connection", "")) is is_draining


@pytest.mark.parametrize(("is_away", "database"), [(True, "away"), (False, "connected"), (None, "unknown")])
async def test_readiness_names_the_database_and_does_without_it(is_away: bool | None, database: str) -> None:
    router = FakeRouter()
    parts = parts_of(router)
    parts.jobs.loops.is_database_away = is_away
    async with client_of(router, parts=parts) as client:
        response = await client.get("/readyz")
    assert (response.status_code, response.json()["database"]) == (200, database)


async def test_the_front_page_leads_to_the_documentation() -> None:
    async with client_of(FakeRouter()) as client:
        assert (await client.get("/")).headers["location"] == "/docs"
        assert "openapi.json" in (await client.get("/docs")).text


async def test_the_documentation_needs_nothing_from_the_internet() -> None:
    async with client_of(FakeRouter()) as client:
        page = (await client.get("/docs")).text
        assets = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(assets) == 3
        for asset in assets:
            assert (await client.get(asset)).status_code == 200


@pytest.mark.parametrize("name", list(openapi.PREDICT_BODY["content"]["application/json"]["examples"]))
@pytest.mark.parametrize("accept", list(openapi.PREDICT_RESPONSES[200]["content"]))
async def test_every_example_of_a_request_works(name: str, accept: str) -> None:
    example = openapi.PREDICT_BODY["content"]["application/json"]["examples"][name]["value"]
    response = await predict(FakeRouter(), example, headers={"Accept": accept})
    is_job_to_be_streamed = "text" in example and accept != "application/json"
    assert response.status_code in ((406,) if is_job_to_be_streamed else (200, 202, 207))


def as_the_mock(blocks: Sequence[pb.Block]) -> list[pb.Answer]:
    answers = []
    for number, block in enumerate(blocks):
        rows = np.frombuffer(block.vectors, "<f4").reshape(block.rows, block.dim)
        outputs = expected(block.model_name, block.agent_type, rows).tobytes()
        answers.append(pb.Answer(block=number, rows=block.rows, outputs=outputs, done=number == len(blocks) - 1))
    return answers


async def test_the_examples_of_answers_are_what_gateway_and_mock_answer() -> None:
    router = FakeRouter(script=as_the_mock)
    assert (await predict(router, openapi.THREE_AGENTS)).json() == openapi.ALL_ANSWERED
    assert (await predict(router, openapi.ONE_BAD_AGENT)).json() == openapi.SOME_ANSWERED
    events = await predict(router, openapi.ONE_BAD_AGENT, headers={"Accept": "text/event-stream"})
    assert events.text == openapi.SSE_STREAM
    lines = await predict(router, openapi.ONE_BAD_AGENT, headers={"Accept": "application/x-ndjson"})
    assert lines.text == openapi.NDJSON_STREAM


async def test_the_served_examples_keep_their_nulls() -> None:
    """FastAPI's get_openapi drops them, and with them a member that the schema requires."""
    async with client_of(FakeRouter()) as client:
        responses = (await client.get("/openapi.json")).json()["paths"]["/predict"]["post"]["responses"]
    errors = [
        error
        for answer in responses.values()
        for content in answer["content"].values()
        if isinstance(example := content.get("example"), dict)
        for error in (example.get("errors") or {}).values()
    ]
    assert len(errors) >= 5
    for error in errors:
        assert openapi.AgentError.model_validate(error).model_dump() == error


async def test_the_method_not_allowed_on_a_folder_of_files_names_those_that_are() -> None:
    async with client_of(FakeRouter()) as client:
        response = await client.delete("/docs-assets/swagger-ui.css")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


async def test_an_int_that_no_double_holds_is_its_agents_fault_whichever_parser_read_it() -> None:
    """The standard library's reader, which a nested field calls for, keeps such ints; packing them once was a 500."""
    huge = {"vector": [10**40], "model_name": "m", "meta": {"k": 1}}
    response = await predict(FakeRouter(), {"agents": {"alice": ALICE, "bob": huge}})
    assert response.status_code == 207
    assert response.json()["errors"]["bob"]["detail"] == "vector[0] is not finite as a float32"


async def test_the_example_of_every_problem_is_a_problem() -> None:
    for status, answer in openapi.PREDICT_RESPONSES.items():
        for content_type, content in answer["content"].items():
            if content_type == "application/problem+json":
                assert openapi.Problem.model_validate(content["example"]).status == status


async def test_the_api_document_has_all_answers_and_no_dangling_reference() -> None:
    async with client_of(FakeRouter()) as client:
        document = (await client.get("/openapi.json")).json()
    more = {path for _, path in (*openapi_jobs.JOB_OPERATIONS, *openapi_open_inference.OPERATIONS)}
    assert set(document["paths"]) == {"/predict", "/healthz", "/readyz", "/metrics"} | more
    assert set(document["paths"]["/predict"]["post"]["responses"]) == {
        str(status) for status in [*openapi.PREDICT_RESPONSES, 202]
    }
    references = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert references <= set(document["components"]["schemas"])
    assert {"PredictRequest", "PredictResponse", "Problem", "JobReceipt", "JobOut", "JobPage"} <= references
    assert {"InferRequest", "InferResponse", "ModelMetadata", "ModelEntry"} <= references
