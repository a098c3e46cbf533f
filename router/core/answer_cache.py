"""Answers of one key's rows that are known for a while: a bounded map from a row's digest to its place in an answer.

What is kept is the whole answer of a batch and where the row stands in it, so nothing is copied; answers are forgotten
as wholes, too. All live equally long, so the oldest is the first to expire and, past the bound, the first to go: a
line, and no order of use to keep. That, the caller's clock and shared bytes are why this is no ready-made cache, which
would take an entry and a copy for each row.

Times are monotonic seconds from the caller.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from router.core.types import BatchAnswer

# What a row costs beside its outputs: digest, dictionary's entry, place (some 250 bytes on CPython 3.11).
ROW_OVERHEAD_BYTES = 256


@dataclass(slots=True, eq=False)
class _Kept:
    """One answer, with the digests that point to it."""

    answer: BatchAnswer
    expires_at: float
    nbytes: int
    digests: list[bytes]


class AnswerCache:
    """At most `max_bytes` of answers, each for `ttl_s`."""

    def __init__(self, ttl_s: float, max_bytes: int) -> None:
        self.ttl_s = ttl_s
        self.max_bytes = max_bytes
        # State: the answers, oldest first; where each row stands; the bytes of all.
        self._line: deque[_Kept] = deque()
        self._places: dict[bytes, tuple[_Kept, int]] = {}
        self._nbytes = 0

    def __repr__(self) -> str:
        return f"<AnswerCache {len(self._places)} rows in {len(self._line)} answers, {self._nbytes} bytes>"

    @property
    def wake_at(self) -> float:
        """When the next answer expires; infinity when there is none."""
        return self._line[0].expires_at if self._line else math.inf

    def find(self, digest: bytes, now: float) -> tuple[BatchAnswer, int] | None:
        """The answer and the number of the row in it."""
        place = self._places.get(digest)
        if place is None or place[0].expires_at <= now:
            return None
        return place[0].answer, place[1]

    def put(self, digests: Sequence[bytes], answer: BatchAnswer, offset: int, now: float) -> None:
        """Keep rows offset .. offset + len(digests) - 1 of an answer; what is too old or too much goes."""
        self.expire(now)
        kept = self._line[-1] if self._line and self._line[-1].answer is answer else self._begin(answer, now)
        kept.digests += digests
        self._places.update((digest, (kept, offset + number)) for number, digest in enumerate(digests))
        self._grow(kept, len(digests) * ROW_OVERHEAD_BYTES)
        while self._nbytes > self.max_bytes:
            self._forget_oldest()

    def expire(self, now: float) -> None:
        """Forget what is too old."""
        while self.wake_at <= now:
            self._forget_oldest()

    def _begin(self, answer: BatchAnswer, now: float) -> _Kept:
        kept = _Kept(answer, now + self.ttl_s, 0, [])
        self._line.append(kept)
        self._grow(kept, sum(len(tensor.data) for tensor in answer.outputs))
        return kept

    def _grow(self, kept: _Kept, nbytes: int) -> None:
        kept.nbytes += nbytes
        self._nbytes += nbytes

    def _forget_oldest(self) -> None:
        """A row that was answered again since then stands elsewhere, and stays."""
        kept = self._line.popleft()
        self._nbytes -= kept.nbytes
        for digest in kept.digests:
            place = self._places.get(digest)
            if place is not None and place[0] is kept:
                del self._places[digest]
