"""Jobs on stdout: one with all it tells, many as a table."""

import json
from collections.abc import Sequence

from router_client.cli.output import describe, print_json, print_members, print_table, result_line
from router_client.jobs import Job

COLUMNS = ("ID", "STATUS", "KIND", "CREATED", "RESULT")


def print_job(job: Job, *, is_json: bool) -> None:
    """Print a job: its members, a line each; the results of agents below them."""
    if is_json:
        print_json(dict(job.document))
        return
    told = dict(job.document)
    has_agents = job.kind == "agents" and told.pop("result", None) is not None
    print_members(describe(told))
    if has_agents:
        for name, result in job.results().items():
            print(result_line(name, result))


def print_jobs(jobs: Sequence[Job], *, is_json: bool) -> None:
    """Print many jobs, a line each."""
    if is_json:
        print_json({"jobs": [dict(job.document) for job in jobs]})
    else:
        print_table(COLUMNS, [(job.id, job.status, job.kind, _created(job), _outcome(job)) for job in jobs])


def _created(job: Job) -> str:
    return "" if job.created_at is None else f"{job.created_at:%Y-%m-%d %H:%M:%S}Z"


def _outcome(job: Job) -> str:
    if job.error is not None:
        return f"{job.error.code}: {job.error.message}"
    if job.result is None:
        return ""
    if job.kind == "agents":
        results = job.results()
        return f"{len(results.outputs)} of {len(results)} answered"
    return json.dumps(job.result, ensure_ascii=False)
