"""`inference-router jobs`: look at jobs, cancel and delete them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from router_client.addresses import GATEWAY
from router_client.cli.job_output import print_job, print_jobs
from router_client.cli.options import DONE, AsJson, GatewayUrl, run
from router_client.cli.output import Waiting, print_json
from router_client.jobs import JobKind, JobStatus

if TYPE_CHECKING:
    from router_client.async_client import AsyncClient

app = typer.Typer(help="Look at jobs, newest first; cancel and delete them.")

Id = Annotated[str, typer.Argument(metavar="ID", help="the job's id")]
Status = Annotated[JobStatus | None, typer.Option("--status", help="only those in this state")]
Kind = Annotated[JobKind | None, typer.Option("--kind", help="only those of this kind")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="at most so many")]
Where = Annotated[str | None, typer.Option("--gateway", metavar="URL", help="the gateway", rich_help_panel="Where")]


@dataclass(frozen=True, slots=True)
class Common:
    """What was said before the command's name."""

    gateway: str
    is_json: bool


@app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    status: Status = None,
    kind: Kind = None,
    limit: Limit = 50,
    as_json: AsJson = False,
    gateway: GatewayUrl = GATEWAY,
) -> None:
    """List jobs, newest first; or do something with one of them."""
    context.obj = Common(gateway, as_json)
    if context.invoked_subcommand is not None:
        return

    async def show(client: "AsyncClient") -> int:
        with Waiting("reading jobs"):
            found = [job async for job in client.jobs(status=status, kind=kind, limit=limit)]
        print_jobs(found, is_json=as_json)
        return DONE

    run(show, is_json=as_json, gateway=gateway)


@app.command()
def show(context: typer.Context, job_id: Id, as_json: AsJson = False, gateway: Where = None) -> None:
    """Print one job with its result."""
    common = _common(context, gateway, as_json)

    async def look(client: "AsyncClient") -> int:
        print_job(await client.job(job_id), is_json=common.is_json)
        return DONE

    run(look, is_json=common.is_json, gateway=common.gateway)


@app.command()
def cancel(context: typer.Context, job_id: Id, as_json: AsJson = False, gateway: Where = None) -> None:
    """End a job that has not ended."""
    common = _common(context, gateway, as_json)

    async def end(client: "AsyncClient") -> int:
        job = await client.cancel(job_id)
        if common.is_json:
            print_json(dict(job.document))
        else:
            print(f"{job.id} is {job.status}")
        return DONE

    run(end, is_json=common.is_json, gateway=common.gateway)


@app.command()
def delete(context: typer.Context, job_id: Id, as_json: AsJson = False, gateway: Where = None) -> None:
    """Delete a job that has ended."""
    common = _common(context, gateway, as_json)

    async def remove(client: "AsyncClient") -> int:
        await client.delete(job_id)
        if common.is_json:
            print_json({"job_id": job_id, "deleted": True})
        else:
            print(f"{job_id} is deleted")
        return DONE

    run(remove, is_json=common.is_json, gateway=common.gateway)


def _common(context: typer.Context, gateway: str | None, as_json: bool) -> Common:
    before: Common = context.obj
    return Common(gateway or before.gateway, as_json or before.is_json)
