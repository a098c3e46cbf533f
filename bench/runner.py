"""The run: group after group, round after round, case after case. What is started here is ended here."""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from bench.figures import Figures
from bench.measure import measure
from bench.plan import Case, Group
from bench.postgres import start_postgres
from bench.processes import BenchError, Program
from bench.progress import Progress
from bench.results import GroupResult, collect
from bench.surroundings import describe_disk
from bench.systems import Launcher, System


async def run(
    plan: Sequence[Group], environment: Mapping[str, str], progress: Progress, databases: Path
) -> list[GroupResult]:
    """Measure everything, jobs with databases below `databases`; a BenchError when something does not start or dies."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        async with AsyncExitStack() as stack:
            launcher = Launcher(stack, Path(scratch), environment, databases)
            count = max(case.load_processes for group in plan for case in group.cases)
            loads = [await launcher.start(f"load process {number}", "bench.load") for number in range(count)]
            return [await _run_group(group, launcher, loads, progress) for group in plan]


async def _run_group(group: Group, launcher: Launcher, loads: Sequence[Program], progress: Progress) -> GroupResult:
    async with AsyncExitStack() as stack:
        progress.show(f"{group.name}: starting {', '.join(group.systems)}", always=True)
        launcher = replace(launcher, stack=stack, say=lambda what: progress.show(f"{group.name}: {what}"))
        remark = ""
        if group.databases:
            launcher = await _prepare_databases(group, launcher)
            remark = describe_disk(launcher.databases)
        systems = await _start(group, launcher)
        progress.advance(group.start_s)
        rounds = await measure_rounds(group, systems, loads, progress)
    return collect(group, rounds, remark)


async def measure_rounds(
    group: Group, systems: Mapping[str, System], loads: Sequence[Program], progress: Progress
) -> dict[Case, list[Figures]]:
    """Every case in every round."""
    rounds: dict[Case, list[Figures]] = {case: [] for case in group.cases}
    shown = 0
    for number, case in group.in_order():
        progress.show(f"{group.name}, round {number} of {group.rounds}: {case}", always=number > shown)
        shown = number
        rounds[case].append(await measure(case, group, systems[case.system], loads))
        progress.advance(group.case_s)
    return rounds


async def _prepare_databases(group: Group, launcher: Launcher) -> Launcher:
    """A place for SQLite files, and a PostgreSQL if the group needs one."""
    postgres = None
    try:
        if "postgresql" in group.databases:
            postgres = await start_postgres(launcher.stack, launcher.databases)
        directory = launcher.stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bench-jobs-", dir=launcher.databases)
        )
    except OSError as exc:
        raise BenchError(f"cannot keep databases in {launcher.databases}: {exc.strerror or exc}") from exc
    return replace(launcher, databases=Path(directory), postgres=postgres)


async def _start(group: Group, launcher: Launcher) -> dict[str, System]:
    """All at once; when one fails, its own words are the bench's."""
    try:
        async with asyncio.TaskGroup() as tasks:
            starting = {
                name: tasks.create_task(launcher.start_system(name, group.setting), name=f"start {name}")
                for name in group.systems
            }
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return {name: task.result() for name, task in starting.items()}
