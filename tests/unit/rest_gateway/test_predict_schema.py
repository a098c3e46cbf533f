"""The body of POST /predict: what refuses it whole, what is one agent's own fault, and what is a number."""

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_gateway.errors import GatewayError, InvalidRequestError, NotJsonError
from rest_gateway.schemas.predict import Limits, PredictCall, TextCall, parse_predict

LIMITS = Limits(max_agents=4, max_vector_length=8, max_name_length=10, max_text_length=20)
GOOD = '{"vector": [1], "model_name": "m"}'


def parse_any(body: str | bytes | dict[str, Any], limits: Limits = LIMITS) -> PredictCall | TextCall:
    """In a text, GOOD stands for an agent without fault."""
    text = json.dumps(body) if isinstance(body, dict) else body
    return parse_predict(text.replace("GOOD", GOOD).encode() if isinstance(text, str) else text, limits)


def parse(body: str | bytes | dict[str, Any], limits: Limits = LIMITS) -> PredictCall:
    call = parse_any(body, limits)
    assert isinstance(call, PredictCall)
    return call


BODY_FAULTS: list[tuple[str, type[GatewayError], str]] = [
    ("", NotJsonError, "not JSON"),
    ("{", NotJsonError, "not JSON"),
    ('{"agents": {"a": {"vector": [NaN], "model_name": "m"}}}', NotJsonError, "NaN is not a JSON number"),
    ('{"agents": {"a": {"vector": [1, Infinity], "model_name": "m"}}}', NotJsonError, "Infinity is not"),
    ("[]", InvalidRequestError, "must be a JSON object, not a list"),
    ("[" + GOOD + "]", InvalidRequestError, "must be a JSON object, not a list"),
    ("null", InvalidRequestError, "must be a JSON object, not null"),
    ("1", InvalidRequestError, "must be a JSON object, not a number"),
    ("true", InvalidRequestError, "must be a JSON object, not a boolean"),
    ('"agents"', InvalidRequestError, "must be a JSON object, not a string"),
    ("{}", InvalidRequestError, "exactly one of agents and text"),
    ('{"agent": {}}', InvalidRequestError, "exactly one of agents and text"),
    ('{"agents": null}', InvalidRequestError, "exactly one of agents and text"),
    ('{"agents": {"a": GOOD}, "text": "hi"}', InvalidRequestError, "exactly one of agents and text"),
    ('{"agents": {}, "text": ""}', InvalidRequestError, "exactly one of agents and text"),
    ('{"text": ""}', InvalidRequestError, "text is empty"),
    ('{"text": " \\t\\n\\u00a0\\u2028"}', InvalidRequestError, "text is blank"),
    ('{"text": "aaaaaaaaaaaaaaaaaaaaa"}', InvalidRequestError, "text has 21 characters, more than 20"),
    ('{"text": "a\\u0000"}', InvalidRequestError, r"text contains U\+0000"),
    ('{"text": "\\ud83d"}', InvalidRequestError, "text contains a lone surrogate"),
    ('{"text": 5}', InvalidRequestError, "text must be a string, not a number"),
    ('{"text": ["hi"]}', InvalidRequestError, "text must be a string, not a list"),
    ('{"text": "hi", "text": "ho"}', InvalidRequestError, 'has "text" more than once'),
    ('{"text": "hi", "timeout_s": 0}', InvalidRequestError, "timeout_s must be a finite"),
    ('{"text": "hi", "explain": 1}', InvalidRequestError, "explain must be true or false"),
    ('{"text": "hi", "priority_class": "x"}', InvalidRequestError, '"interactive" or "batch"'),
    ('{"agents": {}}', InvalidRequestError, "agents is empty"),
    ('{"agents": []}', InvalidRequestError, "agents must be an object of agents by name, not a list"),
    ('{"agents": "alice"}', InvalidRequestError, "not a string"),
    ('{"agents": 5}', InvalidRequestError, "not a number"),
    ('{"agents": false}', InvalidRequestError, "not a boolean"),
    (
        '{"agents": {"1": GOOD, "2": GOOD, "3": GOOD, "4": GOOD, "5": GOOD}}',
        InvalidRequestError,
        "5 entries, more than",
    ),
    ('{"agents": {"a": GOOD, "a": GOOD}}', InvalidRequestError, 'the name "a" more than once'),
    ('{"agents": {"a": GOOD, "\\u0061": GOOD}}', InvalidRequestError, 'the name "a" more than once'),
    ('{"agents": {"é": GOOD, "é": GOOD}}', InvalidRequestError, r'the name "\\u00e9" more than once'),
    ('{"agents": {"a": GOOD}, "agents": {"b": GOOD}}', InvalidRequestError, 'has "agents" more than once'),
    ('{"agents": {"a": GOOD}, "x": 1, "x": 1}', InvalidRequestError, 'has "x" more than once'),
    *[
        (f'{{"agents": {{"a": GOOD}}, "timeout_s": {bad}}}', InvalidRequestError, "timeout_s must be a finite")
        for bad in ("0", "-0.0", "-1", "-1e-9", "true", "false", '"30"', "[]", "{}", "1e400", "1" + "0" * 400)
    ],
    ('{"agents": {"a": GOOD}, "timeout_s": NaN}', NotJsonError, "NaN is not a JSON number"),
    *[
        (f'{{"agents": {{"a": GOOD}}, "explain": {bad}}}', InvalidRequestError, "explain must be true or false")
        for bad in ("1", "0", '"true"', "[]", "{}")
    ],
    *[
        (f'{{"agents": {{"a": GOOD}}, "priority_class": {bad}}}', InvalidRequestError, '"interactive" or "batch"')
        for bad in ('"urgent"', '""', '"BATCH"', "1", "true", "[]", '{"x": 1}')
    ],
]


