"""Which cases there are, and in which order they run. Pure.

Every case of a group runs once per round, in an order drawn anew for each round: what a machine does meanwhile then
hits all cases alike, and ratios are taken within a round.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.workloads import CLAIM, CLAIM_FINISH, HELD, JOBS_PER_CLAIM, PAGE, S1, S2, SUBMIT, WORKLOADS

CALLERS = (1, 16, 64, 256)
ALL_SYSTEMS = ("echo", "unary", "stream", "rest")
ALL_GROUPS = ("zero", "lone", "slot", "full", "held", "jobs")
INFER_CALLERS = 64  # by the Open Inference Protocol
LONE_PAUSE_S = 0.01
GATHER_S = 0.005  # as long as the systems that others are compared by usually gather
SLOT_CALLERS = 64
FULL_CALLERS = 512
FULL_REPLICAS = 4
SLOT_SECONDS = 3  # as many times as long as the others: a batch takes 50 ms
DATABASES = ("sqlite", "postgresql")
JOB_CALLERS = 256
JOB_RATE_PER_S = 200
JOB_WORKERS = 4  # that claim and finish
JOB_ROUNDS = 3
JOB_SECONDS = 2  # as many times as long as the others: commits come in bunches
JOB_TAIL_S = 1.0  # what was submitted is done
MOST_FINISHES_PER_S = 15_000  # for which there are enough jobs
ROWS_PER_S = 25_000  # that are filled in, roughly
OVERHEAD_S = 0.4  # of one measurement, roughly
START_S = 1.0  # of one system, roughly


@dataclass(frozen=True, slots=True)
class Setting:
    """What the systems are told: seconds the model takes per batch, slots, the longest hold. Batches of 64 rows.

    `replicas`: of the model, with `max_in_flight` slots each. `job_rows`: finished jobs in the databases of which the
    store is asked.
    """

    latency_s: float = 0.0
    max_in_flight: int = 4
    max_queue_delay_s: float = 0.002
    replicas: int = 1
    job_rows: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One line of a table."""

    system: str
    workload: str
    callers: int = 1
    load_processes: int = 1
    pause_s: float = 0.0
    rate_per_s: float = 0.0
    backlog: int = 0  # jobs that wait at the beginning

    @property
    def agents(self) -> int:
        """Vectors, or jobs, per request."""
        return WORKLOADS[self.workload].agents

    @property
    def load(self) -> tuple[str, int, float, float]:
        """What is asked how often: cases with the same can be compared."""
        return self.workload, self.callers, self.pause_s, self.rate_per_s

    def __str__(self) -> str:
        many = f"{self.rate_per_s:g} calls/s" if self.rate_per_s else f"{self.callers} callers"
        return f"{self.system} {self.workload}, {'1 caller' if many == '1 callers' else many}"


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that are measured side by side, on systems that are started for them."""

    name: str
    title: str
    setting: Setting
    cases: Sequence[Case]
    rounds: int
    warm_s: float
    seconds: float
    tail_s: float = 0.0  # the last answers take that long
    left_out: Sequence[Case] = ()  # what cannot be measured here
    left_out_reason: str = ""

    @property
    def systems(self) -> list[str]:
        """Those that are needed."""
        return list(dict.fromkeys(case.system for case in self.cases))

    @property
    def databases(self) -> list[str]:
        """Those in which jobs are kept."""
        return [name for name in DATABASES if any(system.startswith(name) for system in self.systems)]

    @property
    def start_s(self) -> float:
        """How long its systems take to start, roughly."""
        return START_S * len(self.systems) + self.setting.job_rows / ROWS_PER_S

    @property
    def case_s(self) -> float:
        """How long one measurement takes, roughly."""
        return OVERHEAD_S + self.warm_s + self.seconds + self.tail_s

    @property
    def estimate_s(self) -> float:
        """How long all of it takes, roughly."""
        return self.start_s + self.rounds * len(self.cases) * self.case_s

    def in_order(self) -> Iterator[tuple[int, Case]]:
        """(round from 1, case)."""
        for number in range(1, self.rounds + 1):
            yield from ((number, case) for case in random.Random(number).sample(self.cases, len(self.cases)))


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured; the defaults are the full run, about nine minutes.

    `no_postgresql`: why there is none to be measured; "" where there is one.
    """

    groups: Sequence[str] = ALL_GROUPS
    callers: Sequence[int] = CALLERS
    rounds: int = 5
    warm_s: float = 0.3
    seconds: float = 1.0
    load_processes: int = 1
    held_calls: int = 10_000
    held_latency_s: float = 5.0
    held_turns: int = 2  # how often the held calls are made
    job_rows: int = 1_000_000
    no_postgresql: str = ""


QUICK = Extent(rounds=1, warm_s=0.2, seconds=0.5, held_turns=1, job_rows=100_000)
"""About a minute and a half."""


