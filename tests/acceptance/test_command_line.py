"""`inference-router` as a user types it, against whole processes: stdout, stderr and exit codes.

A process of its own, half of whose time loads libraries, is for commands that use gRPC (its events outlive a loop, and
are handed to the next one), and for signals and terminals. The others run in this process.
"""

import asyncio
import importlib
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from typer.testing import CliRunner

from router_client.cli.app import app
from tests.acceptance.processes import PATIENCE_S, ROOT, fixed_ports, running
from tests.open_inference_server import OpenInferenceServer, ServedModel

pytestmark = pytest.mark.anyio

COMMAND = [sys.executable, "-m", "router_client"]
USES_GRPC = frozenset({"predict", "models"})
ALICE = "alice:churn:buyer=0.1,0.2,0.3"
BODY = {
    "agents": {
        "alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"},
        "bob": {"vector": [], "model_name": "churn"},
    }
}
LISTENS = r"listen\w* on (?:http://)?([\d.:]+)"
Outcome = tuple[int, str, str]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """A command silences the client's log for its process, which is this one."""
    client_log = logging.getLogger("router_client")
    level = client_log.level
    yield
    client_log.setLevel(level)


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """Where a stack listens."""
    with ExitStack() as stack:
        start = stack.enter_context
        mock = start(running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "0", "--latency", "sentiment=0.1"))
        backend = json.dumps([mock.wait_for(r"listening on ([\d.:]+)")[1]])
        listen = {"ROUTER_LISTEN": "127.0.0.1:0", "ROUTER_METRICS": "127.0.0.1:0"}
        router = start(running("router", **listen, ROUTER_BACKENDS__MOCK__ADDRESSES=backend))
        metrics = router.wait_for(r"metrics on (http://\S+)")[1].rstrip(",")
        address = router.wait_for(r"router listens on ([\d.:]+)")[1]
        gateway = start(running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER=address))
        url = f"http://{gateway.wait_for(LISTENS)[1]}"
        found = {
            "INFERENCE_ROUTER_ADDRESS": address,
            "INFERENCE_ROUTER_GATEWAY": url,
            "INFERENCE_ROUTER_METRICS": metrics,
        }
        while ask(found, "status")[0] != 0:
            pass
        yield found


@pytest.fixture(scope="module")
def nobody() -> dict[str, str]:
    """Where nobody listens."""
    (port,) = fixed_ports(1)
    address = f"127.0.0.1:{port}"
    url = f"http://{address}"
    return {
        "INFERENCE_ROUTER_ADDRESS": address,
        "INFERENCE_ROUTER_GATEWAY": url,
        "INFERENCE_ROUTER_METRICS": f"{url}/metrics",
    }


def ask(variables: dict[str, str], *arguments: str, stdin: str = "") -> Outcome:
    if arguments[0] in USES_GRPC:
        return ask_process(variables, *arguments, stdin=stdin)
    done = CliRunner().invoke(app, arguments, input=stdin, env=variables, prog_name="inference-router")
    return done.exit_code, done.stdout, done.stderr


def ask_process(variables: dict[str, str], *arguments: str, stdin: str = "") -> Outcome:
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def ask_json(variables: dict[str, str], *arguments: str, stdin: str = "", code: int = 0) -> Any:  # noqa: ANN401 -- JSON
    """All of stdout, which must be one JSON document."""
    returned, out, err = ask(variables, *arguments, "--json", stdin=stdin)
    assert returned == code, err
    return json.loads(out)


def test_predict_prints_a_line_for_each_agent(variables: dict[str, str]) -> None:
    code, out, err = ask(variables, "predict", "--agent", ALICE, "--explain")
    assert (code, err) == (0, "")
    assert out.startswith("alice: 0.14228487 (queued 0.0")


def test_a_process_says_of_jobs_what_a_call_says(variables: dict[str, str]) -> None:
    arguments = ["jobs", "show", "nobody", "--json"]
    assert ask_process(variables, *arguments) == ask(variables, *arguments)


def test_predict_reads_the_body_of_a_request_from_a_file_or_stdin(variables: dict[str, str]) -> None:
    document = ask_json(variables, "predict", "--file", "-", stdin=json.dumps(BODY), code=3)
    assert document == {
        "results": {"alice": {"output": [0.14228487]}},
        "errors": {"bob": {"code": "INVALID_ARGUMENT", "detail": "vector is empty", "retry_after_s": None}},
    }


def test_agents_that_fail_are_told_on_stderr(variables: dict[str, str]) -> None:
    failed = "bob: INVALID_ARGUMENT: vector[0] is nan; every value must be finite as a float32\n"
    some = ask(variables, "predict", "--agent", ALICE, "--agent", "bob:churn=nan")
    assert some == (3, "alice: 0.14228487\n", failed)
    everyone = ask_json(variables, "predict", "--agent", "bob:churn=nan", code=1)
    assert (everyone["results"], list(everyone["errors"])) == ({}, ["bob"])


