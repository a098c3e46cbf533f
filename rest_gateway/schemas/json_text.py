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
from collections.abc import Callable, Iterable
from math import isfinite
from typing import NoReturn

import numpy as np
import orjson

from rest_gateway.errors import InvalidRequestError, NotJsonError

# Stands for every number that no double holds, its sign aside: a float like any other, and none that a float32 or a
# timeout may be.
BEYOND_DOUBLE = sys.float_info.max
# Of a body that is read by the standard library, strictly; what it is to be has at most a few thousand.
MAX_STRICT_OBJECTS = 10_000
# As well; a quarter of a microsecond each, and as much again for each time that they are looked at.
MAX_STRICT_LISTS = 524_288


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


_KINDS = {
    dict: "an object",
    JsonObject: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    type(None): "null",
    int: "a number",
    float: "a number",
}


def kind_of(value: object) -> str:
    """What a value of a document is, for a message."""
    return _KINDS[type(value)]


def quote(name: str) -> str:
    """The name as an ASCII JSON string of at most about a hundred characters, fit for a message."""
    return json.dumps(name if len(name) <= 100 else name[:100] + "…")


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


def load_strictly(body: bytes, objects_in: Callable[[object], Iterable[object]]) -> object:
    """As `load`, where no object may have a key twice; numbers beyond a double become infinite.

    `objects_in` names the objects of a document that is as it should be (other values among them do no harm): when they
    have all the text's colons, no key was repeated. Raises NotJsonError and InvalidRequestError.
    """
    if body.count(b"[") > MAX_STRICT_LISTS and _lists_in(body) > MAX_STRICT_LISTS:
        raise InvalidRequestError(f"the body has more than {MAX_STRICT_LISTS:,} lists; tensors may be flat, or binary")
    refusal = None
    try:
        document: object = orjson.loads(body)
        pairs = sum([len(value) for value in objects_in(document) if isinstance(value, dict)])
        if pairs == body.count(b":"):
            return document
    except orjson.JSONDecodeError as exc:
        refusal = exc
    decoder = json.JSONDecoder(object_pairs_hook=_StrictObjects(), parse_constant=_refuse_constant)
    return _load_slowly(body, refusal, decoder)


def _lists_in(body: bytes) -> int:
    """The brackets that no string holds."""
    text = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    is_outside = np.cumsum(text == ord('"'), dtype=np.uint8) % 2 == 0
    return int(np.count_nonzero(is_outside & (text == ord("["))))


class _StrictObjects:
    """Makes objects whose keys differ, and not too many of them: each takes a microsecond, and others wait."""

    def __init__(self) -> None:
        self._left = MAX_STRICT_OBJECTS

    def __call__(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        self._left -= 1
        if self._left < 0:
            raise InvalidRequestError(f"the body has more than {MAX_STRICT_OBJECTS:,} objects")
        found = dict(pairs)
        if len(found) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise InvalidRequestError(f"an object has {quote(key)} more than once")
        return found


def _load_slowly(
    body: bytes, refusal: orjson.JSONDecodeError | None, decoder: json.JSONDecoder | None = None
) -> object:
    try:
        return (decoder or _decoder).decode(body.decode())
    except UnicodeDecodeError as exc:
        raise NotJsonError("the body is not JSON: it is not UTF-8") from exc
    except RecursionError as exc:
        raise NotJsonError("the body is nested too deeply") from exc
    except json.JSONDecodeError as exc:
        raise NotJsonError(f"the body is not JSON: {refusal or exc}") from exc
    except ValueError as exc:  # Python's own limit
        raise NotJsonError("the body has a number of thousands of digits") from exc


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
