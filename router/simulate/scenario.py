"""One question to the simulator and its answer: settings in, figures out. Pure, and the same for the same seed."""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from router.core.policy import Policy, WorkConserving
from router.simulate.engine import Arrival, ClosedLoop, Outcome, Setup, Simulation
from router.simulate.traces import ARRIVALS, read

POLICIES: dict[str, Callable[[float], Policy]] = {
    "plain": lambda delay_s: WorkConserving(delay_s, even_gap=False, return_wave=False),
    "even-gap": lambda delay_s: WorkConserving(delay_s, return_wave=False),
    "return-wave": lambda delay_s: WorkConserving(delay_s, even_gap=False),
    "full": WorkConserving,
}
"""The releases that are compared: without the long holds, with one, and the router's own."""

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SERVICE = re.compile(
    rf"(?:lognormal:{_NUMBER}:{_NUMBER}|{_NUMBER}-{_NUMBER}|{_NUMBER})(?:\+{_NUMBER}\*rows)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Service:
    """How long the model takes: a time of its own, and `per_row_s` for each row.

    The time is uniform between `low_s` and `high_s`; with `sigma`, lognormal with the mean `low_s` instead.
    """

    low_s: float
    high_s: float
    sigma: float = 0.0
    per_row_s: float = 0.0

    def __str__(self) -> str:
        spread = f"{self.low_s:g}" if self.low_s == self.high_s else f"{self.low_s:g}-{self.high_s:g}"
        base = f"lognormal:{spread}:{self.sigma:g}" if self.sigma else spread
        return f"{base}+{self.per_row_s:g}*rows" if self.per_row_s else base

    @property
    def base_s(self) -> float:
        """The mean time without the rows: beta."""
        return (self.low_s + self.high_s) / 2

    def mean_s(self, rows: int) -> float:
        """S(b)."""
        return self.base_s + self.per_row_s * rows

    def draw_s(self, chance: random.Random, rows: int) -> float:
        """One call's."""
        if self.sigma:
            base_s = self.low_s * math.exp(chance.gauss(0, self.sigma) - self.sigma * self.sigma / 2)
        else:
            base_s = chance.uniform(self.low_s, self.high_s)
        return base_s + self.per_row_s * rows


def parse_service(text: str) -> Service:
    """`5` constant, `3-7` uniform, `lognormal:5:0.2` (mean, sigma); each with `+0.00035*rows`. Raises ValueError."""
    match = _SERVICE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"{text!r} is not like 5, 3-7, lognormal:5:0.2 or 0.005+0.00035*rows")
    mean, sigma, low, high, constant, per_row = (float(group) if group else 0.0 for group in match.groups())
    if mean:
        low = high = mean
    elif constant:
        low = high = constant
    if not 0 < low <= high:
        raise ValueError(f"{text!r}: a call takes more than nothing, and the lower end is not the higher")
    return Service(low, high, sigma, per_row)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who asks: `rate` rows a second that arrive as `arrivals` says, `callers` in a closed loop, a recorded trace."""

    rate: float = 0.0
    arrivals: str = "poisson"
    callers: int = 0
    pause_s: tuple[float, float] = (0.001, 0.005)
    trace: Path | None = None
    timeout_s: float = math.inf

    def open(self, seed: int) -> Iterable[Arrival]:
        """What comes whatever is answered."""
        if self.trace:
            return read(self.trace, self.timeout_s)
        return ARRIVALS[self.arrivals](self.rate, self.timeout_s, seed) if self.rate else ()

    def closed(self) -> ClosedLoop | None:
        """Who asks again when he is answered, after a pause between the two ends."""
        low, high = self.pause_s
        loop = ClosedLoop(self.callers, lambda chance: chance.uniform(low, high), self.timeout_s)
        return loop if self.callers else None


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated."""

    traffic: Traffic
    service: Service
    policy: str = "full"
    replicas: int = 1
    max_in_flight: int = 1
    max_batch_size: int = 64
    max_queue_delay_s: float = 0.002
    max_queued_rows: int = 65_536
    seconds: float = 600.0
    warm_up_s: float = 60.0
    seed: int = 0

    @property
    def slots(self) -> int:
        """R."""
        return self.replicas * self.max_in_flight

    @property
    def capacity(self) -> float:
        """Rows per second that full batches make possible: the sum of B / S(B) over the slots."""
        return self.slots * self.max_batch_size / self.service.mean_s(self.max_batch_size)

    def busy_mean_s(self, rate: float) -> float:
        """The mean latency that evenly spaced batches have at `rate`: (1 + 1/(2R)) beta / (1 - rate alpha / R)."""
        left = 1 - rate * self.service.per_row_s / self.slots
        return (1 + 1 / (2 * self.slots)) * self.service.base_s / left if left > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it; rates in rows per second, over the time after the warm-up. Latencies NaN without an answer."""

    arrived: float
    answered: float
    goodput: float
    expired_share: float
    refused_share: float
    mean_s: float
    p50_s: float
    p99_s: float
    batch_mean: float
    batch_p10: float
    batch_p90: float


def run(scenario: Scenario) -> Figures:
    """Simulate."""
    return summarize(simulate(scenario), scenario.seconds - scenario.warm_up_s)


def simulate(scenario: Scenario) -> Outcome:
    """Every latency and every batch."""
    setup = Setup(
        policy=lambda: POLICIES[scenario.policy](scenario.max_queue_delay_s),
        service_s=scenario.service.draw_s,
        replicas=scenario.replicas,
        max_in_flight=scenario.max_in_flight,
        max_batch_size=scenario.max_batch_size,
        max_queued_rows=scenario.max_queued_rows,
        closed_loop=scenario.traffic.closed(),
        warm_up_s=scenario.warm_up_s,
        seed=scenario.seed,
    )
    return Simulation(setup, scenario.traffic.open(scenario.seed)).run(scenario.seconds)


def summarize(outcome: Outcome, seconds: float) -> Figures:
    """The figures of a run of so many seconds."""
    latencies, batches = sorted(outcome.latencies_s), sorted(outcome.batch_rows)
    return Figures(
        arrived=outcome.arrived_rows / seconds,
        answered=len(latencies) / seconds,
        goodput=(len(latencies) - outcome.late_rows) / seconds,
        expired_share=outcome.expired_rows / max(outcome.arrived_rows, 1),
        refused_share=outcome.refused_rows / max(outcome.arrived_rows, 1),
        mean_s=_mean(latencies),
        p50_s=_percentile(latencies, 0.5),
        p99_s=_percentile(latencies, 0.99),
        batch_mean=_mean(batches),
        batch_p10=_percentile(batches, 0.1),
        batch_p90=_percentile(batches, 0.9),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _percentile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)] if ascending else math.nan


@dataclass(frozen=True, slots=True)
class Answer:
    """A scenario with its figures."""

    scenario: Scenario
    figures: Figures

    def meets(self, p99_s: float) -> bool:
        """Whether nobody is turned away and 99 of 100 rows are answered within `p99_s`."""
        figures = self.figures
        return figures.p99_s <= p99_s and not figures.refused_share and not figures.expired_share


def cheapest(answers: Iterable[Answer], p99_s: float) -> Answer | None:
    """Of those that meet the goal the one with the fewest replicas, then the smallest batches, if possible `full`."""
    return min((answer for answer in answers if answer.meets(p99_s)), key=_cost, default=None)


def _cost(answer: Answer) -> tuple[float, ...]:
    scenario = answer.scenario
    return scenario.replicas, scenario.max_batch_size, scenario.policy != "full", answer.figures.p99_s


def variants(
    scenario: Scenario, policies: Sequence[str], replicas: Sequence[int], sizes: Sequence[int]
) -> list[Scenario]:
    """The scenario with every combination, policies side by side."""
    return [
        replace(scenario, replicas=number, max_batch_size=size, policy=policy)
        for number, size, policy in itertools.product(replicas, sizes, policies)
    ]
