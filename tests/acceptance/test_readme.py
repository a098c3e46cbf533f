"""The README's examples, pasted as they stand (but for the ports), answer what the README says."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.processes import ROOT, running

README = (ROOT / "README.md").read_text()
# The second request of the job's story comes while the job runs.
MOCK = ("--listen", "127.0.0.1:0", "--latency", "0.05", "--latency", "sentiment=2")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def example(beginning: str) -> int:
    """Where the first block stands that begins so."""
    return next(number for number, (_, text) in enumerate(BLOCKS) if text.startswith(beginning))


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, str]]:
    """The README's addresses to those that serve this test."""
    with ExitStack() as stack:
        mock = stack.enter_context(running("mock_nn", *MOCK))
        backend = mock.wait_for(r"listening on ([\d.:]+)")[1]
        router = stack.enter_context(
            running(
                "router",
                ROUTER_LISTEN="127.0.0.1:0",
                ROUTER_METRICS="127.0.0.1:0",
                ROUTER_BACKENDS__MOCK__ADDRESSES=json.dumps([backend]),
            )
        )
        metrics = router.wait_for(r"metrics on http://([\d.:]+)")[1]
        address = router.wait_for(r"router listens on ([\d.:]+)")[1]
        gateway = stack.enter_context(running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER=address))
        front = gateway.wait_for(r"listen\w* on (?:http://)?([\d.:]+)")[1]
        yield {"127.0.0.1:50051": address, "127.0.0.1:8000": front, "127.0.0.1:9091": metrics}


def paste(text: str, ports: dict[str, str]) -> str:
    for stated, real in ports.items():
        text = text.replace(stated, real)
    text = text.replace(".venv/bin", str(Path(sys.executable).parent))
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_curl_answers_what_stands_below_it(ports: dict[str, str]) -> None:
    number = example("curl -sS http")
    assert json.loads(paste(BLOCKS[number][1], ports)) == json.loads(BLOCKS[number + 1][1])


def test_the_streaming_curl_answers_what_stands_below_it(ports: dict[str, str]) -> None:
    number = example("curl -sSN http")
    assert paste(BLOCKS[number][1], ports) == BLOCKS[number + 1][1]


def test_the_curl_of_the_open_inference_protocol_answers_what_stands_below_it(ports: dict[str, str]) -> None:
    number = next(number for number, (_, text) in enumerate(BLOCKS) if "/v2/models/" in text)
    assert json.loads(paste(BLOCKS[number][1], ports)) == json.loads(BLOCKS[number + 1][1])


def test_the_story_of_a_job_goes_as_it_is_told(ports: dict[str, str]) -> None:
    wait_until_ready(f"http://{ports['127.0.0.1:8000']}/readyz")
    first = next(number for number, (_, text) in enumerate(BLOCKS) if '{"text":' in text)
    told = [json.loads(BLOCKS[first + number][1]) for number in (1, 3, 5)]
    submitted = json.loads(paste(BLOCKS[first][1], ports))
    ids = {told[0]["job_id"]: submitted["job_id"]}
    answers = [submitted, *(json.loads(paste(BLOCKS[first + number][1], ports | ids)) for number in (2, 4))]
    assert [without_chance(answer) for answer in answers] == [without_chance(answer) for answer in told]
    assert {answer["job_id"] for answer in answers} == {submitted["job_id"]}


def without_chance(job: dict[str, Any]) -> dict[str, Any]:
    """Of id and times only whether they are there."""
    return {
        name: value is not None if name == "job_id" or name.endswith("_at") else value for name, value in job.items()
    }


def wait_until_ready(url: str) -> None:
    """From then on a job is run at once, if there is room."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(url, timeout=10).close()
        except urllib.error.HTTPError as answer:
            answer.close()
        else:
            return


def test_buf_curl_needs_no_proto_file(ports: dict[str, str]) -> None:
    results = json.loads(paste(BLOCKS[example(".venv/bin/buf curl")][1], ports))["results"]
    assert results["alice"]["output"] == [0.14228487]
    assert results["alice"]["explanation"]["batchRows"] == 1


def test_the_python_client_prints_the_same_answer(ports: dict[str, str]) -> None:
    text = BLOCKS[example("import asyncio")][1].replace("127.0.0.1:50051", ports["127.0.0.1:50051"])
    printed = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert [round(value, 8) for value in json.loads(printed.stdout)] == [0.14228487]


def test_the_python_client_says_of_texts_what_stands_below_it(ports: dict[str, str]) -> None:
    text = BLOCKS[example("from asyncio")][1].replace("127.0.0.1:50051", ports["127.0.0.1:50051"])
    printed = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert f"prints `{printed.stdout.strip()}`" in README


def test_the_example_script_prints_the_answers(ports: dict[str, str]) -> None:
    told = paste(f".venv/bin/python examples/send_request.py http://{ports['127.0.0.1:8000']}", ports)
    status, _, body = told.partition("\n")
    assert status == "200 OK"
    assert json.loads(body) == json.loads(BLOCKS[example("curl -sS http") + 1][1])


def test_the_probe_tells_the_routers_health(ports: dict[str, str]) -> None:
    assert "SERVING" in paste(f".venv/bin/python -m router_client health {ports['127.0.0.1:50051']}", ports)


def test_the_configuration_shown_is_one(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(BLOCKS[example("backends:")][1])
    with running("router", "--config", str(path), "--check-config") as program:
        assert program.wait() == 0, program.lines
