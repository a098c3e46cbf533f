"""What a user sees: JSON or lines and tables on stdout, the spinner and errors on stderr."""

import json
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from router_client.blocks import AgentResult
from router_client.errors import AgentError, RouterError
from router_client.results import Results, retry_after_s

PIPED_WIDTH = 10_000
"""Columns where stdout is no terminal: nothing is cut that a program might read."""


class Waiting:
    """A spinner on stderr while something is waited for; on a terminal only, and gone at the end."""

    def __init__(self, text: str) -> None:
        self._spinner = Spinner("dots", text)
        console = Console(stderr=True)
        self._live = Live(self._spinner, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._is_shown = console.is_terminal

    def __enter__(self) -> Self:
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Show another text."""
        self._spinner.update(text=text)

    def print(self, line: str, *, is_error: bool = False) -> None:
        """Print a line above the spinner, on stdout or on stderr."""
        self._live.stop()
        print(line, file=sys.stderr if is_error else sys.stdout, flush=True)
        if self._is_shown:
            self._live.start()


def print_json(document: object) -> None:
    """Print one JSON document; with escapes where stdout's encoding lacks a character, or it is a lone surrogate."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    print(text if _can_print(text) else json.dumps(document, indent=2))


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")  # None: closed by who started the process
    except UnicodeEncodeError:
        return False
    return True


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under the names of their columns; nothing in them is markup."""
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(one_line, row))
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(table)


def print_members(members: Sequence[tuple[str, str]]) -> None:
    """Print names and what they stand for, a line each."""
    width = max((len(name) for name, _ in members), default=0)
    for name, text in members:
        print(f"{name:<{width}}  {one_line(text)}".rstrip())


def complain(error: RouterError, *, is_json: bool) -> None:
    """Tell on stderr, in one line, why there is no answer; with `--json` on stdout, too."""
    again = f" (a retry may succeed in {error.retry_after_s:g} s)" if error.retry_after_s is not None else ""
    print(f"{error.code}: {one_line(error.message)}{again}", file=sys.stderr)
    if is_json:
        fault = {"code": error.code, "detail": error.message, "retry_after_s": error.retry_after_s}
        print_json({"error": fault})


def results_document(results: Results) -> dict[str, Any]:
    """Return results as REST writes them, without the statuses of HTTP."""
    return {
        "results": {name: _result(result) for name, result in results.items() if result.error is None},
        "errors": {name: _error(error) for name, error in results.errors.items()},
    }


def result_line(name: str, result: AgentResult) -> str:
    """Return an agent's result in one line."""
    if result.error is not None:
        return f"{one_line(name)}: {result.error.code}: {one_line(result.error.message)}"
    line = f"{one_line(name)}: {', '.join(map(_short, result.output))}"
    why = result.explanation
    if why is None:
        return line
    where = f"batch of {why.batch_rows} at {why.replica}" if why.attempts else "kept from an earlier call"
    return f"{line} (queued {why.queued_s:.3f} s, model {why.backend_s:.3f} s, {where})"


def one_line(text: str) -> str:
    """Return a text without line breaks and what a terminal might obey."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def describe(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the members of a document that say something, as texts."""
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in document.items() if value]


def _result(result: AgentResult) -> dict[str, Any]:
    told: dict[str, Any] = {"output": [_float32(value) for value in result.output]}
    why = result.explanation
    if why is not None:
        told["explanation"] = {name: getattr(why, name) for name in why.__slots__}
    return told


def _error(error: AgentError) -> dict[str, Any]:
    return {"code": error.code, "detail": error.message, "retry_after_s": retry_after_s(error)}


def _float32(value: float) -> float | None:
    """The same float32 in as few digits as tell it apart; JSON has no NaN and no infinity."""
    return float(_short(value)) if math.isfinite(value) else None


def _short(value: float) -> str:
    """0.14228487, not 0.14228487014770508; nine digits tell every float32."""
    texts = (f"{value:.{digits}g}" for digits in range(6, 10))
    return next((text for text in texts if _pack(float(text)) == _pack(value)), f"{value:.9g}")


def _pack(value: float) -> bytes:
    return struct.pack("<f", value)
