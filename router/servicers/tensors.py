"""Open Inference Protocol requests to core types and back: tensors raw or typed, rows along the first dimension.

Pure. The protocol knows no errors of single rows, so whatever is wrong is the request's error.

What of a request's parameters is part of the key, and so keeps its rows apart from others, is told by elimination:
those that the router itself reads (`timeout`, `priority`, `agent_type`), that speak of the transport (`headers`,
`binary_data…`) or of the form of the answer (`classification`, `triton_…`) are not, all others are. Parameters of
single inputs and outputs would be lost in a batch: except for `binary_data…` they are refused.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from protos.open_inference import open_inference_pb2 as pb
from router.config import LimitSettings, Settings
from router.core.elements import LENGTH, Offsets, scan
from router.core.types import ITEM_SIZE, BatchKey, Block, ParameterValue, Recipient, Tensor, TensorSpec
from router.core.variable import VariableBlock
from router.errors import InvalidArgument, ModelFailed
from router.models import Models
from router.servicers.convert import Terms, check_name

# Characters that names, shapes and parameters of a request may have together. They are kept with the key, of which
# there may be ten thousand, and go with every batch of it.
MAX_HEAD_CHARACTERS = 8192
# What a parameter or a dimension counts as beside its name.
NUMBER_CHARACTERS = 8
# So there cannot be more inputs, outputs, dimensions and parameters in all.
MAX_THINGS = MAX_HEAD_CHARACTERS // NUMBER_CHARACTERS
# Of a parameter's value in an error.
MAX_SHOWN_CHARACTERS = 100
# BYTES elements of a request: each takes 0.1-0.2 µs to pass, and the others wait meanwhile.
MAX_ELEMENTS = 131_072
# Elements of any datatype in typed contents: 0.05 µs each. Raw ones cost nothing.
MAX_TYPED_ELEMENTS = 1_048_576
MICROSECONDS = 1e6
FIRST_BATCH_PRIORITY = 2
# Elements of a shape, whatever there is of them: a shape costs nothing to write.
MAX_COUNTABLE = 2**63 - 1

_AGENT_TYPE, _TIMEOUT, _PRIORITY = "agent_type", "timeout", "priority"
_NOT_OF_THE_KEY = frozenset({_AGENT_TYPE, _TIMEOUT, _PRIORITY, "headers", "classification"})
_NOT_OF_THE_KEY_PREFIXES = ("binary_data", "triton_")
_TRANSPORT_PREFIX = "binary_data"
_SEQUENCE_PREFIX = "sequence_"

# Where typed contents keep a datatype's elements. What is missing travels raw only.
_TYPED = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", ""),
}
_NARROW = frozenset({"INT8", "INT16", "UINT8", "UINT16"})

Parameters: TypeAlias = Mapping[str, pb.InferParameter]
InputTensor: TypeAlias = pb.ModelInferRequest.InferInputTensor


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request's rows go."""

    key: BatchKey
    max_row_bytes: int


class Targets:
    """What a request says of its model, its tensors and its parameters to a target; remembered."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self._settings = settings
        self._models = models
        # `typed` looks at the arguments only, so the types of the parameters' values are one of them.
        self._remembered = functools.lru_cache(maxsize=settings.limits.max_keys)(self._find)

    def find(
        self,
        model: tuple[str, str],
        agent_type: str,
        inputs: tuple[TensorSpec, ...],
        parameters: tuple[tuple[str, ParameterValue], ...],
    ) -> Target:
        """Raises RouterError when there is no such model, or no such request."""
        return self._remembered(model, agent_type, inputs, parameters, tuple(type(value) for _, value in parameters))

    def _find(
        self,
        model: tuple[str, str],
        agent_type: str,
        inputs: tuple[TensorSpec, ...],
        parameters: tuple[tuple[str, ParameterValue], ...],
        _types: tuple[type, ...],
    ) -> Target:
        model_name, model_version = model
        self._check_names(model_name, model_version, agent_type)
        settings = self._models.find(model_name, model_version, agent_type).settings
        if settings.send_agent_type and agent_type:
            parameters = tuple(sorted([*parameters, (_AGENT_TYPE, agent_type)], key=lambda item: item[0]))
        return Target(BatchKey(model_name, model_version, agent_type, inputs, parameters), settings.max_batch_bytes)

    def _check_names(self, model_name: str, model_version: str, agent_type: str) -> None:
        if not model_name:
            raise InvalidArgument("model_name is empty")
        longest = self._settings.limits.max_name_length
        named = {"model_name": model_name, "model_version": model_version, "agent_type": agent_type}
        for field, name in named.items():
            check_name(field, name, longest)


@dataclass(frozen=True, slots=True)
class Rows:
    """A request's rows: raw bytes per input, and where the rows of BYTES inputs begin."""

    target: Target
    rows: int
    inputs: tuple[bytes, ...]
    offsets: "tuple[Offsets | None, ...]"

    def to_block(self, terms: Terms, recipient: Recipient) -> Block:
        """All of them as one block."""
        key = self.target.key
        times = terms.arrived_at, terms.deadline
        whose = terms.tenant, terms.is_batch_class
        if key.is_variable:
            return VariableBlock(
                key, 0, 0, self.rows, self.inputs, key.row_bytes, *times, recipient, *whose, offsets=self.offsets
            )
        return Block(key, 0, 0, self.rows, self.inputs, key.row_bytes, *times, recipient, *whose)