def test_a_job_from_its_submit_to_its_delete(variables: dict[str, str]) -> None:
    code, out, err = ask(variables, "submit", "This product is amazing!")
    job_id = out.strip()
    assert (code, err) == (0, "")
    waited = ask_json(variables, "submit", "--wait", "--timeout", "60", stdin="I hate it.\n")
    assert (waited["status"], waited["result"]["sentiment"]) == ("completed", "negative")
    assert ask_json(variables, "jobs", "--limit", "1")["jobs"] == [waited]
    _, out, _ = ask(variables, "jobs")
    header, *rows = out.splitlines()
    assert header.split() == ["ID", "STATUS", "KIND", "CREATED", "RESULT"]
    assert {row.split()[0] for row in rows} >= {job_id, waited["job_id"]}
    assert ask_json(variables, "jobs", "show", waited["job_id"]) == waited
    code, out, err = ask(variables, "jobs", "cancel", waited["job_id"])
    assert (code, out, err) == (1, "", "ABORTED: the job is completed\n")
    assert ask(variables, "jobs", "delete", waited["job_id"])[0] == 0
    told = ask_json(variables, "jobs", "show", waited["job_id"], code=1)
    assert told == {"error": {"code": "NOT_FOUND", "detail": "there is no such job", "retry_after_s": None}}


def test_agents_make_jobs_too_and_some_may_fail(variables: dict[str, str]) -> None:
    job = ask_json(variables, "submit", "--wait", "--file", "-", stdin=json.dumps(BODY), code=3)
    assert (job["kind"], job["result"]["results"]) == ("agents", {"alice": {"output": [0.14228487]}})
    code, out, _ = ask(variables, "submit", "--wait", "--agent", ALICE)
    assert code == 0
    assert out.splitlines()[-1] == "alice: 0.14228487"


def test_status_tells_of_both_programs(variables: dict[str, str], nobody: dict[str, str]) -> None:
    document = ask_json(variables, "status")
    assert (document["gateway"]["status"], document["router"]["ready_replicas"]) == ("ready", {"mock": 1})
    code, out, _ = ask(nobody, "status")
    assert (code, len(out.splitlines())) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["predict", "--agent", ALICE], "alice: UNAVAILABLE: no router at 127.0.0.1:"),
        (["submit", "hi"], "UNAVAILABLE: no gateway at http://127.0.0.1:"),
        (["jobs"], "UNAVAILABLE: no gateway at http://127.0.0.1:"),
        (["models"], "UNAVAILABLE: no router at 127.0.0.1:"),
    ],
)
def test_nobody_there_is_one_line_and_exit_1(nobody: dict[str, str], arguments: list[str], beginning: str) -> None:
    code, out, err = ask(nobody, *arguments)
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert err.startswith(beginning)


def test_time_that_is_over_is_one_line_and_exit_1(nobody: dict[str, str]) -> None:
    code, _, err = ask(nobody, "predict", "--agent", ALICE, "--timeout", "0.2")
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("alice: DEADLINE_EXCEEDED: ")


async def test_models_are_listed(nobody: dict[str, str]) -> None:
    async with OpenInferenceServer({"churn": ServedModel(), "fraud": ServedModel(is_ready=False)}) as server:
        where = nobody | {"INFERENCE_ROUTER_ADDRESS": server.address}
        document, (code, out, err) = await asyncio.gather(
            asyncio.to_thread(ask_json, where, "models"), asyncio.to_thread(ask, where, "models")
        )
    assert [(model["name"], model["state"]) for model in document["models"]] == [
        ("churn", "READY"),
        ("fraud", "UNAVAILABLE"),
    ]
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["NAME", "VERSION", "STATE", "REASON"],
        ["churn", "1", "READY"],
        ["fraud", "1", "UNAVAILABLE"],
    ]


def test_ctrl_c_leaves_quietly_with_130() -> None:
    # Without a router the job waits; its gateway is ready for no request, but takes jobs.
    with running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER="127.0.0.1:1") as gateway:
        url = f"http://{gateway.wait_for(LISTENS)[1]}"
        with running("router_client", "submit", "--wait", "--gateway", url, "hi") as client:
            while not json.loads(ask({}, "jobs", "--gateway", url, "--json")[1]).get("jobs"):
                pass
            client.send(signal.SIGINT)
            assert client.wait() == 130
            assert (client.lines, client.stdout()) == ([], "")


def test_a_terminal_sees_what_is_waited_for_and_stdout_stays_clean(variables: dict[str, str]) -> None:
    of_test, of_client = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "submit", "--wait", "--json", "Well done!"],
        cwd=ROOT,
        env={**os.environ, **variables, "TERM": "xterm", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=of_client,
    ) as client:
        os.close(of_client)
        seen = read_all(of_test)
        out, _ = client.communicate(timeout=PATIENCE_S)
    assert json.loads(out)["status"] == "completed"
    assert b"job " in seen


def read_all(terminal: int) -> bytes:
    """What a terminal shows until its last program has left, which Linux tells by EIO."""
    seen = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            part = b""
        if not part:
            os.close(terminal)
            return seen
        seen += part


def test_an_installed_project_has_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["inference-router"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
