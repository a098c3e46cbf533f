"""The parameters of Open Inference requests. Pure.

What of a request's parameters is part of the key, and so keeps its rows apart from others, is told by elimination:
those that the router itself reads (`timeout`, `priority`, `agent_type`), that speak of the transport (`headers`,
`binary_data…`) or of the form of the answer (`classification`, `triton_…`) are not, nor those that the model's settings
ignore; all others are. Parameters of single inputs and outputs would be lost in a batch: except for `binary_data…` and
an output's `classification`, which is done here, they are refused.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from protos.open_inference import open_inference_pb2 as pb
from router.core.types import ParameterValue
from router.errors import InvalidArgument

MICROSECONDS = 1e6
FIRST_BATCH_PRIORITY = 2
# Of a parameter's value in an error.
MAX_SHOWN_CHARACTERS = 100

AGENT_TYPE, TIMEOUT, PRIORITY = "agent_type", "timeout", "priority"
CLASSIFICATION = "classification"
# Of an answer: no other follows to the same request.
IS_FINAL = "triton_final_response"
_NOT_OF_THE_KEY = frozenset({AGENT_TYPE, TIMEOUT, PRIORITY, "headers", CLASSIFICATION})
_NOT_OF_THE_KEY_PREFIXES = ("binary_data", "triton_")
_TRANSPORT_PREFIX = "binary_data"
_SEQUENCE_PREFIX = "sequence_"
_SHARED_MEMORY_PREFIX = "shared_memory_"

Parameters: TypeAlias = Mapping[str, pb.InferParameter]


def timeout_s(parameters: Parameters) -> float | None:
    """The parameter `timeout`, microseconds, in seconds; None without one, or for 0, which is Triton's "none"."""
    microseconds = _whole_number(TIMEOUT, parameters)
    return microseconds / MICROSECONDS if microseconds else None


def is_batch_class(parameters: Parameters) -> bool:
    """Whether the parameter `priority` is 2 or more; 0 and 1, Triton's "default" and "highest", are interactive."""
    return _whole_number(PRIORITY, parameters) >= FIRST_BATCH_PRIORITY


def agent_type(parameters: Parameters) -> str:
    """The parameter `agent_type`; empty without one."""
    value = _value(AGENT_TYPE, parameters[AGENT_TYPE]) if AGENT_TYPE in parameters else ""
    if not isinstance(value, str):
        raise InvalidArgument(f"parameter {AGENT_TYPE!r} is {_shown(value)}; it must be a text")
    return value


def of_the_key(parameters: Parameters, ignored: Sequence[str] = ()) -> tuple[tuple[str, ParameterValue], ...]:
    """The parameters that change the answer, by name. `ignored`: patterns of those that do not."""
    chosen = []
    for name in sorted(parameters):
        if name in _NOT_OF_THE_KEY or name.startswith(_NOT_OF_THE_KEY_PREFIXES) or _matches(name, ignored):
            continue
        value = _value(name, parameters[name])
        if not name.startswith(_SEQUENCE_PREFIX):
            chosen.append((name, value))
        elif value:  # 0 is Triton's "no sequence"
            raise InvalidArgument(f"parameter {name!r}: sequences of requests are not supported")
    return tuple(chosen)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_of_input(name: str, parameters: Parameters) -> None:
    """Raise InvalidArgument for a parameter that an input may not have."""
    for parameter in parameters:
        _refuse(f"input {name!r}", parameter)


def classes_of_output(name: str, parameters: Parameters) -> int:
    """How many classes an output shall be told as; 0: as it is. Raises InvalidArgument for other parameters."""
    for parameter in parameters:
        if parameter != CLASSIFICATION:
            _refuse(f"output {name!r}", parameter)
    return _whole_number(CLASSIFICATION, parameters)


def _refuse(owner: str, parameter: str) -> None:
    if parameter.startswith(_SHARED_MEMORY_PREFIX):
        raise InvalidArgument(f"{owner} has the parameter {parameter!r}: shared memory is not supported")
    if not parameter.startswith(_TRANSPORT_PREFIX):
        raise InvalidArgument(f"{owner} has the parameter {parameter!r}; only requests may have parameters here")


def _whole_number(name: str, parameters: Parameters) -> int:
    """0 when it is absent."""
    value = _value(name, parameters[name]) if name in parameters else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"parameter {name!r} is {_shown(value)}; it must be a whole number from 0")
    return value


def _value(name: str, parameter: pb.InferParameter) -> ParameterValue:
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        raise InvalidArgument(f"parameter {name!r} has no value")
    value: ParameterValue = getattr(parameter, choice)
    if isinstance(value, float) and math.isnan(value):  # equals nothing: every such request would have a key of its own
        raise InvalidArgument(f"parameter {name!r} is not a number")
    return value


def _shown(value: ParameterValue) -> str:
    """For an error; a text may have megabytes."""
    return repr(value[:MAX_SHOWN_CHARACTERS] if isinstance(value, str) else value)
