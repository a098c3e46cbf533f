"""JSON text: what two parsers together find, and what floats look like on the way out."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_gateway.errors import NotJsonError
from rest_gateway.schemas.json_text import BEYOND_DOUBLE, JsonObject, dump, dump_line, load, repeated_keys


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "not JSON"),
        (b"   ", "not JSON"),
        (b"{", "not JSON"),
        (b'{"agents": {"a": {"vector": [1, 2', "not JSON"),
        (b"{}{}", "not JSON"),
        (b"{'agents': {}}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [Infinity]}', "Infinity is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "line\nbreak"}', "not JSON"),
        (b"[" * 5_000 + b"]" * 5_000, "nested too deeply"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested too deeply"),
        (b'{"a": "\x00"}', "not JSON"),
        (b"agents=alice&vector=1", "not JSON"),
    ],
)
def test_what_is_not_json_is_refused_with_the_reason(text: bytes, fragment: str) -> None:
    with pytest.raises(NotJsonError, match=fragment):
        load(text)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        (b'{"x": 1, "x": 2}', ["x"]),
        (b'{"x": 1, "y": 2, "x": 3, "y": 4, "z": 5}', ["x", "y"]),
        (b'{"x": 1, "\\u0078": 2}', ["x"]),
        (b'{"agents": {}, "agents": {"a:b": {}}}', ["agents"]),
        (b'{"x": "1:2:3"}', []),
        (b'{"x": {"y": {"z": 1}}}', []),
        (b'{"x:y": 1, "agents": {"a:b": {"model_name": "llama:7b"}}}', []),
    ],
)
def test_keys_that_stand_twice_at_the_top_are_known(text: bytes, repeated: list[str]) -> None:
    assert repeated_keys(load(text)) == repeated


@pytest.mark.parametrize(
    "text",
    [
        b'{"agents": {"a": {"vector": [1]}, "a": {"vector": [2]}}}',
        b'{"agents": {"a:": {"vector": [1]}, "a:": {"vector": [2]}}}',
        # An escaped colon is none in the text: it must not make room for a repeated key.
        b'{"agents": {"a\\u003a": {"vector": [1]}, "a\\u003a": {"vector": [2]}}}',
        b'{"agents": {"a": {"model_name": "x\\u003ay"}, "a": {"model_name": "x\\u003ay"}}}',
    ],
)
def test_an_agent_that_stands_twice_is_known_whatever_colons_hide_it(text: bytes) -> None:
    document = load(text)
    assert isinstance(document, dict)
    assert len(repeated_keys(document["agents"])) == 1


def test_names_with_colons_are_no_reason_to_read_the_text_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rest_gateway.schemas.json_text._decoder", None)
    load(b'{"agents": {"ns:a": {"model_name": "llama:7b", "vector": [1]}}, "timeout_s": 1}')


def test_only_objects_with_repeated_keys_cost_more_than_a_dict() -> None:
    """A body of a million empty objects once held the loop for seconds, each of them an object with a list."""
    document = load(b'{"agents": {"a": {"meta": {"k": 1}}}, "x": [{}, {"k": 1, "k": 2}]}')
    assert isinstance(document, dict)
    assert [type(one) for one in document["x"]] == [dict, JsonObject]


def test_lines_have_no_characters_at_which_readers_of_lines_break() -> None:
    text = dump_line({"agent": "a\u2028b\u2029c\u0085d\ne☃"})
    assert text.decode().splitlines() == ['{"agent":"a\\u2028b\\u2029c\\u0085d\\ne☃"}']


def test_numbers_beyond_a_double_are_kept_for_their_agent() -> None:
    assert load(b"[1e400, -1e400]") == [BEYOND_DOUBLE, BEYOND_DOUBLE]
    assert load(b"[1" + b"0" * 400 + b"]") == [BEYOND_DOUBLE]
    assert load(b"[1" + b"0" * 10_000 + b"]") == [BEYOND_DOUBLE]


def test_lone_surrogates_are_kept_and_come_back_as_escapes() -> None:
    assert load(b'["\\ud800"]') == ["\ud800"]
    assert dump(["\ud800", np.array([0.1, np.nan], "<f4")]) == b'["\\ud800",[0.1,null]]'


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_survives_in_its_shortest_form(value: float) -> None:
    text = dump(np.array([value], "<f4"))
    (read,) = json.loads(text)
    assert struct.pack("<f", read) == struct.pack("<f", value)
    digits = text.strip(b"[]-").split(b"e")[0].replace(b".", b"").strip(b"0")
    assert len(digits) <= 9  # a float32 never needs more; as a double it would have up to 17


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["agents", "x", "y:"]) | st.text(), json_values, max_size=5), st.booleans())
def test_whatever_is_json_is_read_as_the_standard_library_reads_it(document: object, ensure_ascii: bool) -> None:
    text = json.dumps(document, ensure_ascii=ensure_ascii)
    assert load(text.encode()) == json.loads(text)
    assert repeated_keys(load(text.encode())) == []
