"""Traffic: who asks when. Endless arrivals by chance, or those of a file; each in the order of time.

A recorded trace is a CSV file with a header. Columns: `at_s`, seconds from any origin, ascending; `rows` (1 without);
`key` (rows of different keys share slots and no batch); `timeout_s` (none without). For example:

    at_s,rows,key
    0.000,1,churn
    0.013,4,fraud
"""

import csv
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from router.simulate.engine import Arrival

BURST_ROWS = 10
# On/off traffic: ten times as much while it is on, for a minute each on the average.
ON_OFF_RATIO = 10
PHASE_S = 60.0


class BadTrace(ValueError):
    """The file cannot be used; the text says why."""


def poisson(rate: float, timeout_s: float, seed: int) -> Iterator[Arrival]:
    """Single rows without any memory, `rate` a second."""
    chance = random.Random(f"poisson {seed}")  # noqa: S311 (simulates, guards nothing)
    now = 0.0
    while True:
        now += chance.expovariate(rate)
        yield Arrival(now, timeout_s=timeout_s)


def bursts(rate: float, timeout_s: float, seed: int) -> Iterator[Arrival]:
    """Ten single rows at once, `rate` rows a second in all."""
    for arrival in poisson(rate / BURST_ROWS, timeout_s, seed):
        for _ in range(BURST_ROWS):
            yield Arrival(arrival.at, timeout_s=timeout_s)


def on_off(rate: float, timeout_s: float, seed: int) -> Iterator[Arrival]:
    """Poisson arrivals at ten times the rate for a while, then at a tenth of that; `rate` on the average."""
    chance = random.Random(f"on-off {seed}")  # noqa: S311
    high = rate * 2 * ON_OFF_RATIO / (1 + ON_OFF_RATIO)
    now = phase_ends = 0.0
    is_on = False
    while True:
        if now >= phase_ends:
            is_on = not is_on
            now, phase_ends = phase_ends, phase_ends + chance.expovariate(1 / PHASE_S)
        now += chance.expovariate(high if is_on else high / ON_OFF_RATIO)
        if now < phase_ends:
            yield Arrival(now, timeout_s=timeout_s)


ARRIVALS = {"poisson": poisson, "bursts": bursts, "on-off": on_off}


def read(path: Path, timeout_s: float) -> list[Arrival]:
    """The arrivals of a file, from 0 on; `timeout_s` for rows that have none of their own.

    Raises:
        BadTrace: it is not as said above, or empty.
        OSError: it cannot be read.
    """
    with path.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if "at_s" not in (reader.fieldnames or ()):
            raise BadTrace(f"{path}: the first line names no column at_s")
        arrivals = list(_parse(reader, path, timeout_s))
    if not arrivals:
        raise BadTrace(f"{path}: no arrivals")
    start = arrivals[0].at
    for arrival in arrivals:
        arrival.at -= start
    return arrivals


def _parse(reader: Iterable[dict[str, str]], path: Path, timeout_s: float) -> Iterator[Arrival]:
    latest = -math.inf
    for number, line in enumerate(reader, start=2):
        try:
            at, rows = float(line["at_s"]), int(line.get("rows") or 1)
            timeout = float(line.get("timeout_s") or timeout_s)
        except (TypeError, ValueError) as exc:
            raise BadTrace(f"{path}, line {number}: {exc}") from exc
        if not (math.isfinite(at) and at >= latest and rows > 0 and timeout > 0):
            raise BadTrace(f"{path}, line {number}: at_s must ascend, rows and timeout_s be positive")
        latest = at
        yield Arrival(at, rows, line.get("key") or "", timeout)
