"""What becomes of the rows of a batch that came back without an answer, and how long the replica pauses.

| what came back | then |
|---|---|
| stream lost, batch timeout | again, without charge; from the second loss on every row alone; at last they fail |
| no room (RESOURCE_EXHAUSTED) | again while attempts and the retry budget last |
| refused, the model's fault | the rows fail at once |
| refused, the rows' fault | split at once |
| refused, unclear whose fault | once elsewhere, then split |
| malformed | once elsewhere, then the rows fail |

A single row that was refused is the bad one: it fails with the model's own error. A row makes at most `retries` + 1
attempts; splits are none, for they end by themselves, and waiting for a replica is none, because nothing is sent.
"Elsewhere" needs another healthy replica, attempts and the retry budget, or it is skipped. Rows are executed at least
once: a batch whose stream was lost may have been computed. `retries: 0` turns every further try off, splits included,
for models with side effects.

A row may be what kills its replica. The first two times its neighbours cannot be told from it; the third time it
travels alone, so it kills no more than three, and they survive.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from router.core.types import Part
from router.errors import BackendError, BackendExhausted, Blame, Malformed, Refused

PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 2.0
# Rows that were lost so often travel alone.
ALONE_AFTER_LOSSES = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch without an answer: its parts as they were sent, and what is known of the way they came.

    `is_split`: they are a piece of a batch that was refused. `had_second`: another replica had the batch already.
    """

    parts: tuple[Part, ...]
    error: BackendError
    is_split: bool = False
    had_second: bool = False


@dataclass(frozen=True, slots=True)
class Chances:
    """What may still be tried. `may_spend`: asks the retry budget for so many rows, and takes them from it."""

    retries: int
    has_other: bool
    may_spend: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where the parts go; those whose caller is gone go nowhere.

    again: to the head of their queue, or to their place as a piece. elsewhere: as the batch they are, to another
    replica. split: in pieces. alone: row by row. failed: their callers get the error; `is_poison`: it is their own.
    """

    again: tuple[Part, ...] = ()
    elsewhere: tuple[Part, ...] = ()
    split: tuple[Part, ...] = ()
    alone: tuple[Part, ...] = ()
    failed: tuple[Part, ...] = ()
    is_poison: bool = False

    def __str__(self) -> str:
        names = ("again", "elsewhere", "split", "alone", "failed")
        counts = [f"{count_rows(parts)} {name}" for name in names if (parts := getattr(self, name))]
        return ", ".join(counts) or "nobody waits for them"


def judge(failure: Failure, chances: Chances) -> Verdict:
    """Sort the parts of a failed batch by the table."""
    parts, error = tuple(open_parts(failure.parts)), failure.error
    if not parts or not chances.retries:
        return Verdict(failed=parts)
    if isinstance(error, BackendExhausted):
        return _exhausted(parts, chances)
    if isinstance(error, Malformed):
        return _malformed(parts, failure, chances)
    if isinstance(error, Refused):
        return _refused(parts, error.blame, failure, chances)
    return _lost(parts, chances)


def open_parts(parts: Iterable[Part]) -> Iterator[Part]:
    """Those that somebody still waits for."""
    return (part for part in parts if not part.block.recipient.is_closed)


def count_rows(parts: Iterable[Part]) -> int:
    """Rows of some parts."""
    return sum(part.rows for part in parts)


def _lost(parts: tuple[Part, ...], chances: Chances) -> Verdict:
    again: list[Part] = []
    alone: list[Part] = []
    failed: list[Part] = []
    for part in parts:
        lost = part.lost()
        if lost.attempts > chances.retries:
            failed.append(part)
        else:
            (alone if lost.losses >= ALONE_AFTER_LOSSES else again).append(lost)
    return Verdict(again=tuple(again), alone=tuple(alone), failed=tuple(failed))


def _exhausted(parts: tuple[Part, ...], chances: Chances) -> Verdict:
    again = tuple(part.tried() for part in parts if part.attempts < chances.retries)
    if not again or not chances.may_spend(count_rows(again)):
        return Verdict(failed=parts)
    return Verdict(again=again, failed=tuple(part for part in parts if part.attempts >= chances.retries))


def _malformed(parts: tuple[Part, ...], failure: Failure, chances: Chances) -> Verdict:
    hopeful = tuple(part.tried() for part in parts if part.attempts < chances.retries)
    if failure.had_second or not _may_go_elsewhere(hopeful, chances):
        return Verdict(failed=parts)
    return Verdict(elsewhere=hopeful, failed=tuple(part for part in parts if part.attempts >= chances.retries))


def _refused(parts: tuple[Part, ...], blame: Blame, failure: Failure, chances: Chances) -> Verdict:
    if blame is Blame.MODEL:
        return Verdict(failed=parts)
    is_tried = blame is Blame.ROWS or failure.is_split or failure.had_second
    if not is_tried and all(part.attempts < chances.retries for part in parts) and _may_go_elsewhere(parts, chances):
        return Verdict(elsewhere=tuple(part.tried() for part in parts))
    # One row that was sent with others is not known to be the bad one, even if nobody waits for these any more.
    if count_rows(failure.parts) == 1:
        return Verdict(failed=parts, is_poison=True)
    return Verdict(split=parts)


def _may_go_elsewhere(parts: tuple[Part, ...], chances: Chances) -> bool:
    """Charges the retry budget when the answer is yes."""
    return bool(parts) and chances.has_other and chances.may_spend(count_rows(parts))


def pause_s(failures: int, chance: float) -> float:
    """Seconds a replica pauses after its n-th failure in a row: 50, 100, 200 ms ... 2 s, times 0.75 to 1.25.

    `chance` in 0..1 comes from the caller, so that replicas that failed together do not return together.
    """
    doubled = PAUSE_FIRST_S * 2.0 ** (min(failures, 16) - 1)
    return min(doubled, PAUSE_MAX_S) * (0.75 + 0.5 * chance)
