"""`inference-router submit`: a text, or agents, as a job."""

from typing import TYPE_CHECKING, Annotated

import typer

from router_client.addresses import GATEWAY
from router_client.cli.inputs import Work, read_text, read_work
from router_client.cli.job_output import print_job
from router_client.cli.options import (
    DONE,
    Agents,
    AsJson,
    Explain,
    File,
    GatewayUrl,
    PriorityClass,
    code_of_job,
    run,
)
from router_client.cli.output import Waiting, print_json
from router_client.jobs import Job

if TYPE_CHECKING:
    from router_client.async_client import AsyncClient

Text = Annotated[str | None, typer.Argument(metavar="[TEXT]", help="the text; - or none is stdin")]
Wait = Annotated[bool, typer.Option("--wait", help="wait for the job's end and print it")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="S", min=0.001, help="seconds to wait; the job goes on after them")
]
JobTimeout = Annotated[
    float | None, typer.Option("--job-timeout", metavar="S", min=0.001, help="seconds after which the job fails")
]
Key = Annotated[
    str | None, typer.Option("--idempotency-key", metavar="KEY", help="the same key and work find the same job")
]


def submit(
    text: Text = None,
    agent: Agents = None,
    file: File = None,
    wait: Wait = False,
    timeout: Timeout = None,
    job_timeout: JobTimeout = None,
    idempotency_key: Key = None,
    explain: Explain = False,
    priority: PriorityClass = None,
    as_json: AsJson = False,
    gateway: GatewayUrl = GATEWAY,
) -> None:
    """Make a job of a text, or of agents, and print its id.

    inference-router submit --wait "This product is amazing!"
    """
    work = _read(text, agent or [], file)
    if isinstance(work, Work):
        work = work.changed(timeout_s=job_timeout, explain=explain, priority=priority)

    async def send(client: "AsyncClient") -> int:
        job = await _submit(client, work, job_timeout, idempotency_key)
        if wait:
            return await _wait(client, job, timeout, is_json=as_json)
        _print_receipt(job, is_json=as_json)
        return DONE

    run(send, is_json=as_json, gateway=gateway)


def _read(text: str | None, agent: list[str], file: str | None) -> str | Work:
    if not agent and file is None:
        return read_text(text)
    if text is not None:
        raise typer.BadParameter("give a text or agents, not both")
    return read_work(agent, file)


async def _submit(client: "AsyncClient", work: str | Work, job_timeout_s: float | None, key: str | None) -> Job:
    if isinstance(work, str):
        return await client.submit(work, job_timeout_s=job_timeout_s, idempotency_key=key)
    return await client.submit(
        work.agents,
        job_timeout_s=work.timeout_s,
        priority=work.priority,
        explain=work.explain,
        idempotency_key=key,
    )


async def _wait(client: "AsyncClient", job: Job, timeout_s: float | None, *, is_json: bool) -> int:
    with Waiting(_progress(job)) as waiting:
        ended = await client.wait(job, timeout_s=timeout_s, on_change=lambda seen: waiting.say(_progress(seen)))
    print_job(ended, is_json=is_json)
    return code_of_job(ended)


def _progress(job: Job) -> str:
    return f"job {job.id} is {job.status}"


def _print_receipt(job: Job, *, is_json: bool) -> None:
    """The id alone, so that a shell can keep it in a variable."""
    if is_json:
        print_json(dict(job.document))
    else:
        print(job.id)
