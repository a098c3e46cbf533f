"""Jobs as the gateway tells of them: JSON documents to records. Pure."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite, nan
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, cast

from router_client.blocks import Agent, AgentResult, Explanation
from router_client.errors import AgentError, Internal, InvalidArgument, RouterError, Unimplemented
from router_client.results import Results

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

JobStatus: TypeAlias = Literal["pending", "processing", "completed", "failed", "cancelled"]
JobKind: TypeAlias = Literal["text", "agents"]
Priority: TypeAlias = Literal["interactive", "batch"]
Document: TypeAlias = Mapping[str, Any]

# What a document of another form raises when it is read; the last of a number that is none, or infinite.
UNREADABLE = (KeyError, TypeError, AttributeError, ValueError, OverflowError)
_EXPLAINED = [field.name for field in fields(Explanation)]
TERMINAL: frozenset[JobStatus] = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: a canonical code by name, and a text."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the gateway told of it; `document` is what it said, word for word.

    ``version`` rises with each change of ``status``; ``attempt`` counts how often a gateway began it. Times are aware,
    UTC; a job that was just submitted has told its id and status only.
    """

    id: str
    status: JobStatus
    kind: JobKind
    result: dict[str, Any] | None = None
    error: JobError | None = None
    attempt: int = 0
    version: int = 0
    created_at: dt.datetime | None = None
    updated_at: dt.datetime | None = None
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None
    not_before: dt.datetime | None = None
    document: Document

    @property
    def is_over(self) -> bool:
        """True in a state that never changes: completed, failed or cancelled."""
        return self.status in TERMINAL

    def results(self) -> Results:
        """Return the results of a job of agents, as `predict` would have.

        Raises:
            Unimplemented: it is a job of another kind, or has no result.
        """
        if self.kind != "agents" or self.result is None:
            raise Unimplemented(f"job {self.id} of kind {self.kind} is {self.status} and has no results of agents")
        return read_results(self.result)

    def raise_for_failure(self) -> Self:
        """Return the job unless it failed or was cancelled. Agents may have failed all the same: see `results`.

        Raises:
            JobFailed: it has.
        """
        if self.status == "cancelled":
            raise JobFailed(self, "CANCELLED", f"job {self.id} was cancelled")
        if self.status == "failed":
            error = self.error or JobError("UNKNOWN", "")
            agents = self.results().errors if self.kind == "agents" and self.result is not None else None
            raise JobFailed(self, error.code, f"job {self.id} failed: {error.message}", agents)
        return self


class JobFailed(RouterError):
    """The job ended without success; ``code`` is its error's, or CANCELLED. ``job``: the job as it ended."""

    def __init__(self, job: Job, code: str, message: str, agents: Mapping[str, AgentError] | None = None) -> None:
        super().__init__(message, code=code, agents=agents)
        self.args = (job, code, message)  # what a pickle is made of again
        self.job = job


def read_job(document: object, kind: JobKind = "text") -> Job:
    """Return the job in a document or receipt; ``kind`` where it does not tell.

    Raises:
        Internal: it is none.
    """
    try:
        told = cast("Document", document)
        error = told.get("error")
        return Job(
            id=told["job_id"],
            status=told["status"],
            kind=told.get("kind", kind),
            result=told.get("result"),
            error=None if error is None else JobError(error["code"], error["message"]),
            attempt=told.get("attempt", 0),
            version=told.get("version", 0),
            created_at=_time(told.get("created_at")),
            updated_at=_time(told.get("updated_at")),
            started_at=_time(told.get("started_at")),
            finished_at=_time(told.get("finished_at")),
            not_before=_time(told.get("not_before")),
            document=told,
        )
    except UNREADABLE as exc:
        raise Internal(f"the gateway's answer is no job: {exc!r}") from exc


def read_results(body: Document) -> Results:
    """Return the results in the body of an answer over REST.

    Raises:
        Internal: it is none.
    """
    try:
        answered = {name: _result(told) for name, told in body["results"].items()}
        return Results(answered | {name: AgentResult([], error) for name, error in read_errors(body).items()})
    except UNREADABLE as exc:
        raise Internal(f"the gateway's answer holds no results: {exc!r}") from exc


def read_errors(body: Document) -> dict[str, AgentError]:
    """Return the errors of agents in a body or problem document."""
    return {name: _error(told) for name, told in (body.get("errors") or {}).items()}


def text_body(text: str, job_timeout_s: float | None) -> dict[str, Any]:
    """Return the body that submits a text."""
    return _without_none({"text": text, "timeout_s": job_timeout_s})


def agents_body(
    agents: Mapping[str, Agent], job_timeout_s: float | None, priority: Priority, *, explain: bool
) -> dict[str, Any]:
    """Return the body that submits agents.

    Raises:
        InvalidArgument: a vector holds what is no number, or none that JSON can hold.
    """
    told = {
        name: {"vector": _numbers(name, agent.vector), "model_name": agent.model_name, "agent_type": agent.agent_type}
        for name, agent in agents.items()
    }
    extras = {"timeout_s": job_timeout_s, "priority_class": priority, "explain": explain or None}
    return _without_none({"agents": told, **extras})


def _numbers(name: str, vector: "Sequence[float] | npt.NDArray[np.float32]") -> list[float]:
    try:
        numbers = [float(value) for value in vector]
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidArgument(f"agent {name!r}: {exc}") from exc
    if not all(map(isfinite, numbers)):
        raise InvalidArgument(f"agent {name!r}: every value must be finite")
    return numbers


def _without_none(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None}


def _result(told: Document) -> AgentResult:
    """JSON knows no NaN and no infinity; the gateway writes null for either."""
    output = [nan if value is None else value for value in told["output"]]
    why = told.get("explanation")
    return AgentResult(output, None, None if why is None else Explanation(**{name: why[name] for name in _EXPLAINED}))


def _error(told: Document) -> AgentError:
    after_s = told.get("retry_after_s")
    return AgentError(told["code"], told["detail"], None if after_s is None else round(after_s * 1000))


def _time(text: str | None) -> dt.datetime | None:
    return None if text is None else dt.datetime.fromisoformat(text)
