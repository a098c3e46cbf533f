"""The input of a job: what goes in comes out, and what means the same is the same."""

import json

import pytest

from rest_gateway.schemas.jobs import decode_agents, decode_text, encode_agents, encode_text, fingerprint
from rest_gateway.schemas.predict import Limits, PredictCall, TextCall, parse_predict

LIMITS = Limits(10, 100, 20)


def parse(body: str) -> PredictCall:
    call = parse_predict(body.encode(), LIMITS)
    assert isinstance(call, PredictCall)
    return call


def agents_input(body: str) -> bytes:
    return encode_agents(parse(body))


@pytest.mark.parametrize("call", [TextCall("a: b\n\u2028😀", None), TextCall("x", 1.5)])
def test_a_text_survives(call: TextCall) -> None:
    assert decode_text(encode_text(call)) == call


@pytest.mark.parametrize(
    "body",
    [
        '{"agents": {"b": {"vector": [0.1, 3.4e38, -0.0], "model_name": "m"}, "a": {"vector": [], "model_name": "m"}}}',
        '{"agents": {"a": {"vector": [1], "model_name": "m", "model_name": "n"}, "b": 5}, "timeout_s": 2}',
        '{"agents": {"\\ud800": {"vector": [1], "model_name": "m"}, "b": {"vector": [1], "model_name": "m"}}}',
        '{"agents": {"a": {"vector": [1], "model_name": "m", "agent_type": "t"}}, "priority_class": "batch"}',
    ],
)
def test_agents_survive_with_their_faults_in_their_order(body: str) -> None:
    assert decode_agents(agents_input(body)) == parse(body)


def test_the_input_is_canonical() -> None:
    body = '{"x": 1, "agents": {"a": {"model_name": "m", "vector": [1, 0.10000000001], "y": null}}}'
    assert json.loads(agents_input(body)) == {
        "agents": {"a": {"vector": [1.0, 0.1], "model_name": "m", "agent_type": ""}},
        "timeout_s": None,
        "explain": False,
        "priority_class": "interactive",
    }


ONE = '{"agents": {"a": {"vector": [1], "model_name": "m"}, "b": {"vector": [2], "model_name": "m"}}}'


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (ONE.replace(" ", ""), True),
        (ONE.replace("[1]", "[1.0]"), True),
        ('{"agents": {"b": {"model_name": "m", "vector": [2]}, "a": {"vector": [1], "model_name": "m"}}}', True),
        (ONE[:-1] + ', "explain": null}', True),
        (ONE.replace("[1]", "[1.5]"), False),
        (ONE[:-1] + ', "explain": true}', False),
        (ONE.replace('"a"', '"\\ud800"'), False),
    ],
)
def test_the_fingerprint_tells_what_means_the_same(other: str, is_same: bool) -> None:
    assert (fingerprint("agents", agents_input(ONE)) == fingerprint("agents", agents_input(other))) is is_same


def test_the_kind_is_part_of_the_fingerprint() -> None:
    data = encode_text(TextCall("x", None))
    assert len(fingerprint("text", data)) == 32
    assert fingerprint("text", data) != fingerprint("agents", data)
    assert fingerprint("text", data) != fingerprint("text", encode_text(TextCall("y", None)))
