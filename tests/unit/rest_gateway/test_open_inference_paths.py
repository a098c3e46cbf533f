"""The paths of /v2 and what they ask."""

import pytest

from rest_gateway.routes.open_inference_paths import Asked, read_path

MODEL = "/v2/models/{model_name}"
VERSION = "/v2/models/{model_name}/versions/{model_version}"


@pytest.mark.parametrize(
    ("path", "question", "template"),
    [
        ("/v2", "server_metadata", "/v2"),
        ("/v2/", "server_metadata", "/v2"),
        ("/v2/health/live", "server_live", "/v2/health/live"),
        ("/v2/health/ready", "server_ready", "/v2/health/ready"),
        ("/v2/repository/index", "index", "/v2/repository/index"),
    ],
)
def test_paths_without_a_model(path: str, question: str, template: str) -> None:
    asked = read_path(path)
    assert asked is not None
    assert (asked.question, asked.template, asked.names) == (question, template, {})


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("m", Asked("metadata", MODEL, {"model_name": "m"})),
        ("m/infer", Asked("infer", MODEL + "/infer", {"model_name": "m"})),
        ("m/ready", Asked("ready", MODEL + "/ready", {"model_name": "m"})),
        ("m/config", Asked("config", MODEL + "/config", {"model_name": "m"})),
        ("m/versions/3", Asked("metadata", VERSION, {"model_name": "m", "model_version": "3"})),
        ("m/versions/3/infer", Asked("infer", VERSION + "/infer", {"model_name": "m", "model_version": "3"})),
        ("m/versions/3/ready", Asked("ready", VERSION + "/ready", {"model_name": "m", "model_version": "3"})),
        # Names with slashes, as tritonclient writes them, and encoded.
        ("a/b/infer", Asked("infer", MODEL + "/infer", {"model_name": "a/b"})),
        ("a%2Fb/infer", Asked("infer", MODEL + "/infer", {"model_name": "a/b"})),
        ("a/b/versions/1", Asked("metadata", VERSION, {"model_name": "a/b", "model_version": "1"})),
        # Names that look like what is asked.
        ("ready", Asked("metadata", MODEL, {"model_name": "ready"})),
        ("ready/ready", Asked("ready", MODEL + "/ready", {"model_name": "ready"})),
        ("a%2Fready", Asked("metadata", MODEL, {"model_name": "a/ready"})),
        ("versions/1", Asked("metadata", MODEL, {"model_name": "versions/1"})),
        ("versions/versions/1", Asked("metadata", VERSION, {"model_name": "versions", "model_version": "1"})),
        # Others.
        ("my%20model%3A7b/infer", Asked("infer", MODEL + "/infer", {"model_name": "my model:7b"})),
        ("f%C3%BCr", Asked("metadata", MODEL, {"model_name": "für"})),
        ("%ff", Asked("metadata", MODEL, {"model_name": "\ufffd"})),
    ],
)
def test_the_end_of_a_models_path_tells_what_is_asked(path: str, asked: Asked) -> None:
    assert read_path(f"/v2/models/{path}") == asked


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models",
        "/v2/models/",
        "/v2/models//infer",
        "/v2/models/m/versions/",
        "/v2/models/m/versions//infer",
        "/v2/health",
        "/v2/health/live/",
        "/v2/repository/models/m/load",
        "/v2/x",
    ],
)
def test_other_paths_lead_nowhere(path: str) -> None:
    assert read_path(path) is None
