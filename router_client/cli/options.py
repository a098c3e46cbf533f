"""The options that several commands share, and the run of a command: one client, one loop, one exit code."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeAlias

import typer

import router_client
from router_client.addresses import GATEWAY, METRICS, ROUTER
from router_client.cli.output import complain
from router_client.errors import RouterError
from router_client.jobs import Job, Priority
from router_client.results import Results

if TYPE_CHECKING:
    from router_client.async_client import AsyncClient

DONE, FAILED, PARTLY_FAILED, INTERRUPTED = 0, 1, 3, 130
WHERE = "Where"

Command: TypeAlias = "Callable[[AsyncClient], Awaitable[int]]"
"""What a command does with a client, and its exit code. The client is loaded when it is wanted: help and completion,
asked at each press of a key, take half the time without it.
"""

Address: TypeAlias = Annotated[
    str,
    typer.Option(
        "--address", metavar="ADDRESS", envvar="INFERENCE_ROUTER_ADDRESS", help="the router", rich_help_panel=WHERE
    ),
]
GatewayUrl: TypeAlias = Annotated[
    str,
    typer.Option(
        "--gateway", metavar="URL", envvar="INFERENCE_ROUTER_GATEWAY", help="the gateway", rich_help_panel=WHERE
    ),
]
MetricsUrl: TypeAlias = Annotated[
    str,
    typer.Option(
        "--metrics",
        metavar="URL",
        envvar="INFERENCE_ROUTER_METRICS",
        help="the router's metrics",
        rich_help_panel=WHERE,
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="print one JSON document")]
Agents: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--agent", metavar="NAME:MODEL[:TYPE]=N,N", help="one named row; may be given again"),
]
File: TypeAlias = Annotated[
    str | None, typer.Option("--file", metavar="FILE", help='a body of POST /predict, {"agents": …}; - is stdin')
]
Explain: TypeAlias = Annotated[bool, typer.Option("--explain", help="tell where the time of each answer went")]
PriorityClass: TypeAlias = Annotated[
    Priority | None, typer.Option("--priority", help="batch has the seats that interactive leaves")
]


def run(
    work: Command,
    *,
    is_json: bool,
    address: str = ROUTER,
    gateway: str = GATEWAY,
    metrics: str = METRICS,
) -> NoReturn:
    """Do ``work`` with a client and exit with what it returns; with 1 and a line on stderr when it raises."""
    logging.getLogger("router_client").setLevel(logging.CRITICAL)  # what it would warn of is told once, at the end
    try:
        code = asyncio.run(_with_client(work, address, gateway, metrics))
    except RouterError as exc:
        complain(exc, is_json=is_json)
        code = FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise typer.Exit(code)


def code_of_results(results: Results) -> int:
    """Return the exit code of agents."""
    if not results.errors:
        return DONE
    return PARTLY_FAILED if results.outputs else FAILED


def code_of_job(job: Job) -> int:
    """Return the exit code of a job that has ended."""
    if job.status != "completed":
        return FAILED
    return code_of_results(job.results()) if job.kind == "agents" else DONE


async def _with_client(work: Command, address: str, gateway: str, metrics: str) -> int:
    async with router_client.AsyncClient(address, gateway, metrics=metrics) as client:
        return await work(client)
