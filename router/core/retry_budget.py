"""How much may be tried again after a refusal: a share of what a key does anyway.

A fixed number of retries per row multiplies the load of a backend at the worst moment: when it refuses everything,
every row comes back as often as it may, and keeps the backend down. A budget adds a tenth, whatever happens (as in
Finagle's and tower's retry budgets); the few batches that are always allowed serve keys with little traffic. Batches
that were lost with their stream are tried again without charge: nothing refused them.
"""

from router.core.averages import RecentSum

SHARE = 0.1
SPAN_S = 30.0
MIN_BATCHES = 3


class RetryBudget:
    """One key's budget: 10 % of its rows in the last 30 s, and 3 batches at least."""

    def __init__(self) -> None:
        self._rows = RecentSum(SPAN_S)
        self._spent_rows = RecentSum(SPAN_S)
        self._spent_batches = RecentSum(SPAN_S)

    def sent(self, rows: int, now: float) -> None:
        """A batch of the key was sent."""
        self._rows.add(rows, now)

    def may_spend(self, rows: int, now: float) -> bool:
        """Whether a batch of `rows` may be sent once more; if so, it is charged."""
        is_few = self._spent_batches.at(now) < MIN_BATCHES
        if not is_few and self._spent_rows.at(now) + rows > SHARE * self._rows.at(now):
            return False
        self._spent_batches.add(1, now)
        self._spent_rows.add(rows, now)
        return True
