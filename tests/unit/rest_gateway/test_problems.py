"""Problem documents: the table of codes, who speaks for all, and when to come back."""

import itertools
import json
from typing import Any

import pytest
from starlette.types import Scope

from rest_gateway import errors
from rest_gateway.errors import Fault, GatewayError
from rest_gateway.routes import problems
from rest_gateway.routes.record import open_record


@pytest.fixture
def scope() -> Scope:
    scope: Scope = {"type": "http", "path": "/predict", "raw_path": b"/predict%20?x=1"}
    open_record(scope, "id-1")
    return scope


def all_failed(scope: Scope, *faults: Fault) -> tuple[dict[str, Any], dict[str, str]]:
    agent_errors = {str(index): problems.agent_error(fault) for index, fault in enumerate(faults)}
    response = problems.all_failed(scope, agent_errors)
    return json.loads(bytes(response.body)), dict(response.headers)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("INVALID_ARGUMENT", 422),
        ("NOT_FOUND", 404),
        ("DEADLINE_EXCEEDED", 504),
        ("RESOURCE_EXHAUSTED", 429),
        ("UNAVAILABLE", 503),
        ("CANCELLED", 499),
        ("UNAUTHENTICATED", 401),
        ("PERMISSION_DENIED", 403),
        ("ABORTED", 409),
        ("UNKNOWN", 502),
        ("UNIMPLEMENTED", 501),
    ],
)
def test_each_code_has_its_status_and_keeps_its_text(scope: Scope, code: str, status: int) -> None:
    error = problems.agent_error(Fault(code, "because"))
    assert error == {"status": status, "code": code, "detail": "because", "retry_after_s": None}
    document, _ = all_failed(scope, Fault(code, "because"), Fault(code, "because"))
    assert (document["status"], document["detail"]) == (status, "because")


def test_an_internal_error_has_a_fixed_text_and_the_log_has_the_rest(
    scope: Scope, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [Fault("INTERNAL", "secret"), Fault("INTERNAL", "secret"), Fault("NOT_FOUND", "open")]
    assert problems.agent_error(faults[0])["detail"] == problems.INTERNAL_DETAIL
    problems.log_internal(scope, faults)
    assert [record.getMessage() for record in caplog.records] == ["internal error: secret request_id=id-1"]


@pytest.mark.parametrize("code", ["FAILED_PRECONDITION", "OUT_OF_RANGE", "", "WHAT"])
def test_a_code_that_no_table_holds_is_unknown(code: str) -> None:
    error = problems.agent_error(Fault(code, "x"))
    assert (error["status"], error["code"]) == (502, "UNKNOWN")


def test_every_status_that_a_code_can_have_has_its_place_in_the_precedence() -> None:
    assert sorted(problems.PRECEDENCE) == sorted(problems.STATUS_OF_CODE.values())


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(problems.PRECEDENCE, 2)))
def test_of_two_statuses_the_one_with_precedence_speaks(scope: Scope, first: int, second: int) -> None:
    code_of = {status: code for code, status in problems.STATUS_OF_CODE.items()}
    document, _ = all_failed(scope, Fault(code_of[second], "b"), Fault(code_of[first], "a"))
    assert document["status"] == first
    assert document["detail"] == "all 2 agents failed; errors tells why, agent by agent"
    assert list(document["errors"]) == ["0", "1"]


def test_a_problem_has_every_member_of_the_rfc_and_ours(scope: Scope) -> None:
    document, headers = all_failed(scope, Fault("NOT_FOUND", "no such model"))
    assert headers["content-type"] == "application/problem+json"
    assert document == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "no such model",
        "instance": "/predict%20",
        "request_id": "id-1",
        "errors": {"0": {"status": 404, "code": "NOT_FOUND", "detail": "no such model", "retry_after_s": None}},
    }


@pytest.mark.parametrize(
    ("retry_after_s", "header"), [(None, "1"), (0.0, "0"), (0.001, "1"), (1.0, "1"), (1.001, "2"), (59.5, "60")]
)
@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_back_pressure_says_when_to_come_back_in_whole_seconds_rounded_up(
    scope: Scope, code: str, retry_after_s: float | None, header: str
) -> None:
    document, headers = all_failed(scope, Fault(code, "full", retry_after_s))
    assert headers["retry-after"] == header
    assert document["errors"]["0"]["retry_after_s"] == retry_after_s


def test_the_latest_of_the_speakers_retry_times_counts(scope: Scope) -> None:
    busy = [Fault("RESOURCE_EXHAUSTED", "full", seconds) for seconds in (0.5, 2.5, None)]
    _, headers = all_failed(scope, *busy, Fault("NOT_FOUND", "x", 100.0))
    assert headers["retry-after"] == "3"


def test_other_statuses_have_no_retry_time(scope: Scope) -> None:
    _, headers = all_failed(scope, Fault("NOT_FOUND", "x", 1.0))
    assert "retry-after" not in headers


def test_every_gateway_error_has_a_status() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, GatewayError) and value is not GatewayError
    }
    assert set(problems.STATUS_OF_ERROR) == classes
