"""The even-gap hold: keep the slots of a model apart in time, so that each row soon finds one about to take it.

Theory of operation. A release that always goes at once drives its slots into convoys: they start together with a row or
two each, and whoever comes then waits for all of them. Rows wait least when batches start at even distances. With f
slots free now and busy ones coming back after t1 <= t2 <= ..., the j-th return makes f + j - 1 starts (this one not
counted) that share the time until then, so the gap to the next start need not be smaller than

    g = max over j of t_j / (f + j - 1)

For example, one of four slots is free and the others come back after 1, 2 and 4.5 s: g = max(1, 1, 1.5) = 1.5 s. Rows
go when as many wait as a gap brings (n >= rate * g) or the oldest is a gap old. Until then they are held, unless a
deadline would be missed. g shrinks as time goes by, so the end of the hold can be computed: that is the alarm.

The more a row adds to a call, the less it helps to make batches large: with u = rate * alpha / slots, the share of
capacity that rows themselves take, g is damped by clamp((0.4 - u) / 0.2, 0, 1): 1 up to u = 0.2, 0 from 0.4 on. (With
0.65 and 0.3 instead, two slots of 5 ms + 0.35 ms per row at half load gain 3 % of the mean for Poisson arrivals, but
lose 2 % with bursts of ten and 3 % with on/off traffic.)

Of many slots only some returns are looked at: the first `EXACT_RETURNS`, then each that is a tenth further down the
line. So g is up to 10 % too small, on the side of going, and a thousand slots cost 0.1 ms a decision instead of 0.5.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DAMPING_ENDS_AT = 0.4
DAMPING_SPAN = 0.2
# A slot that is late may come back at any moment; it counts as due in this share of a service time.
LEAST_SHARE = 0.02
EXACT_RETURNS = 32
STEP_SHARE = 1 / 10


def _numbers(end: int) -> Iterator[int]:
    number = 0
    while number < end:
        yield number
        number += max(1, int(number * STEP_SHARE)) if number >= EXACT_RETURNS else 1


# Which returns are looked at, counted from 0; nobody has a million slots.
_NUMBERS = tuple(_numbers(1_000_000))


@dataclass(slots=True)
class Gap:
    """What the hold is decided on.

    `rows` wait, the oldest for `age_s`, and could wait `slack_s` more for their deadlines; `rate`: rows per second;
    `free` slots, one at least; `returns_at`: when the busy ones are expected, in any order, perhaps before `now`;
    `service_s`, `alpha`: the predicted time of these rows' call, and what one more row adds.
    """

    rows: int
    age_s: float
    slack_s: float
    rate: float
    free: int
    returns_at: Sequence[float]
    now: float
    service_s: float
    alpha: float

    def hold_s(self) -> float:
        """How long to wait from now on; 0: go."""
        damping = self._damping()
        if not damping or not self.returns_at:
            return 0.0
        least_s = LEAST_SHARE * self.service_s
        starts = self._starts(damping)
        # Of those that are due in `least_s` or overdue the first asks for the largest gap.
        gap_s = max(least_s / starts[0][1], *(t_s / divisor for t_s, divisor in starts))
        if self.rows >= self.rate * gap_s or self.age_s >= gap_s or self.slack_s <= gap_s:
            return 0.0
        # The gap only shrinks, so there is slack for it at least until then.
        return min(self.slack_s - gap_s, self._until_old(starts, least_s), self._until_many(starts, least_s))

    def _damping(self) -> float:
        use = self.rate * self.alpha / (self.free + len(self.returns_at))
        return min(max((DAMPING_ENDS_AT - use) / DAMPING_SPAN, 0.0), 1.0)

    def _starts(self, damping: float) -> list[tuple[float, float]]:
        """(t_j, what it is divided by), for each j that is looked at."""
        returns_at, free, now = sorted(self.returns_at), self.free, self.now
        end = bisect_left(_NUMBERS, len(returns_at))
        return [(returns_at[j] - now, (free + j) / damping) for j in _NUMBERS[:end]]

    def _until_old(self, starts: Sequence[tuple[float, float]], least_s: float) -> float:
        """When age + d reaches max(t - d, least) / divisor for every start."""
        age_s = self.age_s
        soonest_s = least_s / starts[0][1] - age_s
        return max(soonest_s, *((t_s - divisor * age_s) / (divisor + 1) for t_s, divisor in starts))

    def _until_many(self, starts: Sequence[tuple[float, float]], least_s: float) -> float:
        """When max(t - d, least) / divisor has fallen, for every start, to the gap that brings the rows at hand."""
        enough_s = self.rows / self.rate
        if least_s / starts[0][1] > enough_s:
            return math.inf
        return max(t_s - divisor * enough_s for t_s, divisor in starts)