@pytest.mark.parametrize(("body", "error", "fragment"), BODY_FAULTS)
def test_a_fault_of_the_body_refuses_it_whole(body: str, error: type[GatewayError], fragment: str) -> None:
    with pytest.raises(error, match=fragment):
        parse(body)


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"text": "hi"}', TextCall("hi", None)),
        ('{"text": " a: b ", "agents": null, "timeout_s": 3, "x": {"text": 1}}', TextCall(" a: b ", 3.0)),
        ('{"text": "aaaaaaaaaaaaaaaaaaaa"}', TextCall("a" * 20, None)),
        ('{"text": "\\ud83d\\ude00"}', TextCall("😀", None)),
    ],
)
def test_a_text_stands_as_it_was_written(body: str, call: TextCall) -> None:
    assert parse_any(body) == call


AGENT_FAULTS: list[tuple[str, str]] = [
    ("null", "the agent must be an object, not null"),
    ("[]", "the agent must be an object, not a list"),
    ("[1, 2]", "the agent must be an object, not a list"),
    ("3", "the agent must be an object, not a number"),
    ('"x"', "the agent must be an object, not a string"),
    ("true", "the agent must be an object, not a boolean"),
    ("{}", "model_name is missing"),
    ('{"model_name": "m"}', "vector is missing"),
    ('{"model_name": "m", "vector": null}', "vector is missing"),
    ('{"model_name": "m", "vector": []}', "vector is empty"),
    ('{"model_name": "m", "vector": 1}', "vector must be a list of numbers, not a number"),
    ('{"model_name": "m", "vector": "1,2"}', "vector must be a list of numbers, not a string"),
    ('{"model_name": "m", "vector": {"0": 1}}', "vector must be a list of numbers, not an object"),
    ('{"model_name": "m", "vector": true}', "vector must be a list of numbers, not a boolean"),
    ('{"model_name": "m", "vector": [[1, 2]]}', "vector[0] must be a number, not a list; a vector is flat"),
    ('{"model_name": "m", "vector": [1, [2]]}', "vector[1] must be a number, not a list; a vector is flat"),
    ('{"model_name": "m", "vector": [[1, 2], [3]]}', "vector[0] must be a number, not a list; a vector is flat"),
    ('{"model_name": "m", "vector": [1, "2"]}', "vector[1] must be a number, not a string"),
    ('{"model_name": "m", "vector": ["NaN"]}', "vector[0] must be a number, not a string"),
    ('{"model_name": "m", "vector": [1, 2, null]}', "vector[2] must be a number, not null"),
    ('{"model_name": "m", "vector": [true]}', "vector[0] must be a number, not a boolean"),
    ('{"model_name": "m", "vector": [1.5, false]}', "vector[1] must be a number, not a boolean"),
    ('{"model_name": "m", "vector": [{}]}', "vector[0] must be a number, not an object"),
    ('{"model_name": "m", "vector": [0, 1e39]}', "vector[1] is not finite as a float32"),
    ('{"model_name": "m", "vector": [-1e39]}', "vector[0] is not finite as a float32"),
    ('{"model_name": "m", "vector": [3.4028236e38]}', "vector[0] is not finite as a float32"),
    ('{"model_name": "m", "vector": [1, 1e400]}', "vector[1] is not finite as a float32"),
    ('{"model_name": "m", "vector": [1, 2, 1%s]}' % ("0" * 400), "vector[2] is not finite as a float32"),
    ('{"model_name": "m", "vector": [-1%s]}' % ("0" * 5_000), "vector[0] is not finite as a float32"),
    ('{"model_name": "m", "vector": [1,2,3,4,5,6,7,8,9]}', "vector has 9 values, more than 8"),
    ('{"vector": [1]}', "model_name is missing"),
    ('{"vector": [1], "model_name": null}', "model_name is missing"),
    ('{"vector": [1], "model_name": ""}', "model_name is empty"),
    ('{"vector": [1], "model_name": 0}', "model_name must be a string, not a number"),
    ('{"vector": [1], "model_name": false}', "model_name must be a string, not a boolean"),
    ('{"vector": [1], "model_name": []}', "model_name must be a string, not a list"),
    ('{"vector": [1], "model_name": {"a": 1}}', "model_name must be a string, not an object"),
    ('{"vector": [1], "model_name": "12345678901"}', "model_name has 11 characters, more than 10"),
    ('{"vector": [1], "model_name": "a\\u0000b"}', "model_name contains U+0000"),
    ('{"vector": [1], "model_name": "\\ud800"}', "model_name contains a lone surrogate"),
    ('{"vector": [1], "model_name": "x\\udfffy"}', "model_name contains a lone surrogate"),
    ('{"vector": [1], "model_name": "m", "agent_type": 1}', "agent_type must be a string, not a number"),
    ('{"vector": [1], "model_name": "m", "agent_type": false}', "agent_type must be a string, not a boolean"),
    ('{"vector": [1], "model_name": "m", "agent_type": []}', "agent_type must be a string, not a list"),
    ('{"vector": [1], "model_name": "m", "agent_type": "12345678901"}', "agent_type has 11 characters, more than 10"),
    ('{"vector": [1], "model_name": "m", "agent_type": "\\u0000"}', "agent_type contains U+0000"),
    ('{"vector": [1], "model_name": "m", "agent_type": "\\udc00"}', "agent_type contains a lone surrogate"),
    ('{"vector": [1], "vector": [2], "model_name": "m"}', 'the agent has "vector" more than once'),
    ('{"vector": [1], "model_name": "m", "model_name": "m"}', 'the agent has "model_name" more than once'),
    ('{"vector": [1], "model_name": "m", "x": 1, "x": 1}', 'the agent has "x" more than once'),
]


