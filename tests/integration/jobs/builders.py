"""Jobs for the store's tests."""

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from rest_gateway.jobs.records import Claimed, Finished, Job, JobError, NewJob
from rest_gateway.jobs.store import SqlJobStore


def text_job(text: str = "fine", **fields: Any) -> NewJob:  # noqa: ANN401 - of NewJob
    """A text job; with a key it has the fingerprint of its text."""
    body = f'{{"text":"{text}"}}'.encode()
    fingerprint = hashlib.sha256(body).digest() if fields.get("idempotency_key") else b""
    defaults: dict[str, Any] = {"kind": "text", "input": body, "timeout_s": 3600.0, "fingerprint": fingerprint}
    return NewJob(**(defaults | fields))


async def submit(store: SqlJobStore, text: str = "fine", **fields: Any) -> Job:  # noqa: ANN401 - of NewJob
    """A pending job."""
    return (await store.submit(text_job(text, **fields), worker=None)).job


async def claim(store: SqlJobStore, worker: str = "w", limit: int = 100) -> list[Claimed]:
    """What there is to claim."""
    claimed, _ = await store.claim(worker, limit)
    return claimed


async def claim_one(store: SqlJobStore, worker: str = "w") -> Claimed:
    """The one job that there is."""
    [claimed] = await claim(store, worker)
    return claimed


def completed(claimed: Claimed, result: bytes = b'{"ok":true}') -> Finished:
    """Its good end."""
    return Finished(id=claimed.id, attempt=claimed.attempt, status="completed", result=result)


def failed(claimed: Claimed, message: str = "the model failed") -> Finished:
    """Its bad end."""
    return Finished(id=claimed.id, attempt=claimed.attempt, status="failed", error=JobError("INTERNAL", message))


def held(claimed: Sequence[Claimed]) -> list[tuple[UUID, int]]:
    """As renew and release take them."""
    return [(job.id, job.attempt) for job in claimed]
