"""What a run has found, as text and as JSON. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.figures import Figures
from bench.plan import Group
from bench.results import GroupResult, Result
from bench.workloads import WORKLOADS

FORMAT = 1
"""Of the JSON document; grows when a reader of the old one would be misled."""

# The project's own aims, beside what was measured; nothing is judged by them. (group, system, workload, callers):
TARGETS = {
    ("zero", "unary", "S1", 64): "≥ 0.8 of echo",
    ("zero", "infer", "S1", 64): "≥ 0.75 of echo",
    ("zero", "stream", "S1", 64): "≥ 25,000 requests/s, router ≤ 20 µs",
    ("zero", "stream", "S2", 64): "≥ 8,000 requests/s, router ≤ 6 µs",
    ("zero", "rest", "S2", 64): "≥ 2,500 requests/s, router + gateway ≤ 21.9 µs (350 per request)",
    ("lone", "unary", "S1", 1): "p50 ≤ 1.5 ms",
    ("lone", "stream", "S1", 1): "p50 ≤ 1.5 ms",
    ("lone", "rest", "S1", 1): "p50 ≤ 2.5 ms",
    ("slot", "unary", "S1", 64): "about 960 requests/s, p50 65 ms",
    ("slot", "stream", "S1", 64): "≥ 1,050 requests/s, p50 ≤ 65 ms",
    ("full", "stream", "S1", 512): "≥ 5,018 vectors/s (0.98 of the ceiling)",
    ("held", "stream", "held", 10_000): "router < 500 MB, added p99 < 50 ms",
    ("jobs", "sqlite", "submit", 256): "≥ 1,000 jobs/s",
    ("jobs", "postgresql", "submit", 256): "≥ 1,000 jobs/s",
    ("jobs", "sqlite", "submit", 1): "p99 < 50 ms",
    ("jobs", "postgresql-store", "claim-finish", 4): "≥ 1,000 jobs/s",
    ("jobs", "sqlite-store", "claim", 1): "< 10 ms",
    ("jobs", "postgresql-store", "claim", 1): "< 10 ms",
    ("jobs", "sqlite-store", "page", 1): "< 20 ms",
    ("jobs", "postgresql-store", "page", 1): "< 20 ms",
}

NOTES = """\
Medians of the rounds. of echo: requests/s as a share of what the bare grpc.aio echo reached in the same round. µs: CPU
of the whole process per vector, router and gateway apart; in the echo's rows "router" is the echo server. batch: mean
rows of the batches that the router dispatched. MB: resident memory. load: how many load processes asked, and how much
of a core the busiest of them used; near 100 % the load may have been the limit. others: how much of a core processes
used that have no part in the case; figures are only worth something where it is small. added: a call's time less the
model's. Jobs, µs per job: a submit is answered when it is on the disk, and the gateway that took it runs it meanwhile.
Claims, finishes and pages are asked of the store in a load process, with nothing between. Targets are the project's
aims, for information only."""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and what stands below it; "" where a case has no such figure."""

    title: str
    cell: Callable[[Result], str]
    is_text: bool = False


def tables(groups: Sequence[GroupResult]) -> str:
    """Every group with its title, one table per workload; then what failed."""
    return "\n\n".join(part for group in groups for part in _group_parts(group))


