"""`python -m bench.mlserver`: MLServer behind the router beside the same MLServer with its own adaptive batching.

    router         callers ─► (gateway ─►) router ─► MLServer, which answers batch after batch as they come
    own N ms       callers ─► MLServer, which waits up to N ms (`max_batch_time`) for a batch to fill

Once over gRPC and once over REST, where the gateway stands before the router. One MLServer for all, with one model for
each line; one load process; all cases in every round, in an order drawn anew. A model takes 20 ms, however many rows.
MLServer's best is whichever of its lines is best, throughput and latency apart. Exit status as of `python -m bench`.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import report, surroundings
from bench.__main__ import DEFAULT_DIRECTORY, INTERRUPTED, as_if_interrupted, write_file
from bench.figures import Figures
from bench.plan import Case, Group, Setting
from bench.processes import BenchError, Program
from bench.progress import Progress
from bench.results import GroupResult, collect
from bench.runner import measure_rounds
from bench.systems import ANY_PORT, BatchCount, Launcher, System, address_of
from bench.workloads import DIM, INPUT, S1
from tools.mlserver import MLServer, serving

WAYS = {"infer": "gRPC", "rest-infer": "REST"}
"""As of bench.clients, and their titles."""
ROUTER = "router"
PLAIN = "plain"  # the model without batching of its own
CALLERS = 64
LATENCY_S = 0.02
MAX_BATCH_SIZE = 64
# Of MLServer's own batching: from less than a call takes to more than one takes with all its rows.
BATCH_TIMES_MS = (1, 5, 20, 50, 100)
START_S = 15.0  # of MLServer, roughly
MODEL = Path(__file__).with_name("mlserver_model.py")
COUNT = "<qq"  # as the model writes it

NOTES = """\
Medians of the rounds. own N ms: MLServer's adaptive batching with max_batch_size 64 and so much of max_batch_time.
batch: mean rows of the calls of the model, as it has counted them itself. others: how much of a core processes used
that have no part in the case."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured."""

    rounds: int
    warm_s: float
    seconds: float


FULL = Extent(rounds=3, warm_s=1.0, seconds=4.0)
QUICK = Extent(rounds=1, warm_s=0.5, seconds=1.5)


@dataclass(frozen=True, slots=True)
class Served(System):
    """A model of MLServer, asked directly or through a router; it counts its batches itself."""

    count_file: Path = Path()

    async def count_batches(self) -> BatchCount:
        """See System."""
        return BatchCount(*struct.unpack(COUNT, self.count_file.read_bytes()))


def main(arguments: list[str]) -> int:
    """Measure and report."""
    options = _parse(arguments)
    described = surroundings.describe(arguments, {}, "bench.mlserver")
    plan = [_group(way, QUICK if options.quick else FULL) for way in WAYS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, as_if_interrupted)
    try:
        with contextlib.closing(Progress(START_S + sum(group.estimate_s for group in plan))) as progress:
            found = asyncio.run(_run(plan, progress))
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"{surroundings.one_line(described)}\n{described['command']}, {described['started_at']}\n")
    print("\n\n".join(f"{report.tables([group])}\n\n{compare(group)}" for group in found))
    print(f"\n{NOTES}\n")
    _write(found, described, options.output)
    return 0


def compare(found: GroupResult) -> str:
    """The router's line beside the best of MLServer's, each figure's best."""
    figures = {result.case.system: result.median for result in found.results}
    router = figures.pop(ROUTER)
    fastest = max(figures, key=lambda name: figures[name].requests_per_s)
    promptest = min(figures, key=lambda name: _p99(figures[name]))
    requests = router.requests_per_s / figures[fastest].requests_per_s
    p99 = _p99(router) / _p99(figures[promptest])
    return (
        f"With the router {requests:.2f} times the requests/s of MLServer's best ({fastest}), "
        f"and {p99:.2f} of its lowest p99 ({promptest})."
    )


def _p99(figures: Figures) -> float:
    return figures.p99_ms or float("inf")