# -- parameters ------------------------------------------------------------------------------------------------------


def timeout_s(parameters: Parameters) -> float | None:
    """The parameter `timeout`, microseconds, in seconds; None without one, or for 0, which is Triton's "none"."""
    microseconds = _whole_number(_TIMEOUT, parameters)
    return microseconds / MICROSECONDS if microseconds else None


def is_batch_class(parameters: Parameters) -> bool:
    """Whether the parameter `priority` is 2 or more; 0 and 1, Triton's "default" and "highest", are interactive."""
    return _whole_number(_PRIORITY, parameters) >= FIRST_BATCH_PRIORITY


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


def _agent_type(parameters: Parameters) -> str:
    value = _value(_AGENT_TYPE, parameters[_AGENT_TYPE]) if _AGENT_TYPE in parameters else ""
    if not isinstance(value, str):
        raise InvalidArgument(f"parameter {_AGENT_TYPE!r} is {value!r}; it must be a text")
    return value


def _of_the_key(parameters: Parameters) -> tuple[tuple[str, ParameterValue], ...]:
    """The parameters that change the answer, by name."""
    chosen = []
    for name in sorted(parameters):
        if name.startswith(_SEQUENCE_PREFIX):
            raise InvalidArgument(f"parameter {name!r}: sequences of requests are not supported")
        if name not in _NOT_OF_THE_KEY and not name.startswith(_NOT_OF_THE_KEY_PREFIXES):
            chosen.append((name, _value(name, parameters[name])))
    return tuple(chosen)


def _refuse_parameters(owner: str, parameters: Parameters) -> None:
    for name in parameters:
        if not name.startswith(_TRANSPORT_PREFIX):
            raise InvalidArgument(f"{owner} has the parameter {name!r}; only requests may have parameters here")


# -- rows in ---------------------------------------------------------------------------------------------------------


def read(request: pb.ModelInferRequest, targets: Targets, limits: LimitSettings) -> Rows:
    """Check the request and take its rows. Raises RouterError."""
    _check_counts(request)
    _check_names(request, limits.max_name_length)
    specs, rows = _read_specs(request.inputs)
    parameters = _of_the_key(request.parameters)
    _check_head(specs, parameters)
    model = request.model_name, request.model_version
    target = targets.find(model, _agent_type(request.parameters), specs, parameters)
    _check_outputs(request.outputs)
    if target.key.row_bytes > target.max_row_bytes:
        raise _too_wide(target.key.row_bytes, target)
    inputs = _read_contents(request, specs, rows)
    read = Rows(target, rows, inputs, _scan(specs, inputs, rows))
    _check_widest(read)
    return read


def _check_counts(request: pb.ModelInferRequest) -> None:
    """Before anything is looked at one by one: a message has room for millions, and each would take microseconds."""
    inputs, outputs = request.inputs, request.outputs
    things = len(inputs) + len(outputs) + len(request.parameters)
    things += sum(len(tensor.shape) + len(tensor.parameters) for tensor in inputs[:MAX_THINGS])
    things += sum(len(output.parameters) for output in outputs[:MAX_THINGS])
    if things > MAX_THINGS:
        what = f"inputs, outputs, dimensions and parameters take {things * NUMBER_CHARACTERS} characters or more"
        raise InvalidArgument(f"{what}, at most {MAX_HEAD_CHARACTERS} are allowed")


