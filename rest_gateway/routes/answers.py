"""Outcomes of agents to the body of an answer, for who waited and for who comes later."""

import logging
from collections.abc import Mapping, Sequence
from uuid import UUID

from fastapi import Response
from starlette.types import Scope

from rest_gateway.convert import Outcome
from rest_gateway.errors import Fault
from rest_gateway.jobs.records import JobError
from rest_gateway.jobs.tasks import INTERNAL_MESSAGE, End
from rest_gateway.routes import problems
from rest_gateway.routes.negotiation import MEDIA_TYPES
from rest_gateway.schemas import json_text

logger = logging.getLogger(__name__)


def answer(scope: Scope, names: Sequence[str], outcomes: Mapping[str, Outcome]) -> Response:
    """200, 207, or the problem when nobody has an output; agents in the order of the request."""
    results, agent_errors = _sort_out(names, outcomes, problems.INTERNAL_DETAIL)
    if not results:
        return problems.all_failed(scope, agent_errors)
    body = json_text.dump({"results": results, "errors": agent_errors})
    return Response(body, 207 if agent_errors else 200, media_type=MEDIA_TYPES["json"])


def end_of_job(job_id: UUID, names: Sequence[str], outcomes: Mapping[str, Outcome]) -> End:
    """The same body as the end of a job, which has failed only if every agent has."""
    results, agent_errors = _sort_out(names, outcomes, INTERNAL_MESSAGE)
    for fault in outcomes.values():
        if isinstance(fault, Fault) and fault.code == "INTERNAL":
            logger.error("internal error: %s job=%s", fault.detail, job_id)
    body = json_text.dump({"results": results, "errors": agent_errors})
    if results:
        return End(body)
    speakers, detail = problems.who_speaks(agent_errors)
    return End(body, JobError(speakers[0]["code"], detail))


def _sort_out(
    names: Sequence[str], outcomes: Mapping[str, Outcome], internal_detail: str
) -> tuple[dict[str, Outcome], dict[str, dict[str, object]]]:
    results: dict[str, Outcome] = {}
    agent_errors: dict[str, dict[str, object]] = {}
    for name in names:
        outcome = outcomes[name]
        if isinstance(outcome, Fault):
            agent_errors[name] = problems.agent_error(outcome, internal_detail)
        else:
            results[name] = outcome
    return results, agent_errors
