"""Breaker: whether a replica should get batches, judged by what became of its last ones.

Theory of operation. A replica that fails, or is several times as slow as its peers, costs its callers more than a
smaller pool would, so it is ejected for a while and then tried with one small batch at a time:

    CLOSED ──ejected──► OPEN ──its time is over──► HALF_OPEN ──good trial──► CLOSED
                         ▲                             │
                         └──────────bad trial──────────┘

What trips a closed breaker, after Envoy's outlier detection: `FAILURES_IN_A_ROW` failures, or more than half of its
batches failed lately, or three of its last five batches took over `SLOW_RATIO` times what its peers need for them. When
all are slow of late, by a burst of load or by the router itself, a replica must be so much slower still: what its peers
need is known from long experience, and `common_ratio` is how far they are from it just now. The pool decides whether a
tripped replica may be ejected (`may_eject`): never the last that is fit, at most half of all.

What is lost together is one failure. A connection that dies takes every batch on it along, and a router whose own loop
stood still finds every batch late. So what was sent before the last bad end, or within `TOGETHER_S` of a failure, tells
nothing new, whether it ends well or not (counting only the good ends among them would hide a replica that fails half).

Times of ejection grow by their number: 30, 60, 90 ... 300 s. The number falls by one for each `FORGIVING_S` of health.
Only what the replica is to blame for is told to its breaker: lost streams, batches without an answer in time, answers
that do not fit. A refusal is the model's own opinion, or back-pressure, and neither good nor bad.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from enum import Enum, auto

FAILURES_IN_A_ROW = 3
# The newest outcome's weight; the first ones weigh 1/n, so the share is their mean.
FAILURE_WEIGHT = 0.2
FAILURE_SHARE = 0.5
MIN_BATCHES = 5
SLOW_RATIO = 3.0
# The median of so many: one stall, or a model's first call, ejects nobody.
RATIOS = 5
TOGETHER_S = 0.1
MAX_EJECTION_S = 300.0
FORGIVING_S = 300.0
# Rows of a trial.
TRIAL_ROWS = 4


class State(Enum):
    """How far a replica is trusted."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


class _Event(Enum):
    EJECTED = auto()
    TIME_OVER = auto()
    GOOD_TRIAL = auto()
    BAD_TRIAL = auto()


_NEXT = {
    (State.CLOSED, _Event.EJECTED): State.OPEN,
    (State.OPEN, _Event.TIME_OVER): State.HALF_OPEN,
    (State.HALF_OPEN, _Event.GOOD_TRIAL): State.CLOSED,
    (State.HALF_OPEN, _Event.BAD_TRIAL): State.OPEN,
}


class Breaker:
    """One replica's breaker. Times in monotonic seconds."""

    __slots__ = (
        "_batches",
        "_ejection_s",
        "_ejections",
        "_failure_share",
        "_failures",
        "_news_from",
        "_ratios",
        "_since",
        "state",
        "until",
    )

    def __init__(self, ejection_s: float) -> None:
        # State: where it stands, since when and, while OPEN, until when; how often it was ejected; when a batch must
        # have been sent to tell something new; what became of the batches that count.
        self._ejection_s = ejection_s
        self.state = State.CLOSED
        self.until = 0.0
        self._since = 0.0
        self._ejections = 0
        self._news_from = 0.0
        self._forget_batches()

    def __repr__(self) -> str:
        return f"<Breaker {self.state.name.lower()}, {self._failures} failures in a row, {self._ejections} ejections>"

    @property
    def is_closed(self) -> bool:
        """Whether the replica is trusted."""
        return self.state is State.CLOSED

    def answered(self, sent_at: float, now: float, ratio: float | None = None, common: float = 1.0) -> None:
        """A batch came back. `ratio`: its time to what its peers need for it, None while that is unknown; `common`: see
        `common_ratio`."""
        is_slow = ratio is not None and ratio > SLOW_RATIO
        if self.state is not State.CLOSED:
            self._tried(sent_at, now, is_good=ratio is None or ratio <= SLOW_RATIO * common)
        elif self._tells(sent_at):
            self._failures = 0
            self._count(0.0)
            if ratio is not None:
                self._ratios.append(ratio)
            if is_slow:
                self._news_from = now

    def failed(self, sent_at: float, now: float) -> None:
        """A batch failed, and the replica is to blame."""
        if self.state is not State.CLOSED:
            self._tried(sent_at, now, is_good=False)
        elif self._tells(sent_at):
            self._failures += 1
            self._count(1.0)
            self._news_from = now + TOGETHER_S

    def trip(self, common: float = 1.0) -> str | None:
        """Why the replica should be ejected; None while it should not. `common`: see `common_ratio`."""
        if self.state is not State.CLOSED:
            return None
        if self._failures >= FAILURES_IN_A_ROW:
            return f"{self._failures} failures in a row"
        if self._batches >= MIN_BATCHES and self._failure_share > FAILURE_SHARE:
            return f"{100 * self._failure_share:.0f} % of its batches failed"
        ratio = self._usual_ratio() / common
        return f"{ratio:.1f} times as slow as its peers" if ratio > SLOW_RATIO else None

    @property
    def recent_ratio(self) -> float | None:
        """What two of its last batches have reached: high as soon as slowness begins. None before there are two."""
        return sorted(self._ratios)[-2] if len(self._ratios) > 1 else None

    def eject(self, now: float) -> None:
        """Trust it no more until `until`."""
        forgiven = int((now - self._since) / FORGIVING_S)
        self._ejections = max(0, self._ejections - forgiven)
        self._open(_Event.EJECTED, now)

    def wake(self, now: float) -> None:
        """The time of the ejection may be over."""
        if self.state is State.OPEN and now >= self.until:
            self._go(_Event.TIME_OVER, now)

    def _tried(self, sent_at: float, now: float, *, is_good: bool) -> None:
        """What was sent before the trial is no part of it."""
        if self.state is not State.HALF_OPEN or sent_at < self._since:
            return
        if is_good:
            self._go(_Event.GOOD_TRIAL, now)
        else:
            self._open(_Event.BAD_TRIAL, now)

    def _open(self, event: _Event, now: float) -> None:
        self._go(event, now)
        self._ejections += 1
        self.until = now + min(self._ejections * self._ejection_s, max(MAX_EJECTION_S, self._ejection_s))

    def _go(self, event: _Event, now: float) -> None:
        self.state = _NEXT[self.state, event]
        self._since = now
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._batches = self._failures = 0
        self._failure_share = 0.0
        self._ratios: deque[float] = deque(maxlen=RATIOS)

    def _tells(self, sent_at: float) -> bool:
        return sent_at >= max(self._news_from, self._since)

    def _count(self, failure: float) -> None:
        self._batches += 1
        self._failure_share += max(1 / self._batches, FAILURE_WEIGHT) * (failure - self._failure_share)

    def _usual_ratio(self) -> float:
        return sorted(self._ratios)[RATIOS // 2] if len(self._ratios) == RATIOS else 0.0


def common_ratio(others: Iterable[Breaker]) -> float:
    """How slow the others are just now, against what is usual for them: 1 or more.

    A slowness that is common reaches all at about the same time, but one of them is always the first.
    """
    ratios = [ratio for breaker in others if (ratio := breaker.recent_ratio) is not None]
    return max(1.0, statistics.median(ratios)) if ratios else 1.0


def may_eject(members: int, ejected: int, others_fit: int) -> bool:
    """Whether one more of a pool may go: at most half are out at a time (0, 1, 1, 2 of 1, 2, 3, 4), and another can
    take its batches."""
    return others_fit > 0 and 2 * (ejected + 1) <= members
