"""`python -m tests.reliability [--full] [--seed N] [NAME …]`: run rows of the plan and print what each has found.

Exit status: 0 when every row passes, 1 otherwise, 2 for a bad argument. `--full` takes hours; `make soak` is that.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import uvloop

from tests.reliability.plan import PLAN
from tests.reliability.report import Report

SEED = 20_261_122


def main(arguments: Sequence[str]) -> int:
    """Run, print, count."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLAN)} (default: all)")
    parser.add_argument("--full", action="store_true", help="the counts of the plan instead of a small part of them")
    parser.add_argument("--seed", type=int, default=SEED, help="default %(default)s")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(PLAN):
        parser.error(f"no {', '.join(sorted(unknown))} in the plan")
    names = options.names or list(PLAN)
    reports = uvloop.run(_run_all(names, options.seed, full=options.full))
    print(f"{'row':>4}  {'scenario':<14}  {'seed':>10}  outcome")
    for name, report in zip(names, reports, strict=True):
        print(f"{report.row:>4}  {name:<14}  {report.seed:>10}  {'pass' if report.passes else 'FAIL'}")
    return 0 if all(report.passes for report in reports) else 1


async def _run_all(names: Sequence[str], seed: int, *, full: bool) -> list[Report]:
    """One after the other, on one loop: gRPC takes no second one kindly."""
    return [await _run(name, seed, full=full) for name in names]


async def _run(name: str, seed: int, *, full: bool) -> Report:
    entry = PLAN[name]
    begun_at = time.monotonic()
    report = await entry.run(seed, **(entry.full if full else entry.small))
    report.tell("took, s", time.monotonic() - begun_at)
    print(f"{report}\n", flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