def _group(way: str, extent: Extent) -> Group:
    systems = (ROUTER, *(_own(time_ms) for time_ms in BATCH_TIMES_MS))
    return Group(
        way,
        f"{WAYS[way]}: a model of MLServer that takes {LATENCY_S * 1e3:g} ms per call, closed loop",
        Setting(latency_s=LATENCY_S, max_in_flight=1),
        [Case(system, S1.name, CALLERS) for system in systems],
        extent.rounds,
        extent.warm_s,
        extent.seconds,
        tail_s=0.2,
    )


def _own(time_ms: int) -> str:
    return f"own {time_ms} ms"


async def _run(plan: Sequence[Group], progress: Progress) -> list[GroupResult]:
    """What is started here is ended here."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        async with AsyncExitStack() as stack:
            progress.show("starting MLServer, router and gateway", always=True)
            directory = Path(scratch)
            launcher = Launcher(stack, directory)
            load = await launcher.start("load process", "bench.load")
            repository = _make_repository(directory)
            server = await stack.enter_async_context(serving(repository))
            router = await _start_router(launcher, server.address)
            gateway = await launcher.start(
                "gateway", "rest_gateway", GATEWAY_LISTEN=ANY_PORT, GATEWAY_ROUTER=await address_of(router)
            )
            progress.advance(START_S)
            found = []
            for group in plan:
                systems = await _systems(group, server, router, gateway, repository)
                progress.advance(group.start_s)
                found.append(collect(group, await measure_rounds(group, systems, [load], progress)))
            return found


async def _systems(
    group: Group, server: MLServer, router: Program, gateway: Program, repository: Path
) -> dict[str, System]:
    """One for each case: the router's, and MLServer alone."""
    is_rest = group.name == "rest-infer"
    front = Served(group.name, await address_of(gateway if is_rest else router), router, gateway if is_rest else None)
    alone = Served(group.name, server.rest_address if is_rest else server.address)
    return {
        name: replace(
            front if name == ROUTER else alone,
            mocks=[server.program],
            model_name=_model_name(name),
            count_file=repository / _model_name(name) / "count",
        )
        for name in group.systems
    }


async def _start_router(launcher: Launcher, backend: str) -> Program:
    config = {
        "backends": {"mlserver": {"addresses": [backend], "protocol": "unary", "max_in_flight": 1}},
        "models": [{"backend": "mlserver", "max_batch_size": MAX_BATCH_SIZE}],
    }
    return await launcher.start_router(ROUTER, config)


def _make_repository(directory: Path) -> Path:
    """One model for the router, and one for each of MLServer's lines."""
    repository = directory / "repository"
    _add_model(repository, PLAIN)
    for time_ms in BATCH_TIMES_MS:
        batching = {"max_batch_size": MAX_BATCH_SIZE, "max_batch_time": time_ms / 1e3}
        _add_model(repository, _model_name(_own(time_ms)), batching)
    return repository


def _model_name(system: str) -> str:
    return PLAIN if system == ROUTER else system.replace(" ", "-")


def _add_model(repository: Path, name: str, batching: Mapping[str, float] | None = None) -> None:
    folder = repository / name
    folder.mkdir(parents=True)
    shutil.copy(MODEL, folder)
    settings = {
        "name": name,
        "implementation": f"{MODEL.stem}.SlowModel",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, DIM]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, DIM]}],
        "parameters": {"extra": {"latency_s": LATENCY_S}},
        **(batching or {}),
    }
    (folder / "model-settings.json").write_text(json.dumps(settings))


def _write(found: Sequence[GroupResult], described: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stem = "mlserver-" + described["started_at"].translate(str.maketrans("", "", "-:"))[:15]
    document = json.dumps(report.document(found, described), indent=1, ensure_ascii=False)
    write_file(directory / f"{stem}.json", document + "\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.mlserver", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one short round: less than a minute, rough figures")
    parser.add_argument("--output", type=Path, default=DEFAULT_DIRECTORY, metavar="DIR", help="default var/bench")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
