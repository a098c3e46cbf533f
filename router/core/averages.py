"""Averages and sums that forget: of values, of events per second. They need a few numbers, whatever comes."""

import math
from collections import deque


class Mean:
    """An exponentially weighted mean; None before the first value."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Count `value`."""
        self.value = value if self.value is None else self.value + self._weight * (value - self.value)


class Rate:
    """Events per second, averaged over a span that may change: each event's weight decays as exp(-age / span)."""

    def __init__(self) -> None:
        self._value = 0.0
        self._at = 0.0

    def add(self, events: int, now: float, span_s: float) -> None:
        """Count events."""
        self._value = self.at(now, span_s) + events / span_s
        self._at = now

    def at(self, now: float, span_s: float) -> float:
        """The rate at `now`."""
        return self._value * math.exp((self._at - now) / span_s) if self._value else 0.0


class RecentSum:
    """The sum of what was added in the last `span_s`, to a tenth of the span."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        # State: sums of the tenths before the present one with the ends of these, and the present one's.
        self._tenths: deque[tuple[float, int]] = deque()
        self._sum = 0
        self._ends_at = -math.inf

    def add(self, amount: int, now: float) -> None:
        """Count `amount`."""
        if now >= self._ends_at:
            self._turn(now)
        self._sum += amount

    def at(self, now: float) -> int:
        """The sum at `now`."""
        if now >= self._ends_at:
            self._turn(now)
        return self._sum + sum(amount for _, amount in self._tenths)

    def _turn(self, now: float) -> None:
        """Begin a new tenth, and forget those that ended before the span."""
        if self._sum:
            self._tenths.append((self._ends_at, self._sum))
        while self._tenths and self._tenths[0][0] <= now - self._span_s:
            self._tenths.popleft()
        self._sum = 0
        self._ends_at = now + self._span_s / 10
