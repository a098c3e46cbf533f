"""How gateway and router are: `/readyz` of the one, the other's metrics. Pure but for two requests."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from router_client.gateway import check_url, is_loopback

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.samples import Sample

# No answer, or none that can be read: nested too deeply, or with an infinite count.
UNANSWERED = (httpx.HTTPError, TimeoutError, ValueError, KeyError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    """What `/readyz` says: ``status`` is ready, not ready or draining. ``error``: why there is no answer, else None."""

    url: str
    status: str = "unreachable"
    router: str = "unknown"
    database: str = "unknown"
    error: str | None = None

    @property
    def is_ready(self) -> bool:
        """True when new requests are welcome."""
        return self.status == "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """What the router's metrics say now. ``error``: why there is no answer, else None.

    By backend: replicas and batches; by reason: refusals, counted in rows since the router's start, as all counts are.
    """

    url: str
    queued_rows: int = 0
    open_calls: int = 0
    live_keys: int = 0
    rows: int = 0
    ready_replicas: dict[str, int] = field(default_factory=dict)
    ejected_replicas: dict[str, int] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    refused_rows: dict[str, int] = field(default_factory=dict)
    failed_rows: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_ready(self) -> bool:
        """True when it answers and every backend has a replica."""
        return self.error is None and all(self.ready_replicas.values())


@dataclass(frozen=True, slots=True)
class Status:
    """Both."""

    gateway: GatewayStatus
    router: RouterStatus

    @property
    def is_ready(self) -> bool:
        """True when requests are answered, as far as can be told from here."""
        return self.gateway.is_ready and self.router.is_ready


def read_metrics(url: str, text: str) -> RouterStatus:
    """Return the status in a page of metrics.

    Raises:
        ValueError: it is none, or not a router's.
    """
    families = {family.name: family for family in text_string_to_metric_families(text)}
    if "router_queued_rows" not in families:
        raise ValueError("these are not a router's metrics")
    return RouterStatus(
        url=url,
        queued_rows=_sum(families, "router_queued_rows"),
        open_calls=_sum(families, "router_open_calls"),
        live_keys=_sum(families, "router_keys"),
        rows=_sum(families, "router_rows"),
        ready_replicas=_sums_by(families, "router_ready_replicas", "backend"),
        ejected_replicas=_sums_by(families, "router_ejected_replicas", "backend"),
        batches=_sums_by(families, "router_batches", "backend"),
        refused_rows=_sums_by(families, "router_refusals", "reason"),
        failed_rows=_sums_by(families, "router_failed_rows", "reason"),
    )


def read_readyz(url: str, document: Any) -> GatewayStatus:  # noqa: ANN401 -- JSON
    """Return the status in the body of `/readyz`.

    Raises:
        ValueError: it is none.
    """
    try:
        return GatewayStatus(
            url=url, status=document["status"], router=document["router"], database=document["database"]
        )
    except (KeyError, TypeError) as exc:
        raise ValueError("this is not a gateway's answer") from exc


async def ask_gateway(url: str, *, timeout_s: float) -> GatewayStatus:
    """Return what `/readyz` of the gateway at ``url`` says, or why it does not; never raises for that."""
    try:
        response = await _get(f"{check_url(url)}/readyz", timeout_s)
        return read_readyz(url, response.json())
    except UNANSWERED as exc:
        return GatewayStatus(url=url, error=_words(exc))


async def ask_router(url: str, *, timeout_s: float) -> RouterStatus:
    """Return what the metrics at ``url`` say, or why they do not; never raises for that."""
    try:
        return read_metrics(url, (await _get(check_url(url), timeout_s)).text)
    except UNANSWERED as exc:
        return RouterStatus(url=url, error=_words(exc))


async def _get(url: str, timeout_s: float) -> httpx.Response:
    """httpx counts each step of an answer for itself; one that drips in would take for ever."""
    trust_env = not is_loopback(url)
    async with asyncio.timeout(timeout_s), httpx.AsyncClient(trust_env=trust_env, timeout=timeout_s) as http:
        return await http.get(url)


def _words(exc: Exception) -> str:
    return "no answer in time" if isinstance(exc, TimeoutError) else str(exc) or type(exc).__name__


def _samples(families: "dict[str, Metric]", name: str) -> "Iterable[Sample]":
    """The values of a gauge or a counter; the latter's are called NAME_total, beside NAME_created."""
    family = families.get(name)
    return [sample for sample in family.samples if sample.name in (name, f"{name}_total")] if family else []


def _sum(families: "dict[str, Metric]", name: str) -> int:
    return round(sum(sample.value for sample in _samples(families, name)))


def _sums_by(families: "dict[str, Metric]", name: str, label: str) -> dict[str, int]:
    sums: dict[str, float] = {}
    for sample in _samples(families, name):
        sums[sample.labels[label]] = sums.get(sample.labels[label], 0.0) + sample.value
    return {value: round(total) for value, total in sums.items()}
