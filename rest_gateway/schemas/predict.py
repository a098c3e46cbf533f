"""The body of POST /predict: from JSON text to rows that can travel, and the faults on the way.

A fault of the body refuses it whole (GatewayError); a fault inside one agent is that agent's own (Fault). This is the
gateway's hot path: plain checks instead of a Pydantic model (61 µs for 16 vectors of 32 values, where this takes about
half), and nothing is looked at twice unless it is wrong.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, TypeGuard, get_args

from rest_gateway.errors import Fault, InvalidRequestError
from rest_gateway.schemas import json_text

PriorityClass = Literal["interactive", "batch"]
_NUMBERS = frozenset({int, float})


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold."""

    max_agents: int
    max_vector_length: int
    max_name_length: int  # characters of an agent's name, model name and agent type
    max_text_length: int = 10_000  # characters


# One valid agent, as `router_client.group` takes it: name, agent type, model name and vector. The vector is (dim,)
# float32 little-endian, every value finite, dim >= 1.
Row: TypeAlias = tuple[str, str, str, bytes]


@dataclass(frozen=True, slots=True)
class PredictCall:
    """A request that stands. Each name of the request is either in `rows` or in `faults`."""

    names: list[str]
    rows: list[Row]
    faults: dict[str, Fault]
    timeout_s: float | None
    explain: bool
    priority_class: PriorityClass


@dataclass(frozen=True, slots=True)
class TextCall:
    """A request with a text that stands: neither blank nor too long, and valid as UTF-8."""

    text: str
    timeout_s: float | None


class _AgentError(ValueError):
    """One agent is at fault; the text says how."""


