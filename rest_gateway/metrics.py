"""Every metric of the gateway, declared once. Label values are bounded: what a client may choose freely is no label."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# From a refusal (under 1 ms) to the router's longest timeout (600 s); a model server takes seconds.
DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 600)
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
        self.in_flight = Gauge("gateway_requests_in_flight", "Requests being answered.", registry=self.registry)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def count_request(self, route: str, method: str, status: int, duration_s: float) -> None:
        """One finished request. `route` is a route's template or "unmatched"."""
        known_method = method if method in METHODS else "other"
        self.requests.labels(route, known_method, str(status)).inc()
        self.duration.labels(route).observe(duration_s)

    def count_agents(self, code: str, agents: int) -> None:
        """Agents that were settled with one code, "OK" included."""
        if agents:
            self.agents.labels(code).inc(agents)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
