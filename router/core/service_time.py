"""How long a call takes: S(b) = beta + alpha * b for a batch of b rows, fitted per replica and key as calls come back.

Theory of operation. A line keeps the weighted means, variances and covariance of batch sizes and times. The newest call
weighs 1/n at first and `FORGETTING` for ever after, so the fit is an ordinary regression over the first 50 calls and
follows a model that changes from then on. Four guards, since predictions decide about real waiting:

* Outliers. A time beyond the fences enters the fit as if it lay on the fence: one stall of a minute moves a 5 s line by
  some 15 ms. The fences stand 1.5 spreads, from the 10th to the 90th percentile of the newest residuals, outside these:
  five standard deviations, as far as Tukey's outer ones. But times that one call in ten has are no outliers, and a
  change that lasts for a tenth of the residuals is followed.
* Changes. `RUN` calls in a row that are all slower, or all faster, than nine in ten were, by a third of the prediction
  or more, are another model: the line begins anew with these. Else rows would be refused for 150 calls more when a
  model takes a tenth of its time from now on; and after a change upwards old residuals above a new line would make
  S_p90 twice as large as it is.
* The slope. With every batch about as large as the other, noise looks like a slope, and 0.1 s per row at 8 rows would
  be 6 s at 64. So the slope is shrunk by what chance explains (Breiman's non-negative garrote): a slope of t standard
  errors keeps 1 - (3 / t)^2 of itself, and below three nothing: 0 at t <= 3, 0.44 at 4, 0.91 at 10.
* The signs. alpha >= 0 and beta >= 0: a line that would cut the axis below zero goes through the origin instead.

Beside the line stand the newest `RESIDUALS` residuals in order of size, whose 90th and 99th percentiles, added to the
line, are S_p90 and S_p99. Memory is two lists of 100 numbers per replica. An observation costs 4 µs per line, two lines
a batch; so of calls below `FAST_S`, which nobody waits for on purpose but which come by the thousand, one in 13 counts.
"""

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

# Calls of a key, over all replicas, before anything that can hurt relies on the predictions.
MIN_CALLS = 20
# A replica's own line is used from here on, until then that of all replicas together.
MIN_REPLICA_CALLS = 10
# Its own line is what others are compared with from here on.
MIN_PEER_CALLS = 5
# Calls this short are over before a hold would be worth a timer. Thirteen is prime, so that replicas that take turns
# all have theirs counted; the first calls are all counted.
FAST_S = 0.002
FAST_CALLS_PER_COUNTED = 13
# The newest call's least weight: as much memory as 99 calls of equal weight, (2 - w) / w.
FORGETTING = 0.02
RESIDUALS = 100
# Of fewer residuals than this the percentiles cut nothing and tell no change.
MIN_FENCED = 8
FENCE_SPREADS = 1.5
RUN = 8
RUN_SHARE = 1 / 3
# A model of constant time has no spread; a fence this share of the prediction wide lets it drift nevertheless.
MIN_SPREAD_SHARE = 0.05
SIGNIFICANCE = 3.0
# Replicas come and go; lines beyond this many are forgotten, the oldest first.
MAX_LINES = 256


