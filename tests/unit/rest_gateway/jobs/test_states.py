"""The transition table: every pair of status and event, and what it promises as a whole."""

import pytest

from rest_gateway.jobs.records import Status
from rest_gateway.jobs.states import LIVE, SOURCES, STATUSES, TARGET, TERMINAL, Event, after

NONE = None


@pytest.mark.parametrize(
    ("event", "pending", "processing"),
    [
        (Event.CLAIM, "processing", NONE),
        (Event.COMPLETE, NONE, "completed"),
        (Event.FAIL, NONE, "failed"),
        (Event.RELEASE, NONE, "pending"),
        (Event.LOSE, NONE, "pending"),
        (Event.ABANDON, NONE, "failed"),
        (Event.EXPIRE, "failed", "failed"),
        (Event.CANCEL, "cancelled", "cancelled"),
    ],
)
def test_each_event_leads_where_it_should(event: Event, pending: Status | None, processing: Status | None) -> None:
    assert after("pending", event) == pending
    assert after("processing", event) == processing


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_nothing_leads_out_of_a_terminal_state(status: Status, event: Event) -> None:
    assert after(status, event) is None


def test_every_event_is_in_the_table_and_every_status_is_live_or_terminal() -> None:
    assert set(SOURCES) == set(TARGET) == set(Event)
    assert set(STATUSES) == LIVE | TERMINAL
    assert not LIVE & TERMINAL


@pytest.mark.parametrize("status", sorted(LIVE))
def test_every_terminal_state_can_be_reached_from_every_live_one(status: Status) -> None:
    reached: set[Status] = {status}
    for _ in STATUSES:
        reached |= {target for source in reached for event in Event if (target := after(source, event)) is not None}
    assert reached >= TERMINAL
