"""A router's metrics and a gateway's readiness, read."""

import pytest
from prometheus_client import generate_latest

from router.metrics import Metrics
from router_client.status import GatewayStatus, RouterStatus, Status, read_metrics, read_readyz

READY = GatewayStatus(url="g", status="ready", router="connected", database="connected")


def page() -> str:
    """As a router writes it."""
    metrics = Metrics()
    metrics.queued_rows.set(7)
    metrics.open_calls.set(3)
    metrics.keys.set(2)
    metrics.rows.inc(100)
    metrics.ready_replicas.labels("gpu").set(2)
    metrics.ejected_replicas.labels("gpu").set(1)
    metrics.batches.labels("gpu", "answered").inc(5)
    metrics.batches.labels("gpu", "lost").inc()
    metrics.refusals.labels("key_rows").inc(4)
    metrics.failed_rows.labels("gpu", "poison").inc(2)
    return generate_latest(metrics.registry).decode()


def test_the_metrics_of_a_router_become_its_status() -> None:
    assert read_metrics("r", page()) == RouterStatus(
        url="r",
        queued_rows=7,
        open_calls=3,
        live_keys=2,
        rows=100,
        ready_replicas={"gpu": 2},
        ejected_replicas={"gpu": 1},
        batches={"gpu": 6},
        refused_rows={"key_rows": 4},
        failed_rows={"poison": 2},
    )


@pytest.mark.parametrize("text", ["", "up 1\n", "<html>"])
def test_another_page_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"metric|Invalid|could not"):
        read_metrics("r", text)


def test_readiness_is_read_as_it_stands() -> None:
    told = {"status": "draining", "router": "connected", "database": "away"}
    status = read_readyz("g", told)
    assert (status.status, status.database, status.is_ready) == ("draining", "away", False)


@pytest.mark.parametrize("document", [None, [], {"status": "ready"}])
def test_another_answer_is_none(document: object) -> None:
    with pytest.raises(ValueError, match="not a gateway"):
        read_readyz("g", document)


@pytest.mark.parametrize(
    ("gateway", "router", "expected"),
    [
        (READY, RouterStatus(url="r", ready_replicas={"a": 1, "b": 2}), True),
        (READY, RouterStatus(url="r", ready_replicas={"a": 1, "b": 0}), False),
        (READY, RouterStatus(url="r", error="refused"), False),
        (GatewayStatus(url="g", error="refused"), RouterStatus(url="r"), False),
    ],
)
def test_both_must_be_ready(gateway: GatewayStatus, router: RouterStatus, *, expected: bool) -> None:
    assert Status(gateway, router).is_ready is expected