def make_plan(extent: Extent) -> list[Group]:
    """The groups that are wanted."""
    groups = (_zero(extent), _lone(extent), _slot(extent), _full(extent), _held(extent), _jobs(extent))
    return [group for group in groups if group.name in extent.groups]


def load_processes_of(system: str, callers: int, extent: Extent) -> int:
    """A native stream is one client's, whatever the callers; the others may be asked by several."""
    return 1 if system == "stream" else min(callers, extent.load_processes)


def _zero(extent: Extent) -> Group:
    cases = [
        Case(system, workload.name, callers, load_processes_of(system, callers, extent))
        for workload in (S1, S2)
        for callers in extent.callers
        for system in ALL_SYSTEMS
    ]
    callers = min(INFER_CALLERS, max(extent.callers))
    cases.append(Case("infer", S1.name, callers, load_processes_of("infer", callers, extent)))
    title = "Zero-time model, closed loop"
    setting = Setting(max_queue_delay_s=GATHER_S)
    return Group("zero", title, setting, cases, extent.rounds, extent.warm_s, extent.seconds)


def _lone(extent: Extent) -> Group:
    cases = [Case(system, S1.name, pause_s=LONE_PAUSE_S) for system in ALL_SYSTEMS]
    title = f"The lone request: zero-time model, one caller, {LONE_PAUSE_S * 1e3:g} ms between two requests"
    return Group("lone", title, Setting(), cases, extent.rounds, extent.warm_s, extent.seconds)


def _slot(extent: Extent) -> Group:
    setting = Setting(latency_s=0.05, max_in_flight=1)
    cases = [
        Case(system, S1.name, SLOT_CALLERS, load_processes_of(system, SLOT_CALLERS, extent))
        for system in ("unary", "stream")
    ]
    title = "One 50 ms slot, closed loop (ceiling 1,280 vectors/s)"
    return Group("slot", title, setting, cases, extent.rounds, 1.0, SLOT_SECONDS * extent.seconds, tail_s=0.1)


def _full(extent: Extent) -> Group:
    """More callers than seats: no slot should ever be idle, no batch less than full."""
    setting = Setting(latency_s=0.05, max_in_flight=1, replicas=FULL_REPLICAS)
    cases = [Case("stream", S1.name, FULL_CALLERS)]
    title = f"{FULL_REPLICAS} replicas with a 50 ms slot each, more callers than seats (ceiling 5,120 vectors/s)"
    return Group("full", title, setting, cases, extent.rounds, 1.0, SLOT_SECONDS * extent.seconds, tail_s=0.2)


def _held(extent: Extent) -> Group:
    """Calls begin at the rate at which as many are open as are wanted: the last begins when the first is answered."""
    latency_s = extent.held_latency_s
    setting = Setting(latency_s=latency_s, max_in_flight=0, max_queue_delay_s=0.02)
    cases = [Case("stream", HELD.name, extent.held_calls, rate_per_s=extent.held_calls / latency_s)]
    title = f"Held open: {extent.held_calls:,} calls on one native stream, a model that takes {latency_s:g} s"
    seconds = extent.held_turns * latency_s
    return Group("held", title, setting, cases, 1, 0.1, seconds, tail_s=latency_s)


def _jobs(extent: Extent) -> Group:
    """The store's cases run in a load process, on a database of their own that holds very many finished jobs."""
    cases = [case for database in DATABASES for case in _job_cases(database, extent)]
    left_out = [case for case in cases if extent.no_postgresql and case.system.startswith("postgresql")]
    return Group(
        "jobs",
        f"Jobs: zero-time model; the store is asked with {extent.job_rows:,} finished jobs in it",
        Setting(job_rows=extent.job_rows),
        [case for case in cases if case not in left_out],
        min(extent.rounds, JOB_ROUNDS),
        extent.warm_s,
        JOB_SECONDS * extent.seconds,
        tail_s=JOB_TAIL_S,
        left_out=left_out,
        left_out_reason=extent.no_postgresql,
    )


def _job_cases(database: str, extent: Extent) -> list[Case]:
    longest_s = extent.warm_s + JOB_SECONDS * extent.seconds + 1
    claims = round(longest_s / LONE_PAUSE_S) * JOBS_PER_CLAIM
    store = f"{database}-store"
    return [
        Case(database, SUBMIT.name, JOB_CALLERS, load_processes_of(database, JOB_CALLERS, extent)),
        Case(database, SUBMIT.name, rate_per_s=JOB_RATE_PER_S),
        Case(store, CLAIM_FINISH.name, JOB_WORKERS, backlog=round(longest_s * MOST_FINISHES_PER_S)),
        Case(store, CLAIM.name, pause_s=LONE_PAUSE_S, backlog=claims),
        Case(store, PAGE.name, pause_s=LONE_PAUSE_S),
    ]