@pytest.mark.parametrize(("agent", "detail"), AGENT_FAULTS)
def test_a_fault_inside_one_agent_is_that_agents_own(agent: str, detail: str) -> None:
    call = parse(f'{{"agents": {{"good": GOOD, "bad": {agent}, "fine": GOOD}}}}')
    assert call.names == ["good", "bad", "fine"]
    assert [name for name, *_ in call.rows] == ["good", "fine"]
    assert {name: (fault.code, fault.detail) for name, fault in call.faults.items()} == {
        "bad": ("INVALID_ARGUMENT", detail)
    }


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("12345678901", "the agent's name has 11 characters, more than 10"),
        ("\\u0000", "the agent's name contains U+0000"),
        ("\\ud800", "the agent's name contains a lone surrogate"),
        ("a\\udc00\\ud800", "the agent's name contains a lone surrogate"),
    ],
)
def test_a_bad_name_is_that_agents_own_fault(name: str, detail: str) -> None:
    call = parse(f'{{"agents": {{"good": GOOD, "{name}": GOOD}}}}')
    assert [fault.detail for fault in call.faults.values()] == [detail]
    assert len(call.rows) == 1


@pytest.mark.parametrize("name", ["1234567890", "é" * 10, "😀" * 10, "", " ", "a:b", 'q"q', "line\nbreak", "\u200b"])
def test_any_other_name_of_at_most_the_limit_is_good(name: str) -> None:
    call = parse({"agents": {name: {"vector": [1], "model_name": "m" * 10, "agent_type": name}}})
    assert call.rows == [(name, name, "m" * 10, struct.pack("<f", 1))]


