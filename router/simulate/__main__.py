"""`python -m router.simulate`: which max_batch_size and replicas meet my p99, and what do the holds do for my traffic?

Runs every combination of the listed replicas, batch sizes and policies on the same arrivals, prints a table and, if
wanted, draws it. Exit status: 0, 1 when no combination meets `--p99-s`, 2 for a bad argument or trace.
"""

import argparse
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from router.simulate import chart, report
from router.simulate.scenario import POLICIES, Answer, Scenario, Service, Traffic, parse_service, run, variants
from router.simulate.traces import ARRIVALS, BadTrace, read

WARM_UP_SHARE = 0.1
USAGE = 2


def main(arguments: list[str]) -> int:
    """Simulate and report."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.rate or options.callers or options.trace):
        parser.error("who asks? one of --rate, --callers, --trace is needed")
    if options.trace and options.rate:
        parser.error("--trace and --rate are two kinds of the same; --callers goes with either")
    try:
        scenarios = _scenarios(options)
    except (BadTrace, OSError) as exc:
        print(f"simulate: {exc}", file=sys.stderr)
        return USAGE
    answers = _run_all(scenarios, options.jobs)
    print(report.table(answers, options.p99_s))
    print(f"\n{report.NOTES}")
    if options.svg:
        options.svg.write_text(chart.draw(answers, _title(options)), encoding="utf-8")
        print(f"wrote {options.svg}")
    if options.p99_s is None:
        return 0
    print(f"\n{report.advice(answers, options.p99_s)}")
    return 0 if any(answer.meets(options.p99_s) for answer in answers) else 1


def _run_all(scenarios: list[Scenario], jobs: int) -> list[Answer]:
    if jobs == 1 or len(scenarios) == 1:
        return [Answer(scenario, run(scenario)) for scenario in scenarios]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as workers:
        return list(map(Answer, scenarios, workers.map(run, scenarios)))


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    traffic = Traffic(
        rate=options.rate,
        arrivals=options.arrivals,
        callers=options.callers,
        pause_s=options.pause_s,
        trace=options.trace,
        timeout_s=options.timeout_s,
    )
    seconds = options.seconds
    if seconds is None:
        seconds = read(options.trace, math.inf)[-1].at if options.trace else 600.0
    base = Scenario(
        traffic,
        options.service,
        max_in_flight=options.max_in_flight,
        max_queue_delay_s=options.max_queue_delay_s,
        max_queued_rows=options.max_queued_rows,
        seconds=seconds,
        warm_up_s=WARM_UP_SHARE * seconds,
        seed=options.seed,
    )
    return variants(base, options.policies, options.replicas, options.max_batch_size)


def _title(options: argparse.Namespace) -> str:
    asks = [f"trace {options.trace.name}"] if options.trace else []
    asks += [f"{options.rate:g} rows/s, {options.arrivals}"] if options.rate else []
    asks += [f"{options.callers} callers in a closed loop"] if options.callers else []
    return f"{' and '.join(asks)}; a call takes {options.service} s; {options.max_in_flight} slots per replica"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m router.simulate",
        description="The router's queue and release rules in virtual time: compare policies, choose settings.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("who asks").add_argument
    add("--rate", type=_number, default=0.0, metavar="R", help="rows per second, whatever is answered")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="how they come (default %(default)s)")
    add("--callers", type=_count, default=0, metavar="N", help="in a closed loop: each asks again after its answer,")
    add("--pause-s", type=_span, default=(0.001, 0.005), metavar="A-B", help="so many seconds later (0.001-0.005)")
    add("--trace", type=Path, metavar="FILE", help="CSV with the columns at_s and, if wanted, rows, key, timeout_s")
    add("--timeout-s", type=_number, default=math.inf, metavar="S", help="of each row; who would be late is refused, "
        "as by the router (default: none)")  # fmt: skip
    add = parser.add_argument_group("who answers").add_argument
    add("--service", type=_service, default=parse_service("5"), metavar="TIME", help="seconds of a call: 5, 3-7 "
        "(uniform), lognormal:5:0.2 (mean, sigma), each with +0.00035*rows if rows cost time (default 5)")  # fmt: skip
    add("--replicas", type=_counts, default=(1,), metavar="N,N", help="default 1")
    add("--max-in-flight", type=_count, default=1, metavar="N", help="slots per replica (default 1)")
    add("--max-batch-size", type=_counts, default=(64,), metavar="N,N", help="default 64")
    add("--max-queue-delay-s", type=_number_or_zero, default=0.002, metavar="S", help="default 0.002; 0: no holds")
    add("--max-queued-rows", type=_count, default=65_536, metavar="N", help="more are refused (default 65536)")
    add = parser.add_argument_group("the run").add_argument
    add("--policies", type=_policies, default=("plain", "full"), metavar="A,B", help=f"of {', '.join(POLICIES)}; "
        "full is the router's own (default plain,full)")  # fmt: skip
    add("--p99-s", type=_number, metavar="S", help="say which settings answer 99 of 100 rows within so long")
    add("--seconds", type=_number, metavar="S", help="virtual ones (default 600, or all of the trace); "
        "the first tenth is in no figure")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="same seed, same run (default 0)")
    add("--svg", type=Path, metavar="FILE", help="draw the figures, too")
    add("--jobs", type=_count, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    return parser


def _number(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _number_or_zero(text: str) -> float:
    return 0.0 if float(text) == 0 else _number(text)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _span(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    span = float(low), float(high or low)
    if not 0 <= span[0] <= span[1] < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not like 0.001-0.005")
    return span


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(POLICIES):
        raise argparse.ArgumentTypeError(f"no policy {', '.join(sorted(unknown))}; there are {', '.join(POLICIES)}")
    return names


def _service(text: str) -> Service:
    try:
        return parse_service(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
