"""Which tenants send so many bad rows that they are batched with themselves only.

A bad row costs its neighbours a delay and the model some calls. Who sends many of them pays for it alone: with at least
`MIN_POISON_ROWS` and more than `POISON_SHARE` of the last `WINDOW_ROWS` rows bad, a tenant is set apart for
`QUARANTINE_S`. Rows count from the first bad one on, so that nothing is counted of tenants who send none: with a good
name the whole window long, a tenant is forgotten.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from router.core.types import Part

WINDOW_ROWS = 1000
MIN_POISON_ROWS = 5
POISON_SHARE = 0.005
QUARANTINE_S = 60.0
# Names come from callers; beyond so many the one that was found first is forgotten.
MAX_TENANTS = 256


@dataclass(slots=True)
class _Tenant:
    """Rows since the first bad one, and the numbers of the bad ones among the last `WINDOW_ROWS`."""

    rows: int = 0
    poison: deque[int] = field(default_factory=deque)

    def count(self, rows: int) -> None:
        self.rows += rows
        while self.poison and self.poison[0] <= self.rows - WINDOW_ROWS:
            self.poison.popleft()

    @property
    def is_noxious(self) -> bool:
        bad = len(self.poison)
        return bad >= MIN_POISON_ROWS and bad > POISON_SHARE * min(self.rows, WINDOW_ROWS)


class Quarantine:
    """The tenants of one key."""

    def __init__(self) -> None:
        # State: those with a bad row in their window; until when others are set apart, the next end first.
        self._tenants: dict[str, _Tenant] = {}
        self._until: dict[str, float] = {}

    @property
    def is_watching(self) -> bool:
        """Whether anybody's rows need to be counted."""
        return bool(self._tenants)

    @property
    def is_on(self) -> bool:
        """Whether anybody is set apart."""
        return bool(self._until)

    @property
    def wake_at(self) -> float:
        """When the next quarantine ends; infinity without one."""
        return next(iter(self._until.values()), math.inf)

    def served(self, parts: Iterable[Part]) -> None:
        """Rows of these parts were good. Needed while `is_watching` only."""
        for part in parts:
            tenant = self._tenants.get(part.block.tenant)
            if tenant is not None:
                tenant.count(part.rows)
                if not tenant.poison:
                    del self._tenants[part.block.tenant]

    def poisoned(self, name: str, now: float) -> bool:
        """A bad row of a tenant was found; whether that is the one too many, and it is set apart from now on."""
        tenant = self._tenants.get(name) or self._watch(name)
        tenant.count(1)
        tenant.poison.append(tenant.rows)
        if name in self._until or not tenant.is_noxious:
            return False
        self._until[name] = now + QUARANTINE_S
        return True

    def released(self, now: float) -> list[str]:
        """Those whose time is over; they share batches again."""
        if not self._until:
            return []
        over = [name for name, until in self._until.items() if until <= now]
        for name in over:
            del self._until[name]
        return over

    def _watch(self, name: str) -> _Tenant:
        if len(self._tenants) >= MAX_TENANTS:
            del self._tenants[next(iter(self._tenants))]
        tenant = self._tenants[name] = _Tenant()
        return tenant