def align(titles: Sequence[str], rows: Sequence[Sequence[str]], is_text: Sequence[bool]) -> str:
    """Columns two spaces apart, text to the left, numbers to the right."""
    lines = [titles, *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def document(groups: Sequence[GroupResult], surroundings: dict[str, Any]) -> dict[str, Any]:
    """Everything, for machines: the surroundings, then each case with its median and its rounds."""
    return {"format": FORMAT, **surroundings, "groups": [_group_document(group) for group in groups]}


def _group_parts(found: GroupResult) -> Iterator[str]:
    yield from _jobs_parts(found) if found.group.name == "jobs" else _workload_parts(found)
    failures = [
        f"{result.case}: {result.median.failed} requests failed, the first with: {result.median.failure}"
        for result in found.results
        if result.median.failed
    ]
    if failures:
        yield "\n".join(failures)


def _workload_parts(found: GroupResult) -> Iterator[str]:
    for workload in dict.fromkeys(result.case.workload for result in found.results):
        results = [result for result in found.results if result.case.workload == workload]
        title = f"{found.group.title}: {WORKLOADS[workload].title}"
        yield f"{title}\n\n{_table(_columns(found.group), results)}"


def _jobs_parts(found: GroupResult) -> Iterator[str]:
    """One table, of what could not be measured, too."""
    missing = [Result(case, (), Figures(0.0, 0.0)) for case in found.group.left_out]
    order = list(dict.fromkeys(result.case.workload for result in (*found.results, *missing)))
    results = sorted((*found.results, *missing), key=lambda result: order.index(result.case.workload))
    yield f"{found.group.title}. {found.remark}\n\n{_table(_job_columns(found.group), results)}"


def _table(all_columns: Sequence[Column], results: Sequence[Result]) -> str:
    columns = [column for column in all_columns if any(column.cell(result) for result in results)]
    rows = [[column.cell(result) for column in columns] for result in results]
    return align([column.title for column in columns], rows, [column.is_text for column in columns])


def _columns(group: Group) -> list[Column]:
    return [
        Column("callers", lambda result: "" if result.case.rate_per_s else f"{result.case.callers}"),
        Column("system", lambda result: result.case.system, is_text=True),
        _figure("requests/s", lambda figures: figures.requests_per_s, ",.0f"),
        _figure("vectors/s", lambda figures: figures.vectors_per_s, ",.0f"),
        *_latency_columns(group),
        _figure("of echo", lambda figures: figures.ratio_to_echo, ".2f"),
        _figure("router µs", lambda figures: figures.router_us_per_vector, ",.1f"),
        _figure("gateway µs", lambda figures: figures.gateway_us_per_vector, ",.1f"),
        _figure("batch", lambda figures: figures.batch_rows, ".1f"),
        _figure("router MB", lambda figures: figures.router_rss_mb, ".0f"),
        _figure("gateway MB", lambda figures: figures.gateway_rss_mb, ".0f"),
        Column("load", _load),
        _figure("others", lambda figures: figures.others_busy, ".0%"),
        Column("target", lambda result: _target(group, result), is_text=True),
    ]


def _job_columns(group: Group) -> list[Column]:
    return [
        Column("what", lambda result: WORKLOADS[result.case.workload].title, is_text=True),
        Column("database", lambda result: result.case.system.removesuffix("-store"), is_text=True),
        Column("asked by", _asked_by, is_text=True),
        Column("jobs/s", _job_rate),
        _figure("p50 ms", lambda figures: figures.p50_ms, ",.2f"),
        _figure("p99 ms", lambda figures: figures.p99_ms, ",.2f"),
        _figure("gateway µs", lambda figures: figures.gateway_us_per_vector, ",.0f"),
        _figure("router µs", lambda figures: figures.router_us_per_vector, ",.0f"),
        _figure("PostgreSQL µs", lambda figures: figures.database_us_per_vector, ",.0f"),
        _figure("batch", lambda figures: figures.batch_rows, ".1f"),
        _figure("gateway MB", lambda figures: figures.gateway_rss_mb, ".0f"),
        Column("load", lambda result: _load(result) if result.rounds else ""),
        _figure("others", lambda figures: figures.others_busy, ".0%"),
        Column("target", lambda result: _job_target(group, result), is_text=True),
    ]


def _asked_by(result: Result) -> str:
    case = result.case
    if case.rate_per_s:
        return f"{case.rate_per_s:g} a second"
    return "1 caller" if case.callers == 1 else f"{case.callers} callers"


def _job_rate(result: Result) -> str:
    """Nothing where callers pause: then it only tells how long."""
    return "" if result.case.pause_s or not result.rounds else f"{result.median.vectors_per_s:,.0f}"


def _job_target(group: Group, result: Result) -> str:
    return _target(group, result) if result.rounds else f"not measured: {group.left_out_reason}"


def _latency_columns(group: Group) -> list[Column]:
    columns = [
        _figure("p50 ms", lambda figures: figures.p50_ms, ",.2f"),
        _figure("p99 ms", lambda figures: figures.p99_ms, ",.2f"),
    ]
    if group.name != "held":
        return columns
    model_ms = group.setting.latency_s * 1e3
    return [
        *columns,
        _figure("added p50", lambda figures: _less(figures.p50_ms, model_ms), ",.1f"),
        _figure("added p99", lambda figures: _less(figures.p99_ms, model_ms), ",.1f"),
    ]


def _figure(title: str, value: Callable[[Figures], float | None], form: str) -> Column:
    def cell(result: Result) -> str:
        number = value(result.median)
        return "" if number is None else format(number, form)

    return Column(title, cell)


def _less(value: float | None, part: float) -> float | None:
    return None if value is None else value - part


def _load(result: Result) -> str:
    busy = result.median.load_busy
    return f"{result.case.load_processes}" + ("" if busy is None else f" at {busy:.0%}")


def _target(group: Group, result: Result) -> str:
    case = result.case
    return TARGETS.get((group.name, case.system, case.workload, case.callers), "")


def _group_document(found: GroupResult) -> dict[str, Any]:
    group = asdict(found.group)
    del group["cases"]
    group["remark"] = found.remark
    cases = [
        {
            **asdict(result.case),
            "agents": result.case.agents,
            "target": _target(found.group, result),
            "median": asdict(result.median),
            "rounds": [asdict(figures) for figures in result.rounds],
        }
        for result in found.results
    ]
    return {**group, "cases": cases}
