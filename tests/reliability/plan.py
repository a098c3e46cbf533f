"""The rows of the reliability plan: what is run, in small and at the full counts."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from tests.reliability.cancels import cancels
from tests.reliability.kills import kills
from tests.reliability.report import Report


class Entry(NamedTuple):
    """A scenario and its counts."""

    row: int
    run: Callable[..., Awaitable[Report]]
    small: Mapping[str, Any]
    full: Mapping[str, Any]


PLAN: Mapping[str, Entry] = {
    "kills": Entry(
        2,
        kills,
        {"count": 20, "calls_per_s": 60, "pause_s": (0.2, 0.6)},
        {"count": 500, "calls_per_s": 60, "pause_s": (0.5, 3.0)},
    ),
    "cancels": Entry(8, cancels, {"count": 2_000, "floods": 8}, {"count": 100_000, "floods": 200}),
}
