"""`python -m router.simulate.grid`: is the router's own release anywhere worse than a plain work-conserving one?

Every kind of model x replicas x load x arrivals is a cell: both releases serve the same arrivals, and the cell tells by
how much mean and p99 latency change. Prints two tables and the worst cells, and draws them if wanted. Exit status: 0, 1
when a cell is worse by more than `MOST_MEAN` or `MOST_P99`, 2 for a bad argument.

One run of a cell is chance as well: its service times fall upon other batches with the other release, and a run at high
load has seen few of the long phases of on/off traffic. Of five hundred cells a few look bad by that alone. So a cell
that looks worse is run again with other seeds, and their average is what counts.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from router.simulate import heat
from router.simulate.scenario import Scenario, Traffic, parse_service, run
from router.simulate.traces import ARRIVALS

SERVICES = ("5", "3-7", "lognormal:5:0.2", "0.005+0.00035*rows")
REPLICAS = (1, 2, 4, 8)
LOADS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ROWS = 25_000  # in each run, after the warm-up
# Fast models have served all those rows in two seconds, in the first of which the holds have not yet learnt what comes.
WARM_UP_SHARE, LEAST_WARM_UP_S = 0.1, 2.0
# By which no cell may be worse, as shares of the plain release's latency.
MOST_MEAN, MOST_P99 = 0.01, 0.03
WORST = 8  # cells that are named
SECOND_LOOKS = 16  # further seeds for a cell that looks worse


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of traffic for one kind of model; a slot per replica, batches of 64."""

    service: str
    arrivals: str
    replicas: int
    load: float

    def __str__(self) -> str:
        return f"{self.replicas} x {self.service}, {self.arrivals}, {self.load:.0%}"

    def scenario(self, policy: str, rows: int, seed: int) -> Scenario:
        """So many rows after a warm-up."""
        service = parse_service(self.service)
        rate = self.load * Scenario(Traffic(), service, replicas=self.replicas).capacity
        warm_up_s = max(WARM_UP_SHARE * rows / rate, LEAST_WARM_UP_S)
        traffic = Traffic(rate=rate, arrivals=self.arrivals)
        return Scenario(
            traffic,
            service,
            policy,
            self.replicas,
            seconds=warm_up_s + rows / rate,
            warm_up_s=warm_up_s,
            seed=seed,
        )


@dataclass(frozen=True, slots=True)
class Change:
    """What the router's own release makes of a cell: -0.2 is a fifth less latency than with the plain one."""

    mean: float
    p99: float

    def __str__(self) -> str:
        return f"mean {100 * self.mean:+.1f} %, p99 {100 * self.p99:+.1f} %"

    @property
    def is_worse(self) -> bool:
        """Than anybody should be."""
        return self.mean > MOST_MEAN or self.p99 > MOST_P99


def grid(
    services: Iterable[str] = SERVICES,
    arrivals: Iterable[str] = tuple(ARRIVALS),
    replicas: Iterable[int] = REPLICAS,
    loads: Iterable[float] = LOADS,
) -> list[Cell]:
    """The cells, loads side by side."""
    return [Cell(*place) for place in itertools.product(services, arrivals, replicas, loads)]


def compare(cell: Cell, rows: int = ROWS, seed: int = 0) -> Change:
    """Run both releases on the same arrivals."""
    plain, full = (run(cell.scenario(policy, rows, seed)) for policy in ("plain", "full"))
    return Change(full.mean_s / plain.mean_s - 1, full.p99_s / plain.p99_s - 1)


def look_again(cell: Cell, rows: int = ROWS, seed: int = 0) -> Change:
    """The average over other seeds; not over the first, which has been chosen for being bad."""
    changes = [compare(cell, rows, seed + number) for number in range(1, SECOND_LOOKS + 1)]
    return Change(fmean(change.mean for change in changes), fmean(change.p99 for change in changes))


def table(changes: Mapping[Cell, Change], figure: str) -> str:
    """A line per model, arrivals and replicas, a column per load: changes in per cent."""
    loads = sorted({cell.load for cell in changes})
    lines = [f"{figure + ' latency, change in %':<44}" + "".join(f"{load:>7.0%}" for load in loads)]
    for place, cells in itertools.groupby(changes, lambda cell: (cell.service, cell.arrivals, cell.replicas)):
        values = "".join(f"{100 * getattr(changes[cell], figure):>+7.1f}" for cell in cells)
        lines.append(f"{place[2]} x {place[0]}, {place[1]}".ljust(44) + values)
    return "\n".join(lines)


def worst(changes: Mapping[Cell, Change]) -> str:
    """The cells that gain least, or lose."""
    lines = []
    for figure in ("mean", "p99"):
        cells = sorted(changes, key=lambda cell: -getattr(changes[cell], figure))[:WORST]
        named = "; ".join(f"{cell} {100 * getattr(changes[cell], figure):+.1f} %" for cell in cells)
        lines.append(f"worst {figure}: {named}")
    return "\n".join(lines)


def verdict(changes: Mapping[Cell, Change]) -> str:
    """Whether the promise is kept."""
    worse = [cell for cell, change in changes.items() if change.is_worse]
    limit = f"{MOST_MEAN:.0%} in the mean or {MOST_P99:.0%} in the p99"
    return (
        f"{len(worse)} of {len(changes)} cells are worse by more than {limit}"
        + (": " if worse else ".")
        + "; ".join(f"{cell} ({changes[cell]})" for cell in worse)
    )


def main(arguments: Sequence[str]) -> int:
    """Fill the grid and report."""
    options = _parser().parse_args(arguments)
    changes = _fill(grid(), options)
    print("", table(changes, "mean"), table(changes, "p99"), worst(changes), verdict(changes), sep="\n\n")
    if options.svg:
        title = f"full against plain: change of latency in %, {options.rows:,} rows per cell, seed {options.seed}"
        options.svg.write_text(heat.draw(_panels(changes), title), encoding="utf-8")
        print(f"wrote {options.svg}")
    return 1 if any(change.is_worse for change in changes.values()) else 0


def _fill(cells: Sequence[Cell], options: argparse.Namespace) -> dict[Cell, Change]:
    how = {"rows": options.rows, "seed": options.seed}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as workers:
        changes = dict(zip(cells, workers.map(partial(compare, **how), cells, chunksize=4), strict=True))
        doubtful = [cell for cell, change in changes.items() if change.is_worse]
        again = workers.map(partial(look_again, **how), doubtful)
        for cell, change in zip(doubtful, again, strict=True):
            print(f"{cell}: {changes[cell]} at first, {change} on the average of {SECOND_LOOKS} other seeds")
            changes[cell] = change
    return changes


def _panels(changes: Mapping[Cell, Change]) -> list[heat.Panel]:
    return [
        heat.Panel(
            f"{figure}: {service}, {arrivals}",
            [f"{replicas} x" for replicas in REPLICAS],
            [f"{load:.0%}" for load in LOADS],
            [
                [getattr(changes[Cell(service, arrivals, replicas, load)], figure) for load in LOADS]
                for replicas in REPLICAS
            ],
        )
        for service, arrivals, figure in itertools.product(SERVICES, ARRIVALS, ("mean", "p99"))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m router.simulate.grid",
        description="The router's release against a plain one, over models, replicas, loads and arrivals.",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="of each run (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same run (default 0)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the grid, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