def parse_predict(body: bytes, limits: Limits) -> PredictCall | TextCall:
    """The request in `body`. Raises NotJsonError and InvalidRequestError.

    null is the same as leaving a field out; fields without a meaning are ignored, at the top and in an agent.
    """
    document = json_text.load(body)
    if not isinstance(document, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {json_text.kind_of(document)}")
    for key in json_text.repeated_keys(document):
        raise InvalidRequestError(f"the body has {json_text.quote(key)} more than once")
    agents = document.get("agents")
    text = document.get("text")
    if (text is None) == (agents is None):
        raise InvalidRequestError("the body must have exactly one of agents and text")
    if text is not None:
        return _read_text_call(document, text, limits)
    agents = _check_agents(agents, limits)
    # struct takes True for 1.0, so where a boolean may be the types are looked at: 1 µs for a vector of 32.
    may_have_booleans = b"true" in body or b"false" in body
    rows, faults = _read_rows(agents, limits, may_have_booleans=may_have_booleans)
    return PredictCall(
        names=list(agents),
        rows=rows,
        faults=faults,
        timeout_s=_read_timeout_s(document.get("timeout_s")),
        explain=_read_explain(document.get("explain")),
        priority_class=_read_priority_class(document.get("priority_class")),
    )


def _read_text_call(document: dict[str, object], text: object, limits: Limits) -> TextCall:
    _read_explain(document.get("explain"))
    _read_priority_class(document.get("priority_class"))
    return TextCall(_read_text(text, limits.max_text_length), _read_timeout_s(document.get("timeout_s")))


def _read_text(text: object, limit: int) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(f"text must be a string, not {json_text.kind_of(text)}")
    if not text or text.isspace():
        raise InvalidRequestError("text is blank" if text else "text is empty")
    if len(text) > limit:
        raise InvalidRequestError(f"text has {len(text):,} characters, more than {limit:,}")
    if reason := _why_not_text(text):
        raise InvalidRequestError(f"text contains {reason}")
    return text


def _check_agents(agents: object, limits: Limits) -> dict[str, object]:
    if not isinstance(agents, dict):
        raise InvalidRequestError(f"agents must be an object of agents by name, not {json_text.kind_of(agents)}")
    if not agents:
        raise InvalidRequestError("agents is empty")
    for name in json_text.repeated_keys(agents):
        raise InvalidRequestError(f"agents has the name {json_text.quote(name)} more than once")
    if len(agents) > limits.max_agents:
        raise InvalidRequestError(f"agents has {len(agents):,} entries, more than {limits.max_agents:,}")
    return agents


def _read_timeout_s(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < json_text.BEYOND_DOUBLE:
        raise InvalidRequestError("timeout_s must be a finite number of seconds above 0")
    return float(value)


def _read_explain(value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"explain must be true or false, not {json_text.kind_of(value)}")
    return bool(value)


def _read_priority_class(value: object) -> PriorityClass:
    if value is None:
        return "interactive"
    if not _is_priority_class(value):
        raise InvalidRequestError('priority_class must be "interactive" or "batch"')
    return value


def _is_priority_class(value: object) -> TypeGuard[PriorityClass]:
    return value in get_args(PriorityClass)


def _read_rows(
    agents: dict[str, object], limits: Limits, *, may_have_booleans: bool
) -> tuple[list[Row], dict[str, Fault]]:
    rows, faults = [], {}
    for name, agent in agents.items():
        try:
            rows.append(_read_row(name, agent, limits, may_have_booleans=may_have_booleans))
        except _AgentError as exc:
            faults[name] = Fault("INVALID_ARGUMENT", str(exc))
    return rows, faults


def _read_row(name: str, agent: object, limits: Limits, *, may_have_booleans: bool) -> Row:
    if type(agent) is not dict:
        agent = _check_object(agent)
    limit = limits.max_name_length
    agent_type, model_name = agent.get("agent_type", ""), agent.get("model_name")
    if not (  # the usual case in one look: three short printable strings
        type(model_name) is str
        and type(agent_type) is str
        and 0 < len(model_name) <= limit
        and len(agent_type) <= limit
        and len(name) <= limit
        and f"{name}{agent_type}{model_name}".isprintable()
    ):
        agent_type, model_name = _check_names(name, agent_type, model_name, limit)
    vector = _read_vector(agent.get("vector"), limits.max_vector_length, may_have_booleans=may_have_booleans)
    return name, agent_type, model_name, vector


def _check_object(agent: object) -> dict[str, object]:
    if not isinstance(agent, dict):
        raise _AgentError(f"the agent must be an object, not {json_text.kind_of(agent)}")
    for key in json_text.repeated_keys(agent):
        raise _AgentError(f"the agent has {json_text.quote(key)} more than once")
    return agent


def _check_names(name: str, agent_type: object, model_name: object, limit: int) -> tuple[str, str]:
    """Agent type and model name, null being no agent type."""
    if model_name is None or model_name == "":
        raise _AgentError("model_name is missing" if model_name is None else "model_name is empty")
    _check_name("the agent's name", name, limit)
    model_name = _check_name("model_name", model_name, limit)
    return "" if agent_type is None else _check_name("agent_type", agent_type, limit), model_name


def _check_name(field: str, value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise _AgentError(f"{field} must be a string, not {json_text.kind_of(value)}")
    if len(value) > limit:
        raise _AgentError(f"{field} has {len(value):,} characters, more than {limit:,}")
    if reason := _why_not_text(value):
        raise _AgentError(f"{field} contains {reason}")
    return value


def _why_not_text(value: str) -> str | None:
    """What no text may hold: PostgreSQL refuses the one, UTF-8 the other."""
    if "\0" in value:
        return "U+0000"
    return "a lone surrogate" if any("\ud800" <= character <= "\udfff" for character in value) else None


def _read_vector(vector: object, limit: int, *, may_have_booleans: bool) -> bytes:
    if not isinstance(vector, list):
        raise _AgentError(
            "vector is missing"
            if vector is None
            else f"vector must be a list of numbers, not {json_text.kind_of(vector)}"
        )
    if not 0 < len(vector) <= limit:
        raise _AgentError(_length_fault(len(vector), limit))
    if may_have_booleans and not _are_numbers(vector):
        raise _AgentError(_first_not_a_number(vector))
    try:
        return _packer(len(vector))(*vector)
    except (OverflowError, struct.error) as exc:  # the latter for what is no number, and an int that no double holds
        if not _are_numbers(vector):
            raise _AgentError(_first_not_a_number(vector)) from None
        raise _AgentError(f"vector[{_first_overflow(vector)}] is not finite as a float32") from exc


def _are_numbers(vector: list[object]) -> bool:
    return _NUMBERS.issuperset(map(type, vector))


@lru_cache(maxsize=1024)
def _packer(dim: int) -> Callable[..., bytes]:
    """Packs dim numbers as float32 little-endian; OverflowError for 3.5e38, which a native pack would make infinite."""
    return struct.Struct(f"<{dim}f").pack


def _length_fault(length: int, limit: int) -> str:
    return f"vector has {length:,} values, more than {limit:,}" if length else "vector is empty"


def _first_not_a_number(vector: list[object]) -> str:
    index = next(index for index, value in enumerate(vector) if type(value) not in _NUMBERS)
    hint = "; a vector is flat" if isinstance(vector[index], list) else ""
    return f"vector[{index}] must be a number, not {json_text.kind_of(vector[index])}{hint}"


def _first_overflow(vector: list[float]) -> int:
    return next(index for index, value in enumerate(vector) if _overflows(value))


def _overflows(value: float) -> bool:
    try:
        _packer(1)(value)
    except (OverflowError, struct.error):
        return True
    return False
