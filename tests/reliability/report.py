"""What a scenario found: figures, and the claims that hold or do not.

A claim about milliseconds says something of the router only while the machine lets it run. How long the main threads
of router, model servers and this process stood in line for a processor, Linux tells; where that was more than a small
share of the time, such claims are told with their figures and not judged. All others always are.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.cluster import Router
from tests.reliability.ledger import Ledger

# Router, model servers and ledger on two cores of their own are in line for 3-6 % of the time; beside other work 10-50.
MOST_WAITING = 0.1


class Strain:
    """How much some processes lack a processor."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._paths = [Path(f"/proc/{pid}/schedstat") for pid in pids]
        self._begun = [_waited_s(path) for path in self._paths]
        self._begun_at = time.monotonic()

    def share(self) -> float:
        """Of the time since the beginning, of the main thread that waited most."""
        waited = (_waited_s(path) - begun for path, begun in zip(self._paths, self._begun, strict=True))
        return max(waited) / (time.monotonic() - self._begun_at)


def _waited_s(path: Path) -> float:
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


@dataclass
class Report:
    """One row of the plan."""

    row: int
    title: str
    seed: int
    figures: list[tuple[str, str]] = field(default_factory=list)
    claims: list[tuple[str, bool]] = field(default_factory=list)
    timings: list[tuple[str, bool]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    strain: Strain | None = None
    waiting: float = 0.0

    def watch(self, router: Router, *pids: int) -> None:
        """From now on see whether the machine lets router, model servers and this process run."""
        self.strain = Strain([os.getpid(), router.program.pid, *pids])

    def tell(self, name: str, value: Any) -> None:  # noqa: ANN401 -- anything that can be shown
        """A figure."""
        self.figures.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))

    def claim(self, text: str, holds: bool) -> None:
        """Something that must hold."""
        self.claims.append((text, bool(holds)))

    def timed(self, text: str, holds: bool) -> None:
        """Something that must hold on a machine that has time for it."""
        self.timings.append((text, bool(holds)))

    @property
    def is_calm(self) -> bool:
        """Whether the machine had time for it."""
        return self.waiting <= MOST_WAITING

    @property
    def passes(self) -> bool:
        """Whether everything that is judged holds."""
        judged = [*self.claims, *(self.timings if self.is_calm else ())]
        return all(holds for _, holds in judged) and not self.problems

    async def close(self, ledger: Ledger, router: Router) -> None:
        """What holds of every scenario, at its end: each row has one right end in time, and nothing is left."""
        await ledger.wait_until_closed(10)
        self.waiting = self.strain.share() if self.strain else 0.0
        left = await router.left_over()
        rows = {code or "answered": count for code, count in sorted(ledger.rows.items())}
        self.tell(
            "rows", f"{ledger.rows_asked:,} asked: " + ", ".join(f"{count:,} {end}" for end, count in rows.items())
        )
        ended = sum(count for end, count in ledger.rows.items() if end not in ("wrong", "twice"))
        self.claim(
            "every row has one end", ended == ledger.rows_asked and not ledger.lost() and not ledger.rows["twice"]
        )
        self.claim("no row has another's answer", not ledger.rows["wrong"])
        self.timed(f"no call ends 100 ms after its deadline: {ledger.late[:3]}", not ledger.late)
        self.claim(f"nothing is queued, open or in flight at the end: {left}", not any(left.values()))
        self.tell("this process was late by, at most, s", ledger.worst_lag_s)
        self.tell("of the time spent waiting for a processor", f"{self.waiting:.1%}")
        self.problems += ledger.problems

    def __str__(self) -> str:
        lines = [f"row {self.row}: {self.title} (seed {self.seed}): {'pass' if self.passes else 'FAIL'}"]
        lines += [f"    {name}: {value}" for name, value in self.figures]
        lines += [f"    {'ok  ' if holds else 'FAIL'} {text}" for text, holds in self.claims]
        unjudged = "ok  " if self.is_calm else "busy"
        lines += [f"    {unjudged if holds or not self.is_calm else 'FAIL'} {text}" for text, holds in self.timings]
        lines += [f"    problem: {problem}" for problem in self.problems]
        return "\n".join(lines)