class ServiceLine:
    """The fitted time of the calls of one key on one replica, or on all."""

    __slots__ = (
        "_cov",
        "_fitted",
        "_least_s",
        "_mean_rows",
        "_newest",
        "_previous_least_s",
        "_residuals",
        "_run",
        "_run_is_slow",
        "_var_rows",
        "_var_s",
        "alpha",
        "beta",
        "calls",
        "mean_s",
    )

    def __init__(self) -> None:
        # State: the line; its moments and the calls in them; residuals by age and by size; the newest calls while all
        # of them are far too slow, or far too fast; the least time of these and the last 100 calls.
        self.calls = 0
        self.alpha = 0.0
        self.beta = 0.0
        self.mean_s = 0.0
        self._run: list[tuple[int, float]] = []
        self._run_is_slow = False
        self._begin()
        self._least_s = self._previous_least_s = math.inf

    def _begin(self) -> None:
        self._fitted = 0
        self._mean_rows = self._var_rows = self._var_s = self._cov = 0.0
        self._newest: deque[float] = deque()
        self._residuals: list[float] = []

    def __repr__(self) -> str:
        return f"<ServiceLine {self.beta:.4g} s + {self.alpha:.4g} s per row, {self.calls} calls>"

    def observe(self, rows: int, service_s: float) -> None:
        """A batch of `rows` came back after `service_s`."""
        self._count(rows, service_s)
        if len(self._run) == RUN:
            run, self._run = self._run, []
            self._begin()
            for call in run:
                self._count(*call)
        if self.calls % RESIDUALS == 0:
            self._previous_least_s, self._least_s = self._least_s, math.inf
        self._least_s = min(self._least_s, service_s)
        self.calls += 1

    def _count(self, rows: int, service_s: float) -> None:
        residual = service_s - self.predict(rows) if self._fitted else 0.0
        predicted_s = service_s - residual
        self._follow(rows, service_s, residual, predicted_s)
        self._fit(rows, predicted_s + self._fenced(residual, predicted_s))
        self._remember(residual)

    def _follow(self, rows: int, service_s: float, residual: float, predicted_s: float) -> None:
        """Lengthen the run, or end it."""
        if self._run_is_slow != (residual > 0):
            self._run = []
            self._run_is_slow = residual > 0
        if self._is_far(residual, predicted_s):
            self._run.append((rows, service_s))
        elif self._run:
            self._run = []

    def _is_far(self, residual: float, predicted_s: float) -> bool:
        """The residuals of the run stand at one end, and those from before are what it is compared to."""
        residuals = self._residuals
        number = len(residuals) - len(self._run)
        if number < MIN_FENCED:
            return False
        beyond = (9 * number) // 10
        if residual > 0:
            return residual > residuals[beyond] + RUN_SHARE * predicted_s
        return residual < residuals[-1 - beyond] - RUN_SHARE * predicted_s

    def predict(self, rows: int) -> float:
        """S: the expected time of a batch of `rows`."""
        return self.beta + self.alpha * rows

    def predict_p90(self, rows: int) -> float:
        """Nine of ten such batches are back by then."""
        return self.predict(rows) + self._residual(0.90)

    def predict_p99(self, rows: int) -> float:
        """99 of 100 such batches are back by then."""
        return self.predict(rows) + self._residual(0.99)

    @property
    def min_s(self) -> float:
        """The least time of the last 100 to 200 calls: no answer can be hoped for earlier. 0 before the first."""
        return min(self._least_s, self._previous_least_s) if self.calls else 0.0

    def _residual(self, share: float) -> float:
        """By nearest rank: of 100 residuals the 99th is S_p99's, so that one stall in a hundred calls is not in it."""
        residuals = self._residuals
        return max(0.0, residuals[math.ceil(share * len(residuals)) - 1]) if residuals else 0.0

    def _fenced(self, residual: float, predicted_s: float) -> float:
        residuals = self._residuals
        number = len(residuals)
        if number < MIN_FENCED:
            return residual
        low, high = residuals[number // 10], residuals[(9 * number) // 10]
        reach = FENCE_SPREADS * max(high - low, MIN_SPREAD_SHARE * predicted_s)
        return min(max(residual, low - reach), high + reach)

    def _remember(self, residual: float) -> None:
        self._newest.append(residual)
        insort(self._residuals, residual)
        if len(self._newest) > RESIDUALS:
            del self._residuals[bisect_left(self._residuals, self._newest.popleft())]

    def _fit(self, rows: int, service_s: float) -> None:
        self._fitted += 1
        weight = max(1 / self._fitted, FORGETTING)
        by_rows, by_s = rows - self._mean_rows, service_s - self.mean_s
        self._mean_rows += weight * by_rows
        self.mean_s += weight * by_s
        keep = 1 - weight
        self._var_rows = keep * (self._var_rows + weight * by_rows * by_rows)
        self._var_s = keep * (self._var_s + weight * by_s * by_s)
        self._cov = keep * (self._cov + weight * by_rows * by_s)
        self._solve(min(self._fitted, (2 - FORGETTING) / FORGETTING))

    def _solve(self, calls: float) -> None:
        """The line of `calls` calls of equal weight with these moments."""
        alpha = self._slope(calls)
        beta = self.mean_s - alpha * self._mean_rows
        if beta < 0:
            squares = self._var_rows + self._mean_rows * self._mean_rows
            alpha, beta = (self._cov + self._mean_rows * self.mean_s) / squares, 0.0
        self.alpha, self.beta = alpha, beta

    def _slope(self, calls: float) -> float:
        if calls <= 2 or self._cov <= 0 or self._var_rows <= 0:
            return 0.0
        slope = self._cov / self._var_rows
        error_squared = max(self._var_s - slope * self._cov, 0.0) / (self._var_rows * (calls - 2))
        return slope * max(0.0, 1 - SIGNIFICANCE**2 * error_squared / (slope * slope))


class ServiceTimes:
    """The service times of one key: a line per replica, and one of all calls for a batch that has no replica yet."""

    def __init__(self) -> None:
        self.overall = ServiceLine()
        self._lines: dict[str, ServiceLine] = {}
        self._fast_calls = 0

    def __repr__(self) -> str:
        return f"<ServiceTimes {self.overall!r}, {len(self._lines)} replicas>"

    def observe(self, replica: str, rows: int, service_s: float) -> None:
        """A batch of `rows` came back from `replica` after `service_s`."""
        if service_s < FAST_S and self.overall.calls >= RESIDUALS:
            self._fast_calls += 1
            if self._fast_calls % FAST_CALLS_PER_COUNTED:
                return
        line = self._lines.get(replica)
        if line is None:
            if len(self._lines) >= MAX_LINES:
                del self._lines[next(iter(self._lines))]
            line = self._lines[replica] = ServiceLine()
        line.observe(rows, service_s)
        self.overall.observe(rows, service_s)

    @property
    def calls(self) -> int:
        """Calls of the key that were counted, over all replicas."""
        return self.overall.calls

    @property
    def is_settled(self) -> bool:
        """Whether enough calls were measured to rely on."""
        return self.overall.calls >= MIN_CALLS

    @property
    def least_s(self) -> float:
        """No answer can be hoped for earlier; 0 before enough calls were measured."""
        return self.overall.min_s if self.is_settled else 0.0

    def likely_s(self, rows: int) -> float:
        """S_p90 of a batch of `rows` on any replica; 0 before enough calls were measured."""
        return self.overall.predict_p90(rows) if self.is_settled else 0.0

    def of(self, replica: str) -> ServiceLine:
        """The line of a replica; that of all while it has too few calls of its own."""
        line = self._lines.get(replica)
        return line if line is not None and line.calls >= MIN_REPLICA_CALLS else self.overall

    def ratio(self, replica: str, rows: int, service_s: float, peers: Iterable[str]) -> float | None:
        """A batch's time on `replica` to the median of what its peers need for as many rows.

        None while no peer is known well enough, and for calls so short that nobody would notice.
        """
        if service_s < FAST_S:
            return None
        lines = [self._lines[peer] for peer in peers if peer != replica and peer in self._lines]
        predicted = [line.predict(rows) for line in lines if line.calls >= MIN_PEER_CALLS]
        usual_s = statistics.median(predicted) if predicted else 0.0
        return service_s / usual_s if usual_s else None
