"""From what was observed to figures: percentiles, rates, medians over rounds, ratios within a round. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Figures:
    """One case, in one round or as the median of all. None: unknown, or the system has no such thing.

    CPU is that of the whole process with its children, per vector (or job); memory is the most that was seen.
    `load_busy` is the share of one core that the busiest load process used: near 1 it may have been the limit.
    `others_busy` is how many cores were used by processes that have no part in the case.
    """

    requests_per_s: float
    vectors_per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    router_us_per_vector: float | None = None
    gateway_us_per_vector: float | None = None
    mock_us_per_vector: float | None = None
    database_us_per_vector: float | None = None
    batch_rows: float | None = None
    router_rss_mb: float | None = None
    gateway_rss_mb: float | None = None
    load_busy: float | None = None
    others_busy: float | None = None
    ratio_to_echo: float | None = None  # of requests/s, same workload and callers, same round
    failed: int = 0
    failure: str = ""


def percentile_ms(latencies_us: Sequence[int], percent: float) -> float | None:
    """Linear between the two nearest, as numpy does it; None without latencies."""
    return float(np.percentile(latencies_us, percent)) / 1e3 if latencies_us else None


def us_per_vector(busy: float | None, vectors_per_s: float) -> float | None:
    """CPU microseconds per vector of a process that used `busy` cores."""
    return busy * 1e6 / vectors_per_s if busy is not None and vectors_per_s else None


def ratio(value: float, base: float) -> float | None:
    """None where there is nothing to compare with."""
    return value / base if base else None


def median_of(rounds: Sequence[Figures]) -> Figures:
    """Field by field, over the rounds that know it; failures are summed."""
    medians: dict[str, Any] = {
        field.name: _median([getattr(one, field.name) for one in rounds])
        for field in fields(Figures)
        if field.name not in ("failed", "failure")
    }
    failure = next((one.failure for one in rounds if one.failure), "")
    return Figures(**medians, failed=sum(one.failed for one in rounds), failure=failure)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
