"""When to ask again. Pure: no loop, no clock, no chance of its own; the caller gives what is left and a random number.

A server that is full or leaving names a time after which a retry may succeed (push-back). That time is a minimum, and
many clients are told the same one: each waits up to half as long again, by chance, so that they do not come back
together. A server that names none is asked again after 0.2, 0.4, 0.8, … s, with the same jitter.

A request is asked again at most `retries` times, never after its deadline, and never after more than MAX_PUSHBACK_S:
who is told to wait longer had better tell its own caller.
"""

from dataclasses import dataclass
from math import inf

MAX_PUSHBACK_S = 60.0
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
JITTER = 0.5


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``retries``: how often a request is asked again at most; 0: never."""

    retries: int = 2

    def delay_s(self, sent: int, pushback_s: float | None, left_s: float, chance: float) -> float | None:
        """Return how long to wait before the next sending, in seconds; None: give up now.

        Args:
            sent: how often the request was sent already, at least 1.
            pushback_s: seconds that the server named; None: it named none.
            left_s: seconds until the request's deadline; infinity for none.
            chance: a random number, 0 <= chance < 1.
        """
        least_s = backoff_s(sent) if pushback_s is None else pushback_s
        delay_s = least_s * (1 + JITTER * chance)
        if sent > self.retries or least_s > MAX_PUSHBACK_S or delay_s >= left_s:
            return None
        return delay_s


def backoff_s(sent: int) -> float:
    """Return the seconds to wait after that many sendings: 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, …."""
    return min(FIRST_BACKOFF_S * 2.0 ** min(sent - 1, 10), MAX_BACKOFF_S)


def left_s(deadline: float | None, now: float) -> float:
    """Return the seconds until a deadline, infinity for none."""
    return inf if deadline is None else deadline - now
