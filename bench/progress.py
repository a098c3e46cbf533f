"""What runs now and how far it is: one line that is rewritten on a terminal, else a line now and then."""

import sys
import time
from typing import TextIO

LINE_EVERY_S = 5.0
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Knows how long the whole should take; what is left is scaled by how long it has taken so far."""

    def __init__(self, total_s: float, stream: TextIO = sys.stderr) -> None:
        self._total_s = total_s
        self._done_s = 0.0
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._started_at = time.monotonic()
        self._shown_at = -LINE_EVERY_S

    def show(self, what: str, *, always: bool = False) -> None:
        """Say what runs now; `always`: also where lines are few."""
        now = time.monotonic()
        if self._is_terminal:
            self._write(f"{CLEAR_LINE}{self._line(what, now)}")
        elif always or now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            self._write(f"{self._line(what, now)}\n")

    def advance(self, seconds: float) -> None:
        """What should take `seconds` is done."""
        self._done_s += seconds

    def close(self) -> None:
        """Leave no half line behind."""
        if self._is_terminal:
            self._write(CLEAR_LINE)

    def _line(self, what: str, now: float) -> str:
        share = min(self._done_s / self._total_s, 1.0)
        pace = (now - self._started_at) / self._done_s if self._done_s else 1.0
        left_s = max(0.0, self._total_s - self._done_s) * pace
        return f"bench {share:4.0%}, {_duration(left_s)} left: {what}"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _duration(seconds: float) -> str:
    """`4:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
