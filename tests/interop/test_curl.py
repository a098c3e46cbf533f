"""Plain curl on every /v2 route, JSON and binary, as someone does who only has the protocol's text."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mock_nn.models import expected
from tests.interop.stack import Stack
from tests.interop.values import vectors

SYSTEM = "curl"
PATIENCE_S = 60
JSON_LENGTH = "inference-header-content-length"


@dataclass(frozen=True, slots=True)
class Reply:
    """What curl got; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:  # noqa: ANN401 -- any JSON
        return json.loads(self.body)


@pytest.fixture
def curl(stack: Stack, tmp_path: Path) -> "Curl":
    return Curl(f"http://{stack.gateway}", tmp_path)


class Curl:
    """curl with a path below the gateway, and a body on its standard input."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url
        self._headers = directory / "headers"

    def __call__(self, path: str, *options: str, body: bytes | None = None) -> Reply:
        data: Sequence[str] = () if body is None else ("--data-binary", "@-")
        command = ["curl", "-sS", "--noproxy", "*", "-D", str(self._headers), *data, *options, self._url + path]
        ended = subprocess.run(command, input=body or b"", capture_output=True, timeout=PATIENCE_S, check=True)
        status, *lines = self._headers.read_text().splitlines()
        headers = dict(line.split(": ", 1) for line in lines if line)
        return Reply(int(status.split()[1]), {name.lower(): value for name, value in headers.items()}, ended.stdout)


def tensor(name: str, values: np.ndarray[Any, Any], datatype: str = "FP32") -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(values.shape), "data": values.tolist()}


def infer_body(*tensors: dict[str, object], **more: object) -> bytes:
    return json.dumps({"inputs": tensors, **more}).encode()


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models/churn/ready"])
def test_what_lives_and_is_ready_says_200(curl: Curl, path: str) -> None:
    assert curl(path).status == 200


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_a_model_s_readiness_may_be_asked_by_version(curl: Curl, version: str) -> None:
    assert curl(f"/v2/models/churn{version}/ready").status == 200


@pytest.mark.parametrize("model", ["resting", "nobody"])
def test_a_model_that_is_not_ready_says_so_by_its_status(curl: Curl, model: str) -> None:
    assert curl(f"/v2/models/{model}/ready").status >= 400


def test_the_server_tells_what_it_is(curl: Curl) -> None:
    told = curl("/v2").json()
    assert (told["name"], bool(told["version"]), "binary_tensor_data" in told["extensions"]) == (
        "inference-router",
        True,
        True,
    )


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_a_model_tells_its_tensors(curl: Curl, version: str) -> None:
    told = curl(f"/v2/models/combine{version}").json()
    assert (told["name"], told["inputs"][1]) == ("combine", {"name": "b", "datatype": "INT64", "shape": [-1, 1]})


def test_the_index_lists_models(curl: Curl) -> None:
    told = curl("/v2/repository/index", body=b"{}").json()
    assert {entry["name"] for entry in told} >= {"churn", "combine"}


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("is_flat", [False, True])
def test_json_goes_in_and_comes_out(curl: Curl, rows: int, is_flat: bool) -> None:
    given = vectors(rows)
    vector = tensor("vector", given) | ({"data": given.ravel().tolist()} if is_flat else {})
    reply = curl("/v2/models/churn/infer", "-H", "Content-Type: application/json", body=infer_body(vector, id="mine"))
    (output,) = reply.json()["outputs"]
    assert (reply.status, reply.json()["id"], reply.json()["model_name"]) == (200, "mine", "churn")
    assert (output["name"], output["datatype"], output["shape"]) == ("output", "FP32", [rows])
    assert np.array(output["data"], np.float32).tobytes() == expected("churn", "", given).tobytes()


@pytest.mark.parametrize("content_type", ["Content-Type: application/octet-stream", "Content-Type:"])
def test_numbers_behind_the_json_go_in_and_come_out(curl: Curl, content_type: str) -> None:
    given = vectors(3)
    vector: dict[str, object] = {"name": "vector", "datatype": "FP32", "shape": [3, 8]}
    vector["parameters"] = {"binary_data_size": given.nbytes}
    head = infer_body(vector, parameters={"binary_data_output": True})
    reply = curl(
        "/v2/models/churn/infer",
        *("-H", content_type),
        *("-H", f"Inference-Header-Content-Length: {len(head)}"),
        body=head + given.tobytes(),
    )
    length = int(reply.headers[JSON_LENGTH])
    (output,) = json.loads(reply.body[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 12}
    assert reply.body[length:] == expected("churn", "", given).tobytes()


def test_several_outputs_come_as_asked_one_in_json_and_one_behind_it(curl: Curl) -> None:
    given: list[dict[str, object]] = [
        tensor("a", np.array([[1.0, 2.0]])),
        tensor("b", np.array([[10]]), "INT64"),
        {"name": "name", "datatype": "BYTES", "shape": [1], "data": ["ann ☃"]},
    ]
    outputs = [{"name": "label"}, {"name": "sum", "parameters": {"binary_data": True}}]
    reply = curl("/v2/models/combine/infer", body=infer_body(*given, outputs=outputs))
    length = int(reply.headers[JSON_LENGTH])
    label, total = json.loads(reply.body[:length])["outputs"]
    assert (label["data"], total["name"]) == (["ANN ☃"], "sum")
    assert np.frombuffer(reply.body[length:], "<f4").tolist() == [11, 12]


def test_a_version_stands_in_the_path(curl: Curl) -> None:
    reply = curl("/v2/models/churn/versions/1/infer", body=infer_body(tensor("vector", vectors(1))))
    assert reply.status == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/models/nobody/infer", infer_body(tensor("vector", vectors(1))), 404),
        ("/v2/models/nobody", None, 404),
        ("/v2/nothing", None, 404),
        ("/v2/models/churn/infer", None, 405),
        ("/v2/models/churn/infer", b"{", 400),
        ("/v2/models/churn/infer", b"[]", 422),
        ("/v2/models/churn/infer", infer_body(), 422),
        ("/v2/models/churn/infer", infer_body(tensor("vector", vectors(1)) | {"shape": [2, 8]}), 422),
        ("/v2/models/echo_FP32/infer", infer_body(tensor("x", vectors(1, dim=4))), 422),
        ("/v2/models/picky/infer", infer_body(tensor("x", np.full((1, 3), 666.0))), 502),
    ],
)
def test_a_fault_is_a_problem_that_names_its_error(curl: Curl, path: str, body: bytes | None, status: int) -> None:
    reply = curl(path, body=body)
    assert (reply.status, reply.headers["content-type"]) == (status, "application/problem+json")
    assert reply.json()["status"] == status
    assert reply.json()["error"]


def test_a_body_that_is_too_large_is_refused(curl: Curl) -> None:
    reply = curl("/v2/models/churn/infer", body=bytes(9 * 2**20))
    assert (reply.status, bool(reply.json()["error"])) == (413, True)
