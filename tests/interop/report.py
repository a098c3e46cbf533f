"""The list of cases with their results, printed at the end of a run: what others' programs the tests have met.

interop: tritonclient gRPC: 31 passed
interop: Triton: 23 skipped: Triton is not installed (make venv-triton)
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from types import ModuleType

import pytest

PROPERTY = "interop"
# What a test found out, told beneath its system.
NOTE = "note"
# In the order in which they are told.
_OUTCOMES = ("passed", "failed", "error", "skipped")


def name_of(module: ModuleType) -> str:
    """What the module calls the system that it tests; else its own name, without `test_`."""
    return str(getattr(module, "SYSTEM", module.__name__.rpartition(".test_")[2]))


def lines(stats: dict[str, list[object]], *, with_cases: bool) -> Iterator[str]:
    """A line per system, in order of their names; under it one per case, if wanted."""
    systems: dict[str, list[tuple[str, pytest.TestReport]]] = {}
    for outcome in _OUTCOMES:
        for report in stats.get(outcome, []):
            if isinstance(report, pytest.TestReport) and (system := dict(report.user_properties).get(PROPERTY)):
                systems.setdefault(str(system), []).append((outcome, report))
    for system, cases in sorted(systems.items()):
        yield f"interop: {system}: {_count(cases)}"
        yield from (f"  {value}" for _, report in cases for name, value in report.user_properties if name == NOTE)
        if with_cases:
            yield from sorted(f"  {outcome:7} {_case(report)}" for outcome, report in cases)


def _count(cases: Iterable[tuple[str, pytest.TestReport]]) -> str:
    """`3 passed, 1 skipped: why`."""
    counts = Counter(outcome for outcome, _ in cases)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
    reasons = sorted({_reason(report) for outcome, report in cases if outcome == "skipped"})
    return ": ".join([told, *reasons])


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped; pytest keeps (file, line, text)."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")


def _case(report: pytest.TestReport) -> str:
    return report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ", report.nodeid.count("_"))
