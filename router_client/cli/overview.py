"""`inference-router models`, `status` and `health`: what there is, and how it is."""

import importlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from router_client.addresses import GATEWAY, METRICS, ROUTER
from router_client.cli.options import (
    DONE,
    FAILED,
    Address,
    AsJson,
    GatewayUrl,
    MetricsUrl,
    run,
)
from router_client.cli.output import print_json, print_members, print_table

if TYPE_CHECKING:
    from router_client.async_client import AsyncClient
    from router_client.status import GatewayStatus, RouterStatus, Status

OnlyReady = Annotated[bool, typer.Option("--ready", help="only those that take requests")]


def models(only_ready: OnlyReady = False, as_json: AsJson = False, address: Address = ROUTER) -> None:
    """List the models that the router knows: of its settings, of its backends, and in use."""

    async def show(client: "AsyncClient") -> int:
        entries = await client.models(only_ready=only_ready)
        if as_json:
            print_json({"models": [asdict(entry) for entry in entries]})
        else:
            rows = [(entry.name, entry.version, entry.state, entry.reason) for entry in entries]
            print_table(("NAME", "VERSION", "STATE", "REASON"), rows)
        return DONE

    run(show, is_json=as_json, address=address)


def status(as_json: AsJson = False, gateway: GatewayUrl = GATEWAY, metrics: MetricsUrl = METRICS) -> None:
    """Tell how gateway and router are. Exit code 0 when both are ready, 1 otherwise."""

    async def show(client: "AsyncClient") -> int:
        seen = await client.status()
        if as_json:
            print_json(_document(seen))
        else:
            print_members([*_gateway_rows(seen.gateway), *_router_rows(seen.router)])
        return DONE if seen.is_ready else FAILED

    run(show, is_json=as_json, gateway=gateway, metrics=metrics)


def health(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="such as 127.0.0.1:50051")],
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", min=0.001, help="seconds to wait")] = 3.0,
) -> None:
    """Exit 0 when the server is SERVING, 1 otherwise; a container's probe."""
    raise typer.Exit(
        importlib.import_module("router_client.health").main(["health", address, "--timeout", str(timeout)])
    )


def _document(seen: "Status") -> dict[str, object]:
    return {
        "is_ready": seen.is_ready,
        "gateway": {"is_ready": seen.gateway.is_ready, **asdict(seen.gateway)},
        "router": {"is_ready": seen.router.is_ready, **asdict(seen.router)},
    }


def _gateway_rows(seen: "GatewayStatus") -> Iterator[tuple[str, str]]:
    yield "gateway", f"{seen.url}: {seen.error or seen.status}"
    if seen.error is None:
        yield "  router", seen.router
        yield "  database", seen.database


def _router_rows(seen: "RouterStatus") -> Iterator[tuple[str, str]]:
    yield "router", f"{seen.url}: {seen.error or ('ready' if seen.is_ready else 'without a replica')}"
    if seen.error is not None:
        return
    yield "  queued rows", f"{seen.queued_rows} (of {seen.live_keys} live keys)"
    yield "  open calls", str(seen.open_calls)
    yield "  rows so far", str(seen.rows)
    yield "  refused rows", _by(seen.refused_rows)
    yield "  failed rows", _by(seen.failed_rows)
    for backend, ready in sorted(seen.ready_replicas.items()):
        resting = seen.ejected_replicas.get(backend, 0)
        batches = seen.batches.get(backend, 0)
        yield f"  backend {backend}", f"{ready} replicas ready, {resting} resting, {batches} batches so far"


def _by(counts: dict[str, int]) -> str:
    """`3 (deadline 1, key_rows 2)`."""
    parts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count)
    return f"{sum(counts.values())} ({parts})" if parts else "0"
