"""What the bench and its load processes tell each other: one line of JSON each, over stdin and stdout.

    bench                      load process
    Order            ─────►    connects, asks once
                     ◄─────    Ready
    Window           ─────►    asks from now on; what is answered inside of the window counts
                     ◄─────    Report

Points in time are `time.monotonic()`, which all processes of a machine share.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Order:
    """Whom to ask (`address`) in which `way` (clients.py), what, and how.

    With `rate_per_s` calls begin at that rate inside of the window, however long they take, and every one counts;
    `callers` is then without meaning. Else each caller asks, waits for the answer and `pause_s`, and asks again.
    `backlog` jobs are laid in to wait before anything is asked. `model_name`: in place of the workload's own.
    """

    way: str
    address: str
    workload: str
    callers: int = 1
    pause_s: float = 0.0
    rate_per_s: float = 0.0
    backlog: int = 0
    model_name: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """Connected."""


@dataclass(frozen=True, slots=True)
class Window:
    """When to measure."""

    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Report:
    """How long each request took that was answered in time, in microseconds; how many failed, and the first's words."""

    latencies_us: list[int] = field(default_factory=list)
    failed: int = 0
    failure: str = ""


def to_line(message: Order | Ready | Window | Report) -> str:
    """One line, with its end."""
    return json.dumps(asdict(message)) + "\n"


def from_line(kind: type[_T], line: str | bytes) -> _T:
    """The message; a TypeError when the line is one of another kind."""
    fields: dict[str, Any] = json.loads(line)
    return kind(**fields)
