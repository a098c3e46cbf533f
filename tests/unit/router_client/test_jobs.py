"""Jobs as documents."""

import datetime as dt
from math import isnan
from typing import Any

import numpy as np
import pytest

from router_client import Agent, Internal, InvalidArgument, JobFailed, Unimplemented
from router_client.jobs import agents_body, read_job, read_results, text_body

DOCUMENT: dict[str, Any] = {
    "job_id": "01a2012f-986b-7f13-93a7-d92f03308a63",
    "status": "completed",
    "kind": "text",
    "result": {"sentiment": "positive", "confidence": 0.81195},
    "error": None,
    "attempt": 1,
    "version": 2,
    "created_at": "2026-07-01T12:00:00.157Z",
    "updated_at": "2026-07-01T12:00:05.200Z",
    "started_at": "2026-07-01T12:00:00.157Z",
    "finished_at": "2026-07-01T12:00:05.200Z",
    "not_before": None,
}
BODY = {
    "results": {"ann": {"output": [1.5, None]}},
    "errors": {"bob": {"status": 429, "code": "RESOURCE_EXHAUSTED", "detail": "full", "retry_after_s": 1.5}},
}


def test_a_document_becomes_a_job() -> None:
    job = read_job(DOCUMENT)
    assert job.id == DOCUMENT["job_id"]
    assert job.is_over
    assert job.created_at == dt.datetime(2026, 7, 1, 12, 0, 0, 157_000, dt.UTC)
    assert job.document == DOCUMENT
    assert job.raise_for_failure() is job


def test_a_receipt_becomes_a_job_of_the_kind_that_was_sent() -> None:
    job = read_job({"job_id": "1", "status": "pending"}, "agents")
    assert (job.kind, job.version, job.is_over) == ("agents", 0, False)


@pytest.mark.parametrize("document", [None, [], "job", {"job_id": "1"}, DOCUMENT | {"created_at": "noon"}])
def test_what_is_no_job_is_said_to_be_none(document: object) -> None:
    with pytest.raises(Internal, match="is no job"):
        read_job(document)


def test_a_failed_job_raises_its_error_and_that_of_its_agents() -> None:
    everyone = {"results": {}, "errors": BODY["errors"]}
    told = {"status": "failed", "kind": "agents", "result": everyone, "error": {"code": "UNKNOWN", "message": "bad"}}
    job = read_job(DOCUMENT | told)
    with pytest.raises(JobFailed, match="failed: bad") as caught:
        job.raise_for_failure()
    assert (caught.value.job, caught.value.code, list(caught.value.agents)) == (job, "UNKNOWN", ["bob"])


def test_a_cancelled_job_raises_too() -> None:
    with pytest.raises(JobFailed) as caught:
        read_job(DOCUMENT | {"status": "cancelled", "result": None}).raise_for_failure()
    assert caught.value.code == "CANCELLED"


def test_a_job_of_agents_has_results() -> None:
    results = read_job(DOCUMENT | {"kind": "agents", "result": BODY}).results()
    assert results["ann"].output[0] == 1.5
    assert isnan(results["ann"].output[1])
    error = results["bob"].error
    assert error is not None
    assert (error.code, error.message, error.retry_pushback_ms) == ("RESOURCE_EXHAUSTED", "full", 1500)


def test_a_job_of_a_text_has_none() -> None:
    with pytest.raises(Unimplemented, match="no results of agents"):
        read_job(DOCUMENT).results()


def test_explanations_come_along_and_newer_members_do_not_harm() -> None:
    why = {"queued_s": 0.1, "backend_s": 2, "batch_id": "b", "batch_rows": 3, "replica": "r", "attempts": 1, "new": 1}
    result = read_results({"results": {"ann": {"output": [1], "explanation": why}}, "errors": {}})["ann"]
    assert result.explanation is not None
    assert result.explanation.batch_rows == 3


def test_what_is_no_result_is_said_to_be_none() -> None:
    with pytest.raises(Internal, match="holds no results"):
        read_results({"errors": {}})


def test_bodies_leave_out_what_was_not_said() -> None:
    assert text_body("hi", None) == {"text": "hi"}
    assert agents_body({"ann": Agent("m", np.array([1, 2], np.float32))}, 5.0, "batch", explain=True) == {
        "agents": {"ann": {"vector": [1.0, 2.0], "model_name": "m", "agent_type": ""}},
        "timeout_s": 5.0,
        "priority_class": "batch",
        "explain": True,
    }


def test_a_vector_that_is_none_is_the_callers_mistake() -> None:
    for vector in (["x"], [None], [float("nan")], [10**400]):
        with pytest.raises(InvalidArgument, match="'ann'"):
            agents_body({"ann": Agent("m", vector)}, None, "batch", explain=False)  # type: ignore[arg-type]
