"""When to release: the rule that decides whether waiting rows go now or wait for a larger batch.

Theory of operation. A batch is formed at the moment a slot takes it, so while every slot is busy nothing needs to be
decided: rows gather by themselves. The question comes up only with a slot at hand. Then rows go at once, unless a hold
applies; a hold always has an end, and a full batch is never held. Two holds:

* gather: a batch costs the router 0.1-0.4 ms itself, so with a thousand blocks a second one release per arrival
  drowns a fast backend in one-row batches. While blocks of the key arrive at `GATHER_BLOCKS` or more per d =
  min(max_queue_delay_s, 2 ms), and another block of the key waits or is in flight, rows wait until the oldest is d old.
* coalescing: with the model idle and its service time S known, callers of one burst should meet in one batch: rows
  wait until the oldest is min(max_queue_delay_s, 2 % of S) old. A hold below 1 ms is not worth a timer.

Backends without a limit of slots have no "busy" to gather behind; for them stands the plain `Window`.

A policy knows one key; it is told of arrivals and completions and asked with a `View`. Times are monotonic seconds.
"""

import math
from dataclasses import dataclass
from typing import Protocol

GATHER_MAX_S = 0.002
# From here on a hold of d saves a batch on the average. Not more: a router that sends 1,400 batches of one row a second
# has no CPU left for the next rows (64 callers of `Predict`), and would never see the 2,000 rows a second of 4 per d.
GATHER_BLOCKS = 1
COALESCE_SHARE = 0.02
COALESCE_MIN_S = 0.001
# The span over which arrival rates are averaged: max(4 S, 0.25 s).
RATE_SPANS = 4
RATE_MIN_SPAN_S = 0.25
# Weight of the newest batch in the mean service time.
SERVICE_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class View:
    """What a release is decided on.

    `blocks`: waiting ones of the key; `oldest_at`: arrival of the oldest row; `blocks_in_flight`: of the key;
    `busy_slots`: of the model, over all replicas.
    """

    blocks: int
    oldest_at: float
    is_full: bool
    blocks_in_flight: int
    busy_slots: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait until `until`. `lapses_with_slots`: ask again when a slot of the model is taken or freed before that."""

    until: float
    lapses_with_slots: bool = False


class Policy(Protocol):
    """One key's release rule."""

    def arrived(self, blocks: int, now: float) -> None:
        """So many blocks have come."""

    def completed(self, service_s: float) -> None:
        """A batch of the key came back after `service_s`."""

    def hold(self, view: View, now: float) -> Hold | None:
        """None: release now. Asked only while rows wait and a slot may be free."""

    @property
    def service_s(self) -> float | None:
        """The predicted service time of the next batch in seconds; None while unknown."""


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


class WorkConserving:
    """Release as soon as a slot is free, but for the gather and coalescing holds. For limited slots."""

    def __init__(self, max_queue_delay_s: float) -> None:
        self._max_queue_delay_s = max_queue_delay_s
        self._gather_s = min(max_queue_delay_s, GATHER_MAX_S)
        self._service = Mean(SERVICE_WEIGHT)
        self._blocks = Rate()

    @property
    def service_s(self) -> float | None:
        """See Policy."""
        return self._service.value

    def arrived(self, blocks: int, now: float) -> None:
        """See Policy."""
        self._blocks.add(blocks, now, self._span_s())

    def completed(self, service_s: float) -> None:
        """See Policy."""
        self._service.add(service_s)

    def hold(self, view: View, now: float) -> Hold | None:
        """See Policy; the longer of the holds that apply."""
        if view.is_full or not self._max_queue_delay_s:
            return None
        gather = view.oldest_at + self._gather_for(view, now)
        coalesce = view.oldest_at + self._coalesce_for(view)
        until = max(gather, coalesce)
        return Hold(until, lapses_with_slots=coalesce > gather) if until > now else None

    def _gather_for(self, view: View, now: float) -> float:
        has_company = view.blocks > 1 or view.blocks_in_flight > 0
        is_dense = self._blocks.at(now, self._span_s()) * self._gather_s >= GATHER_BLOCKS
        return self._gather_s if has_company and is_dense else 0.0

    def _coalesce_for(self, view: View) -> float:
        if view.busy_slots or self._service.value is None:
            return 0.0
        hold_s = min(self._max_queue_delay_s, COALESCE_SHARE * self._service.value)
        return hold_s if hold_s >= COALESCE_MIN_S else 0.0

    def _span_s(self) -> float:
        return max(RATE_SPANS * (self._service.value or 0.0), RATE_MIN_SPAN_S)


class Window:
    """Release when the oldest row is `max_queue_delay_s` old or the batch is full. For backends without slot limit."""

    def __init__(self, max_queue_delay_s: float) -> None:
        self._max_queue_delay_s = max_queue_delay_s
        self._service = Mean(SERVICE_WEIGHT)

    @property
    def service_s(self) -> float | None:
        """See Policy."""
        return self._service.value

    def arrived(self, blocks: int, now: float) -> None:
        """See Policy; a window does not care how many come."""

    def completed(self, service_s: float) -> None:
        """See Policy."""
        self._service.add(service_s)

    def hold(self, view: View, now: float) -> Hold | None:
        """See Policy."""
        until = view.oldest_at + self._max_queue_delay_s
        return Hold(until) if until > now and not view.is_full else None


def choose_policy(max_in_flight: int, max_queue_delay_s: float) -> Policy:
    """The policy of a key, by the slots per replica and model of its backend (0: no limit)."""
    return WorkConserving(max_queue_delay_s) if max_in_flight else Window(max_queue_delay_s)