def _check_names(request: pb.ModelInferRequest, longest: int) -> None:
    """Before any of them is part of an error."""
    check_name("id", request.id, longest)
    names = [*request.parameters]
    for tensor in request.inputs:
        check_name("an input's name", tensor.name, longest)
        check_name("a datatype", tensor.datatype, longest)
        names += tensor.parameters
    for output in request.outputs:
        check_name("an output's name", output.name, longest)
        names += output.parameters
    for name in names:
        check_name("a parameter's name", name, longest)


def _read_specs(inputs: Sequence[InputTensor]) -> tuple[tuple[TensorSpec, ...], int]:
    """What the inputs are, and the rows that all of them have."""
    if not inputs:
        raise InvalidArgument("the request has no inputs")
    specs = tuple(_read_spec(tensor) for tensor in inputs)
    rows = inputs[0].shape[0]
    for tensor in inputs:
        if tensor.shape[0] != rows:
            first = f"{inputs[0].name!r} has {rows}"
            raise InvalidArgument(f"input {tensor.name!r} has {tensor.shape[0]} rows where {first}")
    if len({spec.name for spec in specs}) < len(specs):
        raise InvalidArgument("two inputs have the same name")
    for spec in specs:
        if rows * spec.row_elements > MAX_COUNTABLE:  # a number of thousands of digits, which Python refuses to print
            raise InvalidArgument(f"input {spec.name!r} has a shape of more than {MAX_COUNTABLE} elements")
    return specs, rows


def _read_spec(tensor: InputTensor) -> TensorSpec:
    _refuse_parameters(f"input {tensor.name!r}", tensor.parameters)
    if tensor.datatype != "BYTES" and tensor.datatype not in ITEM_SIZE:
        raise InvalidArgument(f"input {tensor.name!r} has the unknown datatype {tensor.datatype!r}")
    shape = tuple(tensor.shape)
    if not shape or min(shape) < 1:
        raise InvalidArgument(
            f"input {tensor.name!r} has shape {list(shape)}, must be [rows, ...] with at least 1 each"
        )
    return TensorSpec(tensor.name, tensor.datatype, shape[1:])


def _check_head(specs: Sequence[TensorSpec], parameters: Sequence[tuple[str, ParameterValue]]) -> None:
    characters = sum(len(spec.name) + NUMBER_CHARACTERS * (1 + len(spec.row_shape)) for spec in specs)
    for name, value in parameters:
        characters += len(name) + (len(value) if isinstance(value, str) else NUMBER_CHARACTERS)
    if characters > MAX_HEAD_CHARACTERS:
        what = f"inputs' names and shapes and parameters take {characters} characters"
        raise InvalidArgument(f"{what}, at most {MAX_HEAD_CHARACTERS} are allowed")


def _check_outputs(outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor]) -> None:
    for output in outputs:
        _refuse_parameters(f"output {output.name!r}", output.parameters)
    if len({output.name for output in outputs}) < len(outputs):
        raise InvalidArgument("an output is asked for twice")


def _read_contents(request: pb.ModelInferRequest, specs: Sequence[TensorSpec], rows: int) -> tuple[bytes, ...]:
    _check_elements(specs, rows)
    if not request.raw_input_contents:
        _check_typed(specs, rows)
        typed = zip(request.inputs, specs, strict=True)
        return tuple(_from_typed(tensor.contents, spec, rows) for tensor, spec in typed)
    if len(request.raw_input_contents) != len(specs):
        count = f"{len(request.raw_input_contents)} raw contents for {len(specs)} inputs"
        raise InvalidArgument(f"the request has {count}")
    for tensor in request.inputs:
        if tensor.HasField("contents"):
            raise InvalidArgument(f"input {tensor.name!r} has contents, and the request raw contents")
    for spec, raw in zip(specs, request.raw_input_contents, strict=True):
        if not spec.is_variable and len(raw) != rows * spec.row_bytes:
            raise InvalidArgument(f"input {spec.name!r} has {len(raw)} bytes, which is not {_described(spec, rows)}")
    return tuple(request.raw_input_contents)


def _described(spec: TensorSpec, rows: int) -> str:
    return f"{spec.datatype}{[rows, *spec.row_shape]}"


def _check_elements(specs: Sequence[TensorSpec], rows: int) -> None:
    elements = sum(rows * spec.row_elements for spec in specs if spec.is_variable)
    if elements > MAX_ELEMENTS:
        raise InvalidArgument(f"{elements} BYTES elements, at most {MAX_ELEMENTS} are allowed in one request")


