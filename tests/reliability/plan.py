"""The rows of the reliability plan: what is run, in small and at the full counts."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from tests.reliability.bad_answers import bad_answers
from tests.reliability.cancels import cancels
from tests.reliability.kills import freezes, kills
from tests.reliability.overload import flood, overload
from tests.reliability.poison import crashes, poison
from tests.reliability.report import Report
from tests.reliability.sick import flapping, slow

LEVELS = (1.2, 2.0, 4.0, 10.0)


class Entry(NamedTuple):
    """A scenario and its counts."""

    row: int
    run: Callable[..., Awaitable[Report]]
    small: Mapping[str, Any]
    full: Mapping[str, Any]


# Isolation costs calls whatever the scheme, so poison is offered at a few per cent of what clean rows would allow: 64
# rows of four replicas in 7.5 ms, or 35 ms, make 34,000 and 7,300 rows/s.
PLAN: Mapping[str, Entry] = {
    "kills": Entry(
        2,
        kills,
        {"count": 20, "calls_per_s": 60, "pause_s": (0.1, 0.4)},
        {"count": 500, "calls_per_s": 60, "pause_s": (0.5, 3.0)},
    ),
    "freezes": Entry(
        3,
        freezes,
        {"count": 2, "calls_per_s": 40, "frozen_s": 3.5},
        {"count": 50, "calls_per_s": 40, "frozen_s": 20.0},
    ),
    "bad-answers": Entry(4, bad_answers, {"strikes": 2, "window_s": 0.5}, {"strikes": 100, "window_s": 10.0}),
    "poison-few": Entry(
        6,
        poison,
        {"rows": 4_000, "share": 0.002, "latency": "0.005-0.01", "rows_per_s": 1_000},
        {"rows": 100_000, "share": 0.001, "latency": "0.02-0.05", "rows_per_s": 500},
    ),
    "poison-many": Entry(
        6,
        poison,
        {"rows": 3_000, "share": 0.01, "latency": "0.005-0.01", "rows_per_s": 1_000},
        {"rows": 100_000, "share": 0.01, "latency": "0.02-0.05", "rows_per_s": 500},
    ),
    "poison-named": Entry(
        6,
        poison,
        {"rows": 3_000, "share": 0.01, "latency": "0.005-0.01", "rows_per_s": 1_000, "is_named": True},
        {"rows": 100_000, "share": 0.01, "latency": "0.02-0.05", "rows_per_s": 500, "is_named": True},
    ),
    "crashes": Entry(
        6,
        crashes,
        {"rows": 3_000, "share": 0.001, "latency": "0.01-0.02", "rows_per_s": 600},
        {"rows": 200_000, "share": 0.0001, "latency": "0.02-0.05", "rows_per_s": 500},
    ),
    "cancels": Entry(8, cancels, {"count": 2_000, "floods": 5}, {"count": 100_000, "floods": 200}),
    "overload": Entry(10, overload, {"levels": (1.2, 4.0, 10.0), "seconds": 2.0}, {"levels": LEVELS, "seconds": 600.0}),
    "flood": Entry(11, flood, {"seconds": 2.5, "times": 100.0}, {"seconds": 600.0, "times": 100.0}),
    # Ejected for longer than the small windows last: in so few seconds one trial of a replica that fails weighs much.
    "slow": Entry(14, slow, {"seconds": 2.5, "ejection_s": 5.0}, {"seconds": 300.0, "ejection_s": 30.0}),
    "flapping": Entry(14, flapping, {"seconds": 2.5, "ejection_s": 5.0}, {"seconds": 300.0, "ejection_s": 30.0}),
}
