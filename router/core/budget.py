"""What may wait in all: bounds in rows and bytes for the process and for each tenant, and what counts against them.

Whoever keeps accepted rows waiting counts them here, in one place: the queues of all keys, and whatever else holds rows
back. Rows in flight count nowhere. A key's own bounds are its queue's.
"""

import math
from dataclasses import dataclass

from router.errors import InvalidArgument, ResourceExhausted, RouterError


@dataclass(slots=True)
class Account:
    """What of one tenant waits, over all keys."""

    rows: int = 0
    nbytes: int = 0


NOTHING = Account()


class Budget:
    """What all queues of a process may hold together, and what they hold. None: no bound."""

    def __init__(
        self,
        max_bytes: int,
        *,
        max_rows: int | None = None,
        max_tenant_rows: int | None = None,
        max_tenant_bytes: int | None = None,
    ) -> None:
        self.set_bounds(
            max_bytes, max_rows=max_rows, max_tenant_rows=max_tenant_rows, max_tenant_bytes=max_tenant_bytes
        )
        # State: what waits, in all and by tenant.
        self.used_bytes = 0
        self.rows = 0

    def set_bounds(
        self, max_bytes: int, *, max_rows: int | None, max_tenant_rows: int | None, max_tenant_bytes: int | None
    ) -> None:
        """Change the bounds. Tenants begin at nothing; whoever holds rows back must count them anew."""
        self.max_bytes = max_bytes
        self.max_rows = _bound(max_rows)
        self._max_tenant_rows = _bound(max_tenant_rows)
        self._max_tenant_bytes = _bound(max_tenant_bytes)
        # Tenants are counted only if there is something to compare it to.
        self.bounds_tenants = max_tenant_rows is not None or max_tenant_bytes is not None
        self._accounts: dict[str, Account] = {}

    def __repr__(self) -> str:
        return f"<Budget {self.rows} rows, {self.used_bytes} bytes>"

    def count(self, tenant: str, rows: int, nbytes: int) -> None:
        """So much has come, or gone if negative. No bound applies: what was accepted is never refused later."""
        self.rows += rows
        self.used_bytes += nbytes
        self.count_tenant(tenant, rows, nbytes)

    def count_tenant(self, tenant: str, rows: int, nbytes: int) -> None:
        """The tenant's half of `count`, for who counts the whole of many tenants at once."""
        if self.bounds_tenants:
            account = self._accounts.setdefault(tenant, Account())
            account.rows += rows
            account.nbytes += nbytes
            if not account.rows:
                del self._accounts[tenant]

    def refusal(self, tenant: str, rows: int, nbytes: int) -> RouterError | None:
        """Why so much more cannot be taken; None: it can."""
        account, whose = self._accounts.get(tenant, NOTHING), f" of tenant {tenant!r}"
        return (
            exceeded(nbytes, self.used_bytes, self.max_bytes, "bytes", " in all", "queue_bytes")
            or exceeded(rows, self.rows, self.max_rows, "rows", " in all", "process_rows")
            or exceeded(rows, account.rows, self._max_tenant_rows, "rows", whose, "tenant_rows")
            or exceeded(nbytes, account.nbytes, self._max_tenant_bytes, "bytes", whose, "tenant_bytes")
        )


def exceeded(more: int, used: int, bound: float, unit: str, where: str, reason: str) -> RouterError | None:
    """The refusal of `more` where `used` of `bound` are taken; the caller's own fault where it could never fit."""
    if used + more <= bound:
        return None
    if more > bound:
        return InvalidArgument(f"{more} {unit} at once; at most {bound:.0f} may wait{where}")
    return ResourceExhausted(f"{used} {unit}{where} wait already, {bound:.0f} may", reason=reason)


def _bound(most: int | None) -> float:
    return math.inf if most is None else most
