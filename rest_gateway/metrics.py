"""Every metric of the gateway, declared once. Label values are bounded: what a client may choose freely is no label.

Several workers share theirs through files in PROMETHEUS_MULTIPROC_DIR, which their supervisor makes and removes, and
where worker 2 says in `2.pid` which process it is. The files are named by the workers' numbers, not by process ids:
who replaces worker 2 goes on counting in its files, so no count falls and the files do not become more.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# From a refusal (under 1 ms) to the router's longest timeout (600 s); a model server takes seconds.
DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 600)
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests",
            "Requests by route, method and status; 499: the client left before the answer.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "gateway_request_duration_seconds",
            "Seconds from a request's head to the end of its answer.",
            ["route"],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.agents = Counter(
            "gateway_agents", "Agents answered, by result code; OK: with an output.", ["code"], registry=self.registry
        )
        self.in_flight = Gauge(
            "gateway_requests_in_flight",
            "Requests being answered.",
            registry=self.registry,
            multiprocess_mode="livesum",  # of those that live
        )
        self.jobs = Counter(
            "gateway_jobs",
            "Jobs that came into a status here, by kind; kind reaped: their worker, or their time, was gone.",
            ["kind", "status"],
            registry=self.registry,
        )
        self.jobs_waiting = Gauge(
            "gateway_jobs_waiting",
            "Pending jobs in the database, as one process last saw them.",
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self.jobs_running = Gauge(
            "gateway_jobs_running",
            "Jobs held by this gateway: running, or with an end to be written.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.jobs_lost_leases = Counter(
            "gateway_jobs_lost_leases", "Leases that ran out, found by this gateway.", registry=self.registry
        )
        self.jobs_fenced = Counter(
            "gateway_jobs_fenced_finishes",
            "Ends of attempts that came too late: the job had ended, or was another attempt's.",
            registry=self.registry,
        )
        # Looked up once for each combination, of which there are few: by name it costs 1.6 µs.
        self._requests = functools.cache(self.requests.labels)
        self._duration = functools.cache(self.duration.labels)
        self._agents = functools.cache(self.agents.labels)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def count_request(self, route: str, method: str, status: int, duration_s: float) -> None:
        """One finished request. `route` is a route's template or "unmatched"."""
        known_method = method if method in METHODS else "other"
        self._requests(route, known_method, str(status)).inc()
        self._duration(route).observe(duration_s)

    def count_agents(self, code: str, agents: int) -> None:
        """Agents that were settled with one code, "OK" included."""
        if agents:
            self._agents(code).inc(agents)

    def count_job(self, kind: str, status: str) -> None:
        """One job that came into a status."""
        self.jobs.labels(kind, status).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


def join_workers(number: int) -> None:
    """Makes this process worker `number` in what it shares; to be called before there is any metric."""
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
    _pid_file(os.environ[DIRECTORY], number).write_text(str(os.getpid()))


def forget_process(directory: str, number: int) -> None:
    """Worker `number` has no process now: takes from the files what only the living have, and leaves the counts."""
    _pid_file(directory, number).unlink(missing_ok=True)
    mark_process_dead(number, directory)  # type: ignore[no-untyped-call]


def _pid_file(directory: str, number: int) -> Path:
    return Path(directory, f"{number}.pid")


def metrics_of(workers: int) -> Metrics:
    """The metrics of this process; those of one among several show, whoever is asked, the sum over all of them."""
    return Metrics() if workers == 1 else SharedMetrics(os.environ[DIRECTORY])


class SharedMetrics(Metrics):
    """Counts for itself and tells of all. Without python_gc_…, which no other process can read."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._all_workers = CollectorRegistry()
        MultiProcessCollector(self._all_workers, directory)  # type: ignore[no-untyped-call]
        PlatformCollector(self._all_workers)
        self._all_workers.register(WorkerProcesses(Path(directory)))

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._all_workers)


class WorkerProcesses(Collector):
    """process_cpu_seconds_total and the like of every worker, with its `pid` as a label."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        """One family for all workers."""
        families: dict[str, Metric] = {}
        for pid in self._pids():
            for metric in ProcessCollector(pid=functools.partial(str, pid), registry=None).collect():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"pid": pid}, sample.value)
        return families.values()

    def _pids(self) -> Iterator[str]:
        for path in sorted(self._directory.glob("*.pid")):
            with contextlib.suppress(FileNotFoundError):  # it ended this moment
                yield path.read_text()
