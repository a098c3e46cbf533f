"""Jobs as JSON, and the cursors of their pages."""

import base64
import binascii
import datetime as dt
import struct
from uuid import UUID

import orjson

from rest_gateway.errors import InvalidRequestError
from rest_gateway.jobs.records import Cursor, Job, JobError, JobNotFound, Page

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_CURSOR = struct.Struct(">q16s")


def receipt_of(job: Job) -> dict[str, object]:
    """What a client needs to come back."""
    return {"job_id": str(job.id), "status": job.status}


def document_of(job: Job) -> dict[str, object]:
    """The job as its owner sees it; the result stands as the worker wrote it."""
    return {
        "job_id": str(job.id),
        "status": job.status,
        "kind": job.kind,
        "result": None if job.result is None else orjson.Fragment(job.result),
        "error": _error(job.error),
        "attempt": job.attempt,
        "version": job.version,
        "created_at": _time(job.created_at),
        "updated_at": _time(job.updated_at),
        "started_at": _time(job.started_at),
        "finished_at": _time(job.finished_at),
        "not_before": _time(job.not_before),
    }


def page_document(page: Page) -> dict[str, object]:
    """A page of the list."""
    cursor = page.next_cursor
    return {"jobs": list(map(document_of, page.jobs)), "next_cursor": None if cursor is None else encode_cursor(cursor)}


def _error(error: JobError | None) -> dict[str, str] | None:
    return None if error is None else {"code": error.code, "message": error.message}


def _time(instant: dt.datetime | None) -> str | None:
    """`2026-07-01T12:00:00.123Z`."""
    if instant is None:
        return None
    return instant.astimezone(dt.UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def parse_job_id(text: str) -> UUID:
    """Raises JobNotFound for what is no id: nobody has such a job."""
    try:
        job_id = UUID(text)
    except ValueError as exc:
        raise JobNotFound from exc
    if str(job_id) != text.lower():  # in braces, with "urn:uuid:", without hyphens
        raise JobNotFound
    return job_id


def encode_cursor(cursor: Cursor) -> str:
    """Opaque to clients, and safe in a URL."""
    packed = _CURSOR.pack((cursor.created_at - _EPOCH) // _MICROSECOND, cursor.id.bytes)
    return base64.urlsafe_b64encode(packed).decode()


def decode_cursor(text: str) -> Cursor:
    """Raises InvalidRequestError for what `encode_cursor` did not write."""
    try:
        microseconds, id_bytes = _CURSOR.unpack(base64.b64decode(text, altchars=b"-_", validate=True))
        return Cursor(_EPOCH + microseconds * _MICROSECOND, UUID(bytes=id_bytes))
    except (binascii.Error, struct.error, ValueError, OverflowError) as exc:
        raise InvalidRequestError("cursor must be a next_cursor of an earlier answer") from exc