def _check_typed(specs: Sequence[TensorSpec], rows: int) -> None:
    elements = sum(rows * spec.row_elements for spec in specs)
    if elements > MAX_TYPED_ELEMENTS:
        what = f"{elements} elements in typed contents, at most {MAX_TYPED_ELEMENTS} are allowed"
        raise InvalidArgument(f"{what}; raw_input_contents may hold more")


def _from_typed(contents: pb.InferTensorContents, spec: TensorSpec, rows: int) -> bytes:
    if spec.datatype not in _TYPED:
        raise InvalidArgument(f"input {spec.name!r}: {spec.datatype} travels in raw_input_contents only")
    field, numpy_type = _TYPED[spec.datatype]
    elements = getattr(contents, field)
    if len(elements) != rows * spec.row_elements:
        raise InvalidArgument(f"input {spec.name!r} has {len(elements)} {field}, which is not {_described(spec, rows)}")
    if spec.is_variable:
        return b"".join([part for element in elements for part in (LENGTH.pack(len(element)), element)])
    if spec.datatype in _NARROW:
        return _narrowed(elements, spec, np.dtype(numpy_type))
    return np.fromiter(elements, np.dtype(numpy_type), len(elements)).tobytes()


def _narrowed(elements: Sequence[int], spec: TensorSpec, numpy_type: np.dtype[np.integer[Any]]) -> bytes:
    """Typed contents know no integers below 32 bits."""
    wide = np.fromiter(elements, np.int64, len(elements))
    narrow = wide.astype(numpy_type)
    if (wrong := np.flatnonzero(narrow != wide)).size:
        raise InvalidArgument(f"input {spec.name!r}: {wide[wrong[0]]} is no {spec.datatype}")
    return narrow.tobytes()


def _scan(specs: Sequence[TensorSpec], inputs: Sequence[bytes], rows: int) -> "tuple[Offsets | None, ...]":
    return tuple(_offsets(spec, data, rows) for spec, data in zip(specs, inputs, strict=True))


def _offsets(spec: TensorSpec, data: bytes, rows: int) -> "Offsets | None":
    if not spec.is_variable:
        return None
    try:
        return scan(data, rows, spec.row_elements)
    except ValueError as error:
        raise InvalidArgument(f"input {spec.name!r} is not {_described(spec, rows)}: {error}") from error


def _check_widest(rows: Rows) -> None:
    """Refuse a row that no batch could hold, where rows differ in width."""
    if not rows.target.key.is_variable:
        return
    widths = np.full(rows.rows, rows.target.key.row_bytes)
    for offsets in rows.offsets:
        if offsets is not None:
            ends = np.frombuffer(offsets, np.int64)
            widths += ends[1:] - ends[:-1]
    if (widest := int(widths.max())) > rows.target.max_row_bytes:
        raise _too_wide(widest, rows.target)


def _too_wide(row_bytes: int, target: Target) -> InvalidArgument:
    return InvalidArgument(f"a row of {row_bytes} bytes is over max_batch_bytes = {target.max_row_bytes}")


# -- rows out --------------------------------------------------------------------------------------------------------


def choose(outputs: Sequence[Tensor], wanted: Sequence[str]) -> list[Tensor]:
    """The outputs that a request asks for, in its order; all of them when it names none. Raises InvalidArgument."""
    if not wanted:
        return list(outputs)
    by_name = {tensor.name: tensor for tensor in outputs}
    for name in wanted:
        if name not in by_name:
            raise InvalidArgument(f"the model has no output {name!r}, only {', '.join(map(repr, by_name))}")
    return [by_name[name] for name in wanted]


def join(pieces: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """Outputs of all rows from those of parts, by the first row of each. Raises ModelFailed when their kinds differ."""
    ordered = [list(pieces[first]) for first in sorted(pieces)]
    kinds = {tuple((tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in piece) for piece in ordered}
    if len(kinds) > 1:
        raise ModelFailed("the model answered the batches of this request with different outputs")
    return ordered[0] if len(ordered) == 1 else [_join_one(parts) for parts in zip(*ordered, strict=True)]


def _join_one(parts: Sequence[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    data = b"".join([part.data for part in parts])
    return Tensor(parts[0].name, parts[0].datatype, (rows, *parts[0].shape[1:]), data)


def to_response(request: pb.ModelInferRequest, outputs: Iterable[Tensor]) -> pb.ModelInferResponse:
    """The answer, raw for every output: tritonclient reads nothing else."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
    for tensor in outputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(tensor.data)
    return response
