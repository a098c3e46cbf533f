"""When to release: the rule that decides whether waiting rows go now or wait for a larger batch.

Theory of operation. A batch is formed at the moment a slot takes it, so while every slot is busy nothing needs to be
decided: rows gather by themselves. The question comes up only with a slot at hand. Then rows go at once, unless a hold
applies; a hold always has an end, and a full batch is never held. Four holds; rows go when none applies any more:

* gather: a batch costs the router 0.1-0.4 ms itself, so with a thousand blocks a second one release per arrival
  drowns a fast backend in one-row batches. While blocks of the key arrive at `GATHER_BLOCKS` or more per 2 ms (or
  max_queue_delay_s, if that is less), and another block of the key waits or is in flight, rows wait until the oldest is
  min(max_queue_delay_s, 5 ms) old.
* coalescing: with the model idle and its service time S known, callers of one burst should meet in one batch: rows
  wait until the oldest is min(max_queue_delay_s, 2 % of S) old.
* even gap (`even_gap.py`): with other slots of the model busy, rows wait so that batches start at even distances.
* return wave (`return_wave.py`): after a completion, rows wait for the callers who have just been answered.

The last two wait for as long as the service time makes worth while, up to 0.35 S, or S between two slots; so they begin
only when `service_time.MIN_CALLS` calls of the key were measured. A hold below 1 ms is not worth a timer, and calls
below `service_time.FAST_S` are worth gathering only. But for the 5 ms of gathering, no hold lasts longer than the first
deadline allows: that, less S_p90, is when rows go at the latest. Zero for `max_queue_delay_s` turns all four off.

Backends without a limit of slots have no "busy" to gather behind; for them stands the plain `Window`.

A policy knows one key; it is told of arrivals and completions and asked with a `View`. Times are monotonic seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router.core.averages import Rate
from router.core.even_gap import Gap
from router.core.return_wave import ReturnWave
from router.core.service_time import FAST_S, ServiceTimes

# 64 callers of `ModelInfer` with a model of no time, who keep the router busy: 2 ms 2,700 requests/s, 4 ms 4,400, 6 ms
# 4,800. Past it little is won.
GATHER_MAX_S = 0.005
DENSE_SPAN_S = 0.002
# From here on a hold of 2 ms saves a batch on the average. Not more: a router that sends 1,400 batches of one row a
# second has no CPU left for the next rows (64 callers of `Predict`), and would never see the 2,000 rows a second of 4
# per 2 ms.
GATHER_BLOCKS = 1
COALESCE_SHARE = 0.02
MIN_HOLD_S = 0.001
# The span over which arrival rates are averaged: max(4 S, 0.25 s).
RATE_SPANS = 4
RATE_MIN_SPAN_S = 0.25
NEVER = -math.inf  # a hold that ended before all time


class Slots(Protocol):
    """The slots of a model, as a release sees them."""

    @property
    def busy(self) -> int:
        """Those that are taken, over all replicas."""

    @property
    def others_wait(self) -> bool:
        """Whether rows of another key of the model wait."""

    def count_free(self, now: float, /) -> int:
        """Those that may be taken now."""

    def expected_back(self) -> Sequence[float]:
        """When those that are taken should be free again, in any order; a slot nothing is known of is due at once."""


@dataclass(slots=True)
class View:
    """What a release is decided on.

    `blocks`, `rows`: waiting ones of the key; `oldest_at`: arrival of the oldest row; `deadline`: the earliest of
    theirs; `blocks_in_flight`: of the key; `slots`: of the model, asked only where needed.
    """

    blocks: int
    rows: int
    oldest_at: float
    deadline: float
    is_full: bool
    blocks_in_flight: int
    slots: Slots


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait until `until`. `lapses_with_slots`: ask again when a slot of the model is taken or freed before that."""

    until: float
    lapses_with_slots: bool = False


class Policy(Protocol):
    """One key's release rule."""

    service_times: ServiceTimes
    """How long the key's calls take."""

    def set_max_queue_delay(self, max_queue_delay_s: float) -> None:
        """Bound the short holds by so much from now on."""

    def arrived(self, blocks: int, rows: int, now: float) -> None:
        """So many blocks, of so many rows together, have come."""

    def completed(self, replica: str, rows: int, service_s: float, now: float, /) -> None:
        """A batch of the key came back."""

    def hold(self, view: View, now: float) -> Hold | None:
        """None: release now, as the caller then does. Asked only while rows wait and a slot may be free."""


