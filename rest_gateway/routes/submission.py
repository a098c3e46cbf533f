"""POST /predict, answered by a job: texts, and agents whose client prefers not to wait."""

from fastapi import Request, Response

from rest_gateway.config import Settings
from rest_gateway.errors import NotAcceptableError
from rest_gateway.jobs.records import Job, JobNotFound, Kind, NewJob, StoreUnavailable, Submitted
from rest_gateway.jobs.service import TERMINAL, Jobs
from rest_gateway.routes import answers
from rest_gateway.routes.job_documents import document_of, receipt_of
from rest_gateway.routes.lifetime import Lifetime
from rest_gateway.routes.negotiation import MEDIA_TYPES, Form
from rest_gateway.routes.preferences import Preferences, read_idempotency_key, read_preferences
from rest_gateway.schemas import json_text
from rest_gateway.schemas.jobs import encode_agents, encode_text, fingerprint
from rest_gateway.schemas.predict import PredictCall, TextCall

DEFAULT_TENANT = "default"


class Submission:
    """Makes jobs of requests."""

    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self._jobs = jobs
        self._settings = settings

    async def answer(
        self, request: Request, call: PredictCall | TextCall, form: Form, tenant: str, lifetime: Lifetime
    ) -> Response:
        """202, or 200 with the job that ended while the client waited, or that its Idempotency-Key found."""
        if form != "json":
            raise NotAcceptableError("a job is answered with application/json; its events are at /jobs/{job_id}/events")
        if isinstance(call, PredictCall) and not call.rows:  # nobody can travel, so there is nothing to do later
            return answers.answer(request.scope, call.names, call.faults)
        preferences = read_preferences(request.headers)
        job = self._new_job(call, tenant or DEFAULT_TENANT, read_idempotency_key(request.headers))
        submitted = await self._jobs.submit(job)
        lifetime.watch(request.receive)
        return _respond(submitted, await self._wait(submitted.job, preferences), preferences)

    def _new_job(self, call: PredictCall | TextCall, tenant: str, key: str | None) -> NewJob:
        kind: Kind = "text" if isinstance(call, TextCall) else "agents"
        data = encode_text(call) if isinstance(call, TextCall) else encode_agents(call)
        longest_s = self._settings.job_timeout_s
        return NewJob(
            kind=kind,
            input=data,
            timeout_s=longest_s if call.timeout_s is None else min(call.timeout_s, longest_s),
            tenant=tenant,
            idempotency_key=key,
            fingerprint=b"" if key is None else fingerprint(kind, data),
        )

    async def _wait(self, job: Job, preferences: Preferences) -> Job:
        """The job as it is when the client waits no more. It stands: whatever keeps us from seeing it is no failure."""
        if not preferences.wait_s or job.status in TERMINAL:
            return job
        try:
            return await self._jobs.wait(job.id, job.tenant, preferences.wait_s)
        except (StoreUnavailable, JobNotFound):
            return job


def _respond(submitted: Submitted, job: Job, preferences: Preferences) -> Response:
    is_repeated = not submitted.is_new and not preferences.wait_s
    path = f"/jobs/{job.id}"
    headers = {"Location": path, "Vary": "Prefer", **preferences.applied()}
    if is_repeated or job.status in TERMINAL:
        return _json(200, document_of(job), headers | {"Content-Location": path})
    return _json(202, receipt_of(job), headers)


def _json(status: int, document: dict[str, object], headers: dict[str, str]) -> Response:
    return Response(json_text.dump(document), status, headers, media_type=MEDIA_TYPES["json"])
