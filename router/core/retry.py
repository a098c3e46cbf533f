"""What becomes of a batch that came back without an answer: which rows try again and which fail, and how long the
replica pauses.

Rows are executed at least once: a batch whose stream was lost may have been computed. `retries: 0` turns every further
try off, for models with side effects. A row makes at most retries + 1 attempts; waiting for a replica is none, because
nothing is sent while none is connected.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from router.core.types import Part
from router.errors import BackendError

PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`again` go back to the head of their queue, with the attempt counted; `failed` get the error."""

    again: tuple[Part, ...]
    failed: tuple[Part, ...]


def judge(parts: Iterable[Part], error: BackendError, retries: int) -> Verdict:
    """Sort the parts of a failed batch. Parts whose caller is gone are in neither list."""
    again: list[Part] = []
    failed: list[Part] = []
    for part in parts:
        if part.block.recipient.is_closed:
            continue
        if error.may_requeue and part.attempts < retries:
            again.append(part.tried())
        else:
            failed.append(part)
    return Verdict(tuple(again), tuple(failed))


def pause_s(failures: int, chance: float) -> float:
    """Seconds a replica pauses after its n-th failure in a row: 50, 100, 200 ms ... 2 s, times 0.75 to 1.25.

    `chance` in 0..1 comes from the caller, so that replicas that failed together do not return together.
    """
    doubled = PAUSE_FIRST_S * 2.0 ** (min(failures, 16) - 1)
    return min(doubled, PAUSE_MAX_S) * (0.75 + 0.5 * chance)