class WorkConserving:
    """Release as soon as a slot is free, but for the holds. For limited slots.

    even_gap, return_wave: False leaves that hold out. Without both it is the plain release that others are compared to.
    """

    def __init__(self, max_queue_delay_s: float, *, even_gap: bool = True, return_wave: bool = True) -> None:
        self.service_times = ServiceTimes()
        self._has_even_gap = even_gap
        self._has_return_wave = return_wave
        # State: how many blocks and rows come; who comes back; the span of the rates.
        self._blocks = Rate()
        self._rows = Rate()
        self._wave: ReturnWave | None = None
        self._span_s = RATE_MIN_SPAN_S
        self.set_max_queue_delay(max_queue_delay_s)

    def set_max_queue_delay(self, max_queue_delay_s: float) -> None:
        """See Policy."""
        self._max_queue_delay_s = max_queue_delay_s
        self._gather_s = min(max_queue_delay_s, GATHER_MAX_S)
        if not max_queue_delay_s:
            self._wave = None
        elif self._has_return_wave and self._wave is None:
            self._wave = ReturnWave()

    def arrived(self, blocks: int, rows: int, now: float) -> None:
        """See Policy."""
        self._blocks.add(blocks, now, self._span_s)
        self._rows.add(rows, now, self._span_s)
        if self._wave:
            self._wave.arrived(rows, now)

    def completed(self, replica: str, rows: int, service_s: float, now: float) -> None:
        """See Policy."""
        self.service_times.observe(replica, rows, service_s)
        mean_s = self.service_times.overall.mean_s
        self._span_s = max(RATE_SPANS * mean_s, RATE_MIN_SPAN_S)
        if self._wave and mean_s >= FAST_S:
            self._wave.completed(self._rows.at(now, self._span_s), mean_s, now)

    def hold(self, view: View, now: float) -> Hold | None:
        """See Policy."""
        hold = None if view.is_full or not self._max_queue_delay_s else self._first_hold(view, now)
        if hold is None and self._wave:
            self._wave.released()
        return hold

    def _first_hold(self, view: View, now: float) -> Hold | None:
        """The first that applies; at its end the others are asked. In the order of what asking costs."""
        until = view.oldest_at + self._gather_for(view, now)
        if until > now:
            return Hold(until)
        line = self.service_times.overall
        if line.mean_s < FAST_S:
            return None
        latest = self._latest(view, now)
        if latest <= now:
            return None
        until = self._wave_until(view, line.beta, now)
        if until > now:
            return Hold(min(until, latest))
        service_s = line.predict(view.rows)
        until = max(self._coalesce_until(view, service_s), self._gap_until(view, service_s, latest - now, now))
        return Hold(min(until, latest), lapses_with_slots=True) if until > now else None

    def _latest(self, view: View, now: float) -> float:
        """When the first deadline wants rows to go; never, when it will hardly be met whatever is done.

        A row that a call has left behind is often lost: were it to break the hold, its callers would never meet.
        """
        line = self.service_times.overall
        is_lost = view.deadline < now + line.predict(view.rows) - MIN_HOLD_S
        return math.inf if is_lost else view.deadline - line.predict_p90(view.rows)

    def _gather_for(self, view: View, now: float) -> float:
        has_company = view.blocks > 1 or view.blocks_in_flight > 0
        is_dense = self._blocks.at(now, self._span_s) * min(self._gather_s, DENSE_SPAN_S) >= GATHER_BLOCKS
        return self._gather_s if has_company and is_dense else 0.0

    def _coalesce_until(self, view: View, service_s: float) -> float:
        hold_s = min(self._max_queue_delay_s, COALESCE_SHARE * service_s)
        return view.oldest_at + hold_s if hold_s >= MIN_HOLD_S and not view.slots.busy else NEVER

    def _wave_until(self, view: View, beta_s: float, now: float) -> float:
        if not self._wave or not self.service_times.is_settled or self._wave.lasts_s < MIN_HOLD_S:
            return NEVER
        return self._wave.hold_until(view.rows, view.oldest_at, beta_s, now)

    def _gap_until(self, view: View, service_s: float, slack_s: float, now: float) -> float:
        slots, line = view.slots, self.service_times.overall
        if not self._has_even_gap or not self.service_times.is_settled or not slots.busy or slots.others_wait:
            return NEVER
        hold_s = Gap(
            rows=view.rows,
            age_s=now - view.oldest_at,
            slack_s=slack_s,
            rate=self._rows.at(now, self._span_s),
            free=max(slots.count_free(now), 1),
            returns_at=slots.expected_back(),
            now=now,
            service_s=service_s,
            alpha=line.alpha,
        ).hold_s()
        return now + hold_s if hold_s >= MIN_HOLD_S else NEVER


class Window:
    """Release when the oldest row is `max_queue_delay_s` old or the batch is full. For backends without slot limit."""

    def __init__(self, max_queue_delay_s: float) -> None:
        self.service_times = ServiceTimes()
        self.set_max_queue_delay(max_queue_delay_s)

    def set_max_queue_delay(self, max_queue_delay_s: float) -> None:
        """See Policy."""
        self._max_queue_delay_s = max_queue_delay_s

    def arrived(self, blocks: int, rows: int, now: float) -> None:
        """See Policy; a window does not care how many come."""

    def completed(self, replica: str, rows: int, service_s: float, _now: float, /) -> None:
        """See Policy."""
        self.service_times.observe(replica, rows, service_s)

    def hold(self, view: View, now: float) -> Hold | None:
        """See Policy."""
        until = view.oldest_at + self._max_queue_delay_s
        return _in_time(Hold(until), view, self.service_times, now) if until > now and not view.is_full else None


def _in_time(hold: Hold, view: View, times: ServiceTimes, now: float) -> Hold | None:
    """The hold, ended before it costs the most urgent row its deadline; None: that is now."""
    latest = view.deadline - times.likely_s(view.rows)
    if hold.until <= latest:
        return hold
    return Hold(latest, hold.lapses_with_slots) if latest > now else None


def choose_policy(max_in_flight: int, max_queue_delay_s: float) -> Policy:
    """The policy of a key, by the slots per replica and model of its backend (0: no limit)."""
    return WorkConserving(max_queue_delay_s) if max_in_flight else Window(max_queue_delay_s)


def change_policy(policy: Policy, max_in_flight: int, max_queue_delay_s: float) -> Policy:
    """The policy of a key whose settings have changed. How long its calls take is known already."""
    if isinstance(policy, WorkConserving) is bool(max_in_flight):
        policy.set_max_queue_delay(max_queue_delay_s)
        return policy
    changed = choose_policy(max_in_flight, max_queue_delay_s)
    changed.service_times = policy.service_times
    return changed
