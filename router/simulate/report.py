"""The table: a line per scenario, with the bounds that theory sets, and the answer to "which settings meet my p99?"."""

import math
from collections.abc import Sequence

from router.simulate.scenario import Answer, cheapest

HEADS = (
    "replicas", "batch", "policy", "rows/s", "load", "mean", "bound", "p50", "p99", "rows/batch", "p10-p90", "goodput",
    "expired", "refused",
)  # fmt: skip

NOTES = """\
rows/s: answered. load: of what full batches make possible, R B / S(B). Times in seconds. bound: the mean latency of
evenly spaced batches at that rate, (1 + 1/(2R)) beta / (1 - rate alpha / R): a busy model can hardly do better, an idle
one can, and above 100 % load nothing can. rows/batch: mean, and what nine in ten batches reach and do not exceed.
goodput: rows/s answered within their timeout. expired, refused: of those that arrived."""


def table(answers: Sequence[Answer], p99_s: float | None = None) -> str:
    """Lines of equal columns; with a goal, the last column says who meets it."""
    heads = (*HEADS, *((f"p99 <= {p99_s:g}",) if p99_s else ()))
    lines = [heads, *((*_cells(answer), *((_verdict(answer, p99_s),) if p99_s else ())) for answer in answers)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def advice(answers: Sequence[Answer], p99_s: float) -> str:
    """Which settings meet the goal."""
    best = cheapest(answers, p99_s)
    if best is None:
        return f"None of these answers 99 of 100 rows within {p99_s:g} s without turning any away."
    scenario = best.scenario
    return (
        f"The least that answers 99 of 100 rows within {p99_s:g} s: {scenario.replicas} replicas, "
        f"max_batch_size {scenario.max_batch_size} ({scenario.policy}: p99 {_time(best.figures.p99_s)} s)."
    )


def _verdict(answer: Answer, p99_s: float) -> str:
    return "yes" if answer.meets(p99_s) else "no"


def _cells(answer: Answer) -> tuple[str, ...]:
    scenario, figures = answer.scenario, answer.figures
    return (
        f"{scenario.replicas}",
        f"{scenario.max_batch_size}",
        scenario.policy,
        f"{figures.answered:,.1f}",
        f"{figures.arrived / scenario.capacity:.0%}",
        _time(figures.mean_s),
        _time(scenario.busy_mean_s(figures.arrived)),
        _time(figures.p50_s),
        _time(figures.p99_s),
        f"{figures.batch_mean:.1f}" if figures.answered else "-",
        f"{figures.batch_p10:.0f}-{figures.batch_p90:.0f}" if figures.answered else "-",
        f"{figures.goodput:,.1f}",
        f"{figures.expired_share:.1%}",
        f"{figures.refused_share:.1%}",
    )


def _time(seconds: float) -> str:
    """Three significant digits, no more than tenths of a millisecond: 0.0069, 0.522, 5.35, 12.3."""
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}"
