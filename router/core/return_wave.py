"""The return-wave hold: wait for the callers of the batch that has just come back.

Theory of operation. Callers in a closed loop ask again within a few ms of an answer. A release that goes at once never
meets them: what was left behind goes alone, they arrive during its call, and the next release takes only them. So two
half batches chase each other for ever (64 callers, one 50 ms slot, at most 64 rows: 32 rows a batch, 640 rows/s instead
of 1,200). Waiting a few ms after a completion merges the two for good.

Whether callers come back is learned. Rows are counted by their lag since the latest completion, in bins of 1 % of a
service time, as a mean over completions that forgets. What arrivals without any memory would bring is taken off: the
key's rate times the width, or what a bin between `REACH` and twice that brings if it is more, for the rate lags behind
traffic that comes and goes. The running sum of the rest up to `REACH`, E(lag), climbs while a wave comes in:

* delta, how long the wave lasts: where E reaches 90 % of its maximum,
* k, the wave: E(delta) rows per completion.

After a completion rows are held until delta has passed or the batch is full, while k stands out from what chance makes
of memoryless arrivals, and while k * (beta - delta) > n * delta: what the k rows save outweighs what the n rows at hand
lose. Not S: a model whose rows cost nearly all of its time gains nothing by larger batches. The hold does not end early
when k rows have come: k learned from half batches would confirm itself.

A single caller comes back as well, perhaps with many rows, and holding them gains nothing: no one else will come.
With x, the rows that come together, he shows as k <= x. Then rows that came since the completion are taken for his, and
go; rows that were left behind are held, since they can meet him (two callers, each on his own for ever). And with
k < x / 2 he does not come back after every completion: those are the pieces of requests larger than a batch.

Completions that come while a hold lasts do not prolong it, so none is longer than delta <= 0.35 S.
"""

import math

REACH = 0.35
WAVE_BINS = 35
BINS = 2 * WAVE_BINS
BINS_PER_SERVICE = WAVE_BINS / REACH
WAVE_SHARE = 0.9
# Weight of the newest completion: half of what is known comes from the last 14.
WEIGHT = 0.05
# In rows that come together.
MIN_CALLERS = 0.5
# So many of a single caller's rows are taken for all that he sends this time.
ONE_CALLER_SHARE = 0.5
# E of memoryless arrivals (or bursts) strays; only beyond so many standard deviations it is taken for a wave.
SIGNIFICANCE = 4.0
# Increments grow by 1 / (1 - WEIGHT) with each completion, instead of shrinking every bin; this keeps them in range.
MAX_INCREMENT = 1e50


class ReturnWave:
    """What is known of the callers of one key that come back, and the hold that follows from it."""

    def __init__(self) -> None:
        # State: rows by lag, each weighted with the increment of its completion; the sum of the increments and of their
        # squares; the sums of the rows that come together, and of their squares; the latest completion and the service
        # time then; the wave as of then, and whether that is one caller; when the hold that it allows ends; since when
        # rows are held.
        self._bins = [0.0] * BINS
        self._increment = 1.0
        self._increments = self._squares = 0.0
        self._arrived = self._arrived_squares = 0.0
        self._completed_at = -math.inf
        self._per_second = 0.0
        self.rows = 0.0
        self.lasts_s = 0.0
        self._is_one_caller = False
        self._ends_at = -math.inf
        self._held_since: float | None = None

    def __repr__(self) -> str:
        return f"<ReturnWave {self.rows:.1f} rows within {self.lasts_s * 1e3:.1f} ms>"

    def arrived(self, rows: int, now: float) -> None:
        """So many rows have come."""
        number = int((now - self._completed_at) * self._per_second) if self._per_second else BINS
        self._arrived += rows * self._increment
        self._arrived_squares += rows * rows * self._increment
        if 0 <= number < BINS:
            self._bins[number] += rows * self._increment

    def completed(self, rate: float, service_s: float, now: float) -> None:
        """A batch came back; rows come at `rate` a second in all, calls take `service_s`."""
        if self._increments:
            self._learn(rate, service_s)
        self._increment /= 1 - WEIGHT
        if self._increment > MAX_INCREMENT:
            self._rescale()
        self._increments += self._increment
        self._squares += self._increment * self._increment
        self._completed_at = now
        self._per_second = BINS_PER_SERVICE / service_s if service_s > 0 else 0.0
        if now >= self._ends_at:
            self._ends_at = now + self.lasts_s

    def hold_until(self, rows: int, oldest_at: float, beta_s: float, now: float) -> float:
        """Until when `rows` waiting ones should wait, where a call saves `beta_s`; a time that has passed: go."""
        if now >= self._ends_at or not self.rows * (beta_s - self.lasts_s) > rows * self.lasts_s:
            return now
        if self._is_one_caller and oldest_at >= self._completed_at and rows >= ONE_CALLER_SHARE * self.rows:
            return now
        if self._held_since is None:
            self._held_since = now
        return min(self._ends_at, self._held_since + self.lasts_s)

    def released(self) -> None:
        """The rows that waited go."""
        self._held_since = None

    def _learn(self, rate: float, service_s: float) -> None:
        """Find the wave; none that is small or not significant."""
        self.rows = self.lasts_s = 0.0
        later = sum(self._bins[WAVE_BINS:]) / (WAVE_BINS * self._increments)
        by_chance = max(rate * service_s / BINS_PER_SERVICE, later)
        excess = most = 0.0
        sums = []
        for rows in self._bins[:WAVE_BINS]:
            excess += rows / self._increments - by_chance
            sums.append(excess)
            most = max(most, excess)
        if most <= 0.0:
            return
        last = next(number for number, value in enumerate(sums) if value >= WAVE_SHARE * most)
        together = self._arrived_squares / self._arrived
        # A weighted mean of compound Poisson numbers: the variance of one is its mean times E[X^2] / E[X], where X rows
        # come together (10 for bursts of 10), and that of the mean is that times the sum of the squared weights.
        variance = by_chance * (last + 1) * together
        noise = math.sqrt(variance * self._squares) / self._increments
        if sums[last] >= max(MIN_CALLERS * together, SIGNIFICANCE * noise):
            self.rows, self.lasts_s = sums[last], (last + 1) * service_s / BINS_PER_SERVICE
            self._is_one_caller = self.rows <= together

    def _rescale(self) -> None:
        self._bins = [rows / self._increment for rows in self._bins]
        self._increments /= self._increment
        self._squares /= self._increment * self._increment
        self._arrived /= self._increment
        self._arrived_squares /= self._increment
        self._increment = 1.0
