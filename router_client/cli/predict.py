"""`inference-router predict`: agents to the router, each result as it arrives."""

from typing import TYPE_CHECKING, Annotated

import typer

from router_client.addresses import ROUTER
from router_client.blocks import AgentResult
from router_client.cli.inputs import Work, read_work
from router_client.cli.options import (
    Address,
    Agents,
    AsJson,
    Explain,
    File,
    PriorityClass,
    code_of_results,
    run,
)
from router_client.cli.output import Waiting, print_json, result_line, results_document
from router_client.results import Results

if TYPE_CHECKING:
    from router_client.async_client import AsyncClient

Timeout = Annotated[float | None, typer.Option("--timeout", metavar="S", min=0.001, help="seconds the answer may take")]


def predict(
    agent: Agents = None,
    file: File = None,
    timeout: Timeout = None,
    explain: Explain = False,
    priority: PriorityClass = None,
    as_json: AsJson = False,
    address: Address = ROUTER,
) -> None:
    """Run named rows through their models; each result is printed as it arrives.

    inference-router predict --agent alice:churn:buyer=0.1,0.2 --agent bob:churn:buyer=0.3,0.4
    """
    work = read_work(agent or [], file).changed(timeout_s=timeout, explain=explain, priority=priority)
    run(lambda client: _predict(client, work, is_json=as_json), is_json=as_json, address=address)


async def _predict(client: "AsyncClient", work: Work, *, is_json: bool) -> int:
    arrived: dict[str, AgentResult] = {}
    answers = client.stream(work.agents, timeout_s=work.timeout_s, priority=work.priority, explain=work.explain)
    with Waiting(_progress(0, work)) as waiting:
        async for name, result in answers:
            arrived[name] = result
            waiting.say(_progress(len(arrived), work))
            if not is_json:
                waiting.print(result_line(name, result), is_error=result.error is not None)
    results = Results({name: arrived[name] for name in work.agents})
    if is_json:
        print_json(results_document(results))
    return code_of_results(results)


def _progress(arrived: int, work: Work) -> str:
    return f"{arrived} of {len(work.agents)} answered"
