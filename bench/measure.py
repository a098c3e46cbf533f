"""One measurement: the load processes ask, and meanwhile the bench looks at what the servers use."""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.figures import Figures, percentile_ms, us_per_vector
from bench.orders import Order, Ready, Report, Window, from_line, to_line
from bench.plan import Case, Group
from bench.processes import Program, Usage, machine_cpu_s
from bench.systems import BatchCount, System

READY_TIMEOUT_S = 60.0
LOOK_S = 0.25
MB = 1e6


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What had been used at one point in time."""

    at: float
    usages: Mapping[str, Usage | None]
    machine_cpu_s: float | None
    batches: BatchCount | None


async def measure(case: Case, group: Group, system: System, loads: Sequence[Program]) -> Figures:
    """Ask as the case says; the servers' own accounts are read at both ends of the window."""
    loads = loads[: case.load_processes]
    await _give_orders(case, system, loads)
    begin = time.monotonic() + group.warm_s
    window = Window(begin, begin + group.seconds)
    await asyncio.gather(*(load.send_line(to_line(window)) for load in loads))
    watch = _Watch(system, loads)
    await _sleep_until(window.begin)
    before = await watch.begin()
    rss_mb = await watch.look_until(window.end)
    after = await watch.end()
    reports = [from_line(Report, await load.read_line(READY_TIMEOUT_S + group.tail_s)) for load in loads]
    await system.settle()
    return _figures(case, group, reports, before, after, rss_mb)


async def _give_orders(case: Case, system: System, loads: Sequence[Program]) -> None:
    shares = _share(case.callers, len(loads))
    for load, callers in zip(loads, shares, strict=True):
        order = Order(
            *(system.way, system.address, case.workload, callers, case.pause_s, case.rate_per_s, case.backlog),
            system.model_name,
        )
        await load.send_line(to_line(order))
    for load in loads:
        from_line(Ready, await load.read_line(READY_TIMEOUT_S))


class _Watch:
    """Reads the accounts of servers and load processes."""

    def __init__(self, system: System, loads: Sequence[Program]) -> None:
        self._system = system
        servers = {
            "router": system.router,
            "gateway": system.gateway,
            **{f"mock {number}": mock for number, mock in enumerate(system.mocks)},
            "database": system.database,
        }
        self._programs = {name: program for name, program in servers.items() if program is not None}
        self._programs |= {f"load {number}": load for number, load in enumerate(loads)}

    async def begin(self) -> Snapshot:
        """The router's metrics first: what it costs to tell them is not counted."""
        batches = await self._system.count_batches()
        return Snapshot(time.monotonic(), self._usages(), machine_cpu_s(), batches)

    async def end(self) -> Snapshot:
        """The metrics last, for the same reason."""
        at, usages, machine_s = time.monotonic(), self._usages(), machine_cpu_s()
        return Snapshot(at, usages, machine_s, await self._system.count_batches())

    async def look_until(self, end: float) -> dict[str, float]:
        """The most memory that each was seen with, in MB."""
        most: dict[str, float] = {}
        while True:
            for name, usage in self._usages().items():
                if usage is not None:
                    most[name] = max(most.get(name, 0.0), usage.rss_bytes / MB)
            if time.monotonic() >= end:
                return most
            await _sleep_until(min(time.monotonic() + LOOK_S, end))

    def _usages(self) -> dict[str, Usage | None]:
        return {name: program.usage() for name, program in self._programs.items()}


def _sum(busy: Mapping[str, float], names: str) -> float | None:
    """Of all programs whose name begins so."""
    found = [value for name, value in busy.items() if name.startswith(names)]
    return sum(found) if found else None


def _figures(
    case: Case,
    group: Group,
    reports: Sequence[Report],
    before: Snapshot,
    after: Snapshot,
    rss_mb: Mapping[str, float],
) -> Figures:
    latencies_us = list(itertools.chain.from_iterable(report.latencies_us for report in reports))
    requests_per_s = len(latencies_us) / group.seconds
    vectors_per_s = requests_per_s * case.agents
    busy = _busy(before, after)
    return Figures(
        requests_per_s=requests_per_s,
        vectors_per_s=vectors_per_s,
        p50_ms=percentile_ms(latencies_us, 50),
        p99_ms=percentile_ms(latencies_us, 99),
        router_us_per_vector=us_per_vector(busy.get("router"), vectors_per_s),
        gateway_us_per_vector=us_per_vector(busy.get("gateway"), vectors_per_s),
        mock_us_per_vector=us_per_vector(_sum(busy, "mock"), vectors_per_s),
        database_us_per_vector=us_per_vector(busy.get("database"), vectors_per_s),
        batch_rows=_mean_batch_rows(before.batches, after.batches),
        router_rss_mb=rss_mb.get("router"),
        gateway_rss_mb=rss_mb.get("gateway"),
        load_busy=max((value for name, value in busy.items() if name.startswith("load")), default=None),
        others_busy=_others_busy(before, after, sum(busy.values())),
        failed=sum(report.failed for report in reports),
        failure=next((report.failure for report in reports if report.failure), ""),
    )


def _busy(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Cores that each process used in between."""
    used = {}
    for name, start in before.usages.items():
        end = after.usages[name]
        if start is not None and end is not None:
            used[name] = (end.cpu_s - start.cpu_s) / (after.at - before.at)
    return used


def _others_busy(before: Snapshot, after: Snapshot, ours: float) -> float | None:
    """Cores that all other processes used in between."""
    if before.machine_cpu_s is None or after.machine_cpu_s is None:
        return None
    return max(0.0, (after.machine_cpu_s - before.machine_cpu_s) / (after.at - before.at) - ours)


def _mean_batch_rows(before: BatchCount | None, after: BatchCount | None) -> float | None:
    if before is None or after is None or after.batches == before.batches:
        return None
    return (after.rows - before.rows) / (after.batches - before.batches)


def _share(callers: int, loads: int) -> list[int]:
    """As evenly as it goes: 10 callers on 4 are 3, 3, 2, 2."""
    return [callers // loads + (number < callers % loads) for number in range(loads)]


async def _sleep_until(when: float) -> None:
    await asyncio.sleep(max(0.0, when - time.monotonic()))
