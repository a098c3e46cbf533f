"""`python -m bench`: measure, print tables, write JSON and a picture.

Exit status: 0 whatever the figures, 1 when something did not start or died, 2 for a bad argument, 130 after SIGINT or
SIGTERM. However it ends, it leaves no process behind.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bench import chart, report, surroundings
from bench.plan import ALL_GROUPS, QUICK, Extent, Group, make_plan
from bench.postgres import why_missing
from bench.processes import BenchError
from bench.progress import Progress
from bench.results import GroupResult
from bench.runner import run

DEFAULT_DIRECTORY = surroundings.ROOT / "var" / "bench"
DISK = Path("/var/tmp")  # often /tmp is in memory, where a commit costs nothing
INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Measure and report."""
    options = _parse(arguments)
    environment = dict(options.set)
    described = surroundings.describe(arguments, environment)
    plan = make_plan(_extent(options))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    signal.signal(signal.SIGTERM, as_if_interrupted)
    try:
        found = _measure(plan, environment, options.job_databases)
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    _print(found, described)
    _write(found, described, options.output)
    return 0


def _measure(plan: Sequence[Group], environment: dict[str, str], databases: Path) -> list[GroupResult]:
    with contextlib.closing(Progress(sum(group.estimate_s for group in plan))) as progress:
        return asyncio.run(run(plan, environment, progress, databases))


def as_if_interrupted(_number: int, _frame: FrameType | None) -> None:
    """asyncio.run makes an orderly end of SIGINT: it cancels the run, whose blocks end what they have started."""
    signal.raise_signal(signal.SIGINT)


def _print(found: Sequence[GroupResult], described: dict[str, Any]) -> None:
    print(surroundings.one_line(described))
    print(f"{described['command']}, {described['started_at']}\n")
    print(report.tables(found))
    print(f"\n{report.NOTES}\n")


def _write(found: Sequence[GroupResult], described: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / datetime.datetime.fromisoformat(described["started_at"]).strftime("%Y%m%d-%H%M%S")
    document = json.dumps(report.document(found, described), indent=1, ensure_ascii=False)
    write_file(stem.with_suffix(".json"), document + "\n")
    for group in found:
        if group.group.name == "zero":
            write_file(stem.with_suffix(".svg"), chart.draw(group, surroundings.one_line(described)))


def write_file(path: Path, text: str) -> None:
    path.write_text(text)
    print(f"wrote {path}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure the router beside a bare gRPC echo.", allow_abbrev=False
    )
    full = Extent()
    add = parser.add_argument
    add("--quick", action="store_true", help="one short round: about a minute and a half, rough figures")
    add("--groups", type=_groups, metavar="A,B", help=f"only these of {', '.join(ALL_GROUPS)}")
    add("--callers", type=_counts, metavar="N,N", help="of the zero-time group (default 1,16,64,256)")
    add("--rounds", type=_count, metavar="N", help=f"default {full.rounds}")
    add("--seconds", type=_seconds, metavar="S", help=f"of one measurement (default {full.seconds:g})")
    add(
        "--load-processes",
        type=_count,
        metavar="N",
        default=_default_load_processes(surroundings.count_cores()),
        help="that ask together; a native stream is always one client's (default %(default)s: half the cores)",
    )
    add("--held-calls", type=_count, metavar="N", help=f"held open at a time (default {full.held_calls:,})")
    add("--held-latency-s", type=_seconds, metavar="S", help=f"of their model (default {full.held_latency_s:g})")
    add("--job-rows", type=_count, metavar="N", help=f"finished jobs in the databases (default {full.job_rows:,})")
    add(
        "--job-databases",
        type=Path,
        default=DISK,
        metavar="DIR",
        help="where databases are made for a while: on a disk, or commits are not durable (default %(default)s)",
    )
    add(
        "--set",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable for the programs, such as GATEWAY_WORKERS=2 (repeatable)",
    )
    add("--output", type=Path, default=DEFAULT_DIRECTORY, metavar="DIR", help="default var/bench")
    return parser.parse_args(arguments)


def _extent(options: argparse.Namespace) -> Extent:
    """The full or the quick one, with what was said on top."""
    names = ("groups", "callers", "rounds", "seconds", "load_processes", "held_calls", "held_latency_s", "job_rows")
    said = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(QUICK if options.quick else Extent(), no_postgresql=why_missing(), **said)


def _default_load_processes(cores: int) -> int:
    """On two cores one is enough: asking in gRPC costs less CPU than answering, and a second one would only take the
    server's. With cores to spare, one could not saturate the echo."""
    return max(1, min(4, cores // 2))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(ALL_GROUPS):
        raise argparse.ArgumentTypeError(f"no group {', '.join(sorted(unknown))}; there are {', '.join(ALL_GROUPS)}")
    return names


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
