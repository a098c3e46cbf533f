"""The life of a job, as a table. Nothing else says which status may follow which.

    pending ──claim──► processing ──complete──► completed
       ▲                   │ │ └───fail, abandon──► failed
       └──release, lose────┘ │                        ▲
       │                     └──────────expire────────┤
       ├────────────────────────────────expire────────┘
       └──cancel──► cancelled ◄──cancel── processing

A job is stored as pending, or as processing by a worker that claims it in the same breath. `completed`, `failed` and
`cancelled` are terminal: no event leads out of them, so whatever comes second changes nothing, and every job ends in
exactly one of them. An attempt's own events (complete, fail, release) count only while `attempt` is what its claim made
it: the store adds that fence, and raises `version` with every transition.

Knows no database. The store turns a row of the table into `UPDATE … SET status = target WHERE status IN (sources)`.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from rest_gateway.jobs.records import Status


class Event(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"  # a worker takes it: attempt + 1
    COMPLETE = "complete"  # its worker has a result
    FAIL = "fail"  # its worker says it cannot be done
    RELEASE = "release"  # its worker gives it back: back-pressure, drain
    LOSE = "lose"  # its worker let the lease run out
    ABANDON = "abandon"  # the same, once too often
    EXPIRE = "expire"  # its own deadline is over
    CANCEL = "cancel"  # its owner does not want it any more


_PENDING: Final[frozenset[Status]] = frozenset({"pending"})
_PROCESSING: Final[frozenset[Status]] = frozenset({"processing"})

LIVE: Final[frozenset[Status]] = _PENDING | _PROCESSING
TERMINAL: Final[frozenset[Status]] = frozenset({"completed", "failed", "cancelled"})
STATUSES: Final[tuple[Status, ...]] = ("pending", "processing", "completed", "failed", "cancelled")

SOURCES: Final[Mapping[Event, frozenset[Status]]] = MappingProxyType(
    {
        Event.CLAIM: _PENDING,
        Event.COMPLETE: _PROCESSING,
        Event.FAIL: _PROCESSING,
        Event.RELEASE: _PROCESSING,
        Event.LOSE: _PROCESSING,
        Event.ABANDON: _PROCESSING,
        Event.EXPIRE: LIVE,
        Event.CANCEL: LIVE,
    }
)

TARGET: Final[Mapping[Event, Status]] = MappingProxyType(
    {
        Event.CLAIM: "processing",
        Event.COMPLETE: "completed",
        Event.FAIL: "failed",
        Event.RELEASE: "pending",
        Event.LOSE: "pending",
        Event.ABANDON: "failed",
        Event.EXPIRE: "failed",
        Event.CANCEL: "cancelled",
    }
)


def after(status: Status, event: Event) -> Status | None:
    """The status that follows, or None where the event changes nothing."""
    return TARGET[event] if status in SOURCES[event] else None
