"""bench/ghz: each file calls a method that there is, with a request that it takes. ghz itself does not run here."""

import json
import pathlib
import re

import pytest
from google.protobuf import json_format

from protos.inference_router.v1 import inference_router_pb2 as pb
from tools.run import ROOT

FILES = sorted((ROOT / "bench/ghz").glob("*.json"))
TEMPLATE = re.compile(r"\{\{.*?\}\}")
SERVICES = pb.DESCRIPTOR.services_by_name


def request_of(file: pathlib.Path) -> pb.PredictRequest:
    """The file's data, each of its templates being 7: a number in JSON may stand in quotes."""
    document = json.loads(file.read_text())
    return json_format.Parse(TEMPLATE.sub("7", json.dumps(document["data"])), pb.PredictRequest())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_calls_a_method_that_takes_its_data(file: pathlib.Path) -> None:
    document = json.loads(file.read_text())
    service, _, method = document["call"].partition("/")
    descriptor = next(found for found in SERVICES.values() if found.full_name == service)
    assert descriptor.methods_by_name[method].input_type is pb.PredictRequest.DESCRIPTOR
    assert document["insecure"]
    assert {len(agent.vector) for agent in request_of(file).agents.values()} == {32}


def test_one_agent_and_sixteen_over_four_models() -> None:
    one, sixteen = map(request_of, FILES)
    assert len(one.agents) == 1
    assert len(sixteen.agents) == 16
    assert len({agent.model_name for agent in sixteen.agents.values()}) == 4
