"""Choose a replica for the next batch: the least loaded one that can take it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """One replica as the choice sees it.

    `in_flight`: its batches of the model; `in_flight_total`: of all models; `can_take`: connected, not pausing, with a
    free slot for the model; `predicted_s`: how long it will take for the batch, 0 while unknown; `preference`: the
    lowest is chosen first, whatever is in flight.
    """

    in_flight: int
    in_flight_total: int
    can_take: bool
    predicted_s: float = 0.0
    preference: int = 0


def choose(loads: Sequence[Load]) -> int | None:
    """The index of the most preferred replica, of these the one with the least in flight, first of the model, then
    altogether; of several the fastest, of these the first. None if none can.
    """
    able = [number for number, load in enumerate(loads) if load.can_take]
    return min(able, key=lambda number: _weight(loads[number]), default=None)


def _weight(load: Load) -> tuple[int, int, int, float]:
    return load.preference, load.in_flight, load.in_flight_total, load.predicted_s
