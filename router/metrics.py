"""Every metric of the router, declared once. Labels come from settings or fixed sets, never from callers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5, 10, 30, 60)


class Metrics:
    """The router's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "router_requests",
            "Calls answered, by method and canonical code.",
            ["method", "code"],
            registry=self.registry,
        )
        self.rows = Counter("router_rows", "Rows accepted into queues.", registry=self.registry)
        self.batches = Counter(
            "router_batches",
            "Batches that came back, by outcome: answered, or what failed.",
            ["backend", "outcome"],
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "router_batch_rows", "Rows per dispatched batch.", ["backend"], buckets=BATCH_ROWS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "router_batch_seconds",
            "Seconds between dispatch and answer of a batch.",
            ["backend"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.requeued_rows = Counter(
            "router_requeued_rows", "Rows put back after a lost or refused batch.", ["backend"], registry=self.registry
        )
        self.shared_rows = Counter(
            "router_shared_rows",
            "Rows that followed an equal one instead of being queued.",
            ["backend"],
            registry=self.registry,
        )
        self.cached_rows = Counter(
            "router_cached_rows", "Rows answered from the cache.", ["backend"], registry=self.registry
        )
        self.hedged_batches = Counter(
            "router_hedged_batches",
            "Batches that stalled and were sent to a second replica.",
            ["backend"],
            registry=self.registry,
        )
        self.splits = Counter(
            "router_splits",
            "Batches, and pieces of them, that were cut to find bad rows.",
            ["backend"],
            registry=self.registry,
        )
        self.poison_rows = Counter(
            "router_poison_rows", "Rows that a model refused alone.", ["backend"], registry=self.registry
        )
        self.failed_rows = Counter(
            "router_failed_rows",
            "Rows that came back from a backend without an answer and are not tried again, by reason.",
            ["backend", "reason"],
            registry=self.registry,
        )
        self.retry_budget_refusals = Counter(
            "router_retry_budget_refusals",
            "Batches that were not tried again because the retry budget was spent.",
            ["backend"],
            registry=self.registry,
        )
        self.refusals = Counter("router_refusals", "Rows refused, by reason.", ["reason"], registry=self.registry)
        self.queued_rows = Gauge("router_queued_rows", "Rows waiting now.", registry=self.registry)
        self.open_calls = Gauge("router_open_calls", "Calls not fully answered.", registry=self.registry)
        self.keys = Gauge("router_keys", "Live batch keys.", registry=self.registry)
        self.ready_replicas = Gauge("router_ready_replicas", "Connected replicas.", ["backend"], registry=self.registry)
        self.ejected_replicas = Gauge(
            "router_ejected_replicas",
            "Replicas that failed or were slow and rest.",
            ["backend"],
            registry=self.registry,
        )
        self.models = Gauge(
            "router_models",
            "Models in use by what their backends tell: ready, unready, absent; unknown: nobody has answered yet.",
            ["state"],
            registry=self.registry,
        )
        self.config_reloads = Counter(
            "router_config_reloads", "Looks at changed settings, by outcome.", ["outcome"], registry=self.registry
        )