def test_what_is_left_out_has_its_default_and_null_leaves_out() -> None:
    minimal = parse('{"agents": {"a": GOOD}}')
    assert minimal == PredictCall(["a"], [("a", "", "m", struct.pack("<f", 1))], {}, None, False, "interactive")
    nulls = '"timeout_s": null, "explain": null, "priority_class": null, "text": null'
    agent = '{"vector": [1], "model_name": "m", "agent_type": null}'
    assert parse(f'{{"agents": {{"a": {agent}}}, {nulls}}}') == minimal


def test_members_without_a_meaning_are_ignored() -> None:
    agent = {"vector": [1], "model_name": "m", "note": {"a": {"b": [None, True, "x:y"]}}}
    assert len(parse({"agents": {"a": agent}, "stream": True, "x": {"y": {}}}).rows) == 1


def test_what_is_given_is_taken() -> None:
    call = parse(
        {
            "agents": {"a": {"vector": [1], "model_name": "m"}},
            "timeout_s": 2,
            "explain": True,
            "priority_class": "batch",
        }
    )
    assert (call.timeout_s, call.explain, call.priority_class) == (2.0, True, "batch")
    assert type(call.timeout_s) is float


@pytest.mark.parametrize("agents", [1, 4])
def test_as_many_agents_as_the_limit_are_good(agents: int) -> None:
    assert (
        len(parse({"agents": {str(n): {"vector": [1] * 8, "model_name": "m"} for n in range(agents)}}).rows) == agents
    )


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-(2**24), 2**24), min_size=1))
def test_a_vector_travels_as_the_float32s_that_its_numbers_round_to(vector: list[float]) -> None:
    body = {"agents": {"a": {"vector": vector, "model_name": "m"}}}
    ((*_, packed),) = parse(body, Limits(1, 10_000, 10)).rows
    assert packed == np.array(vector, "<f4").tobytes()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_refused_exactly_when_no_finite_float32_is_near(value: float) -> None:
    with np.errstate(over="ignore"):
        is_finite = bool(np.isfinite(np.float32(value)))
    assert bool(parse({"agents": {"a": {"vector": [value], "model_name": "m"}}}).rows) is is_finite


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_break_the_parser(body: bytes) -> None:
    with contextlib.suppress(GatewayError):
        parse(body)


# With a lone surrogate that never meets its other half.
ANY_CHARACTER = st.characters() | st.just("\ud800")
agent_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(ANY_CHARACTER, max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
agents = st.dictionaries(
    st.text(ANY_CHARACTER, max_size=12),
    st.fixed_dictionaries(
        {},
        optional={
            "vector": st.lists(agent_values, max_size=4) | agent_values,
            "model_name": agent_values,
            "agent_type": agent_values,
        },
    )
    | agent_values,
    min_size=1,
    max_size=4,
)


@given(agents)
def test_every_agent_of_a_body_that_stands_is_a_row_or_a_fault(agents: dict[str, Any]) -> None:
    call = parse(json.dumps({"agents": agents}))
    assert sorted([name for name, *_ in call.rows] + list(call.faults)) == sorted(agents)
    for row in call.rows:
        assert np.isfinite(np.frombuffer(row[3], "<f4")).all()
        "".join(row[:3]).encode()  # fit for protobuf
