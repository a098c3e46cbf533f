"""What is noted of a request on its way, for its log line, its metrics and its problem documents."""

from dataclasses import dataclass

from starlette.types import Scope

_KEY = "rest_gateway.record"


@dataclass(slots=True)
class Record:
    """One request. `status` is what the client got, or 499 when it left first."""

    request_id: str
    status: int = 500
    agents: int = 0
    failed_agents: int = 0


def open_record(scope: Scope, request_id: str) -> Record:
    """A new record, kept in the scope."""
    record = Record(request_id)
    scope[_KEY] = record
    return record


def record_of(scope: Scope) -> Record:
    """The record of a request that is being answered."""
    record: Record = scope[_KEY]
    return record
