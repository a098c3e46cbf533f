"""Averages that forget: of values, and of events per second. Both need a few floats, whatever comes."""

import math


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
