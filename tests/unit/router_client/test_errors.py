"""The exceptions: their codes, and that they survive a pickle."""

import pickle

import pytest

from router_client import AgentError, DeadlineExceeded, Job, JobFailed, ModelFailed, RouterError, Unavailable
from router_client.errors import error_of


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "INTERNAL", "UNIMPLEMENTED"])
def test_a_code_has_a_class_of_its_own(code: str) -> None:
    error = error_of(code, "why")
    assert (type(error).code, error.code, str(error)) == (code, code, f"{code}: why")
    assert type(error) is not RouterError


def test_a_models_own_error_is_unknown_on_the_wire() -> None:
    assert type(error_of("UNKNOWN", "too large")) is ModelFailed


def test_a_code_without_a_class_is_kept() -> None:
    error = error_of("DATA_LOSS", "gone")
    assert (type(error), error.code) == (RouterError, "DATA_LOSS")


def test_a_deadline_is_a_timeout_too() -> None:
    assert isinstance(error_of("DEADLINE_EXCEEDED", "late"), TimeoutError)
    assert issubclass(DeadlineExceeded, RouterError)


def test_errors_survive_a_pickle() -> None:
    agents = {"ann": AgentError("UNAVAILABLE", "away", 1500)}
    error = pickle.loads(pickle.dumps(Unavailable("away", retry_after_s=1.5, agents=agents)))
    assert (type(error), str(error), error.retry_after_s, error.agents) == (
        Unavailable,
        "UNAVAILABLE: away",
        1.5,
        agents,
    )
    job = Job(id="1", status="cancelled", kind="text", document={})
    failed = pickle.loads(pickle.dumps(JobFailed(job, "CANCELLED", "job 1 was cancelled")))
    assert (failed.job, failed.code, failed.message) == (job, "CANCELLED", "job 1 was cancelled")
