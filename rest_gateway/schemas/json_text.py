"""JSON text to Python objects and back, with the faults that fast parsers keep silent about.

orjson parses first. It keeps the last of two equal keys without a word, so the text's colons are counted: every
key/value pair has exactly one outside of strings, hence colons >= pairs in the text >= pairs in the parsed document.
When the ends are equal no key was repeated. In every other case, and where orjson refuses, the standard library reads
the text again: slower by ten times, and with the reason at hand.

orjson also refuses two things that the grammar of RFC 8259 allows and that concern one agent only: numbers beyond a
double (1e400) and lone surrogates (backslash-u d800). The second reading keeps both, for the agent's own error.
"""

import json
import sys
from collections import Counter
from math import isfinite
from typing import NoReturn

import orjson

from rest_gateway.errors import NotJsonError

# Stands for every number that no double holds, its sign aside: a float like any other, and none that a float32 or a
# timeout may be.
BEYOND_DOUBLE = sys.float_info.max


class JsonObject(dict[str, object]):
    """An object with `repeated` keys, those that stood there more than once; the last value counts."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def _read_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A plain dict wherever that tells all: a body of a million empty objects must not hold the loop for seconds."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else JsonObject(pairs)


def repeated_keys(value: object) -> list[str]:
    """The keys that stood more than once in an object from `load`."""
    return value.repeated if isinstance(value, JsonObject) else []


def load(body: bytes) -> object:
    """The value of a JSON text. Raises NotJsonError, with the reason.

    Repeated keys are kept in mind (`repeated_keys`) in the document, in its `agents` and in each agent.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        return _load_slowly(body, exc)
    if not isinstance(document, dict) or _has_no_repeats(body, document):
        return document
    return _load_slowly(body, None)


def _has_no_repeats(body: bytes, document: dict[str, object]) -> bool:
    """Whether the colons prove that no key was repeated; False means: unknown."""
    agents = document.get("agents")
    if not isinstance(agents, dict):
        return body.count(b":") == len(document)
    objects = [agent for agent in agents.values() if type(agent) is dict]
    surplus = body.count(b":") - len(document) - len(agents) - sum(map(len, objects))
    if surplus == 0:
        return True
    # Names like "llama:7b" are usual. Without a backslash each colon of a parsed string stands as itself in the text.
    return b"\\" not in body and surplus == _colons_in_strings(agents, objects)


def _colons_in_strings(agents: dict[str, object], objects: list[dict[str, object]]) -> int:
    values = [value for fields in objects for value in fields.values() if isinstance(value, str)]
    return sum(text.count(":") for text in (*agents, *values))


def _load_slowly(body: bytes, refusal: orjson.JSONDecodeError | None) -> object:
    try:
        return _decoder.decode(body.decode())
    except UnicodeDecodeError as exc:
        raise NotJsonError("the body is not JSON: it is not UTF-8") from exc
    except RecursionError as exc:
        raise NotJsonError("the body is nested too deeply") from exc
    except json.JSONDecodeError as exc:
        raise NotJsonError(f"the body is not JSON: {refusal or exc}") from exc


def _read_int(text: str) -> float:
    return int(text) if len(text) <= 300 else BEYOND_DOUBLE


def _read_float(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else BEYOND_DOUBLE


def _refuse_constant(text: str) -> NoReturn:
    raise NotJsonError(f"the body is not JSON: {text} is not a JSON number")


_decoder = json.JSONDecoder(
    object_pairs_hook=_read_object, parse_int=_read_int, parse_float=_read_float, parse_constant=_refuse_constant
)


def dump(document: object) -> bytes:
    """JSON in UTF-8. A float32 array becomes a list of the shortest decimals that name its values; NaN is null."""
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(document, separators=(",", ":"), default=_plain).encode()


def dump_line(document: object) -> bytes:
    """As `dump`, without the three characters at which readers of lines break though JSON lets them stand."""
    text = dump(document)
    for raw, escaped in _LINE_BREAKS:
        text = text.replace(raw, escaped)
    return text


_LINE_BREAKS = tuple((char.encode(), json.dumps(char).strip('"').encode()) for char in "\u0085\u2028\u2029")


def _plain(value: object) -> object:
    return orjson.loads(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
