"""Hedging: whether a batch that seems to have stalled is sent a second time, to another replica.

Theory of operation (Dean and Barroso, "The Tail at Scale", 2013). A batch that has been out for longer than S_p99 +
S_min is one in a hundred or stalled; a second copy of it, sent now, has a fair chance to be back first. Copies are for
stalls only and not for load, so they go where a slot is idle while no row waits, and at most one batch in
`BATCHES_PER_HEDGE` of a key is sent twice: were the model itself to stall, the copies would make it worse.

Rows of models with side effects (`retries: 0`) are never sent twice. Calls below `service_time.FAST_S` are over before
a timer would pay, and before the key is settled nobody knows what a stall is.
"""

from collections.abc import Callable

from router.core.service_time import FAST_S, ServiceTimes

BATCHES_PER_HEDGE = 100
# As many copies at once after a long time without any.
MAX_SAVED_HEDGES = 5


class Hedging:
    """One key's batches as hedging sees them.

    `is_allowed`: False for models with side effects; `may_spend(rows, now)`: the key's retry budget, charged when it
    says yes.
    """

    __slots__ = ("_credit", "_may_spend", "is_allowed", "times")

    def __init__(self, times: ServiceTimes, may_spend: Callable[[int, float], bool], *, is_allowed: bool) -> None:
        self.times = times
        self.is_allowed = is_allowed
        self._may_spend = may_spend
        self._credit = 0

    def sent(self, rows: int) -> float | None:
        """Count a batch of `rows` that is sent now; the seconds after which it has stalled, None: never look."""
        self._credit = min(self._credit + 1, MAX_SAVED_HEDGES * BATCHES_PER_HEDGE)
        line = self.times.overall
        if self._credit < BATCHES_PER_HEDGE or line.mean_s < FAST_S or not self.is_allowed:
            return None
        return line.predict_p99(rows) + line.min_s if self.times.is_settled else None

    def may_hedge(self, rows: int, now: float) -> bool:
        """Whether a stalled batch may be sent again; charged when it may."""
        if not self.is_allowed or self._credit < BATCHES_PER_HEDGE or not self._may_spend(rows, now):
            return False
        self._credit -= BATCHES_PER_HEDGE
        return True
