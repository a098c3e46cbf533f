"""Heads: what a request says beside its id and its rows: the model, its tensors, its parameters, the outputs it wants.

A caller's requests differ in their rows and little else. So a head is read and checked once, with all that the backend
tells of the model, and remembered by its bytes; every further request with the same head costs a look into a table.
Only heads of raw contents are remembered: typed ones are a part of them. Whoever changes what models are makes new
`Heads`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.core.types import ITEM_SIZE, BatchKey, ParameterValue, TensorSpec
from router.errors import InvalidArgument
from router.models import Model, Models
from router.servicers import parameters
from router.servicers.convert import check_name

# Characters that names, shapes and parameters of a request may have together, and its outputs' names where they belong
# to the key. They are kept with the key, of which there may be ten thousand, and go with every batch of it.
MAX_HEAD_CHARACTERS = 8192
# What a parameter or a dimension counts as beside its name.
NUMBER_CHARACTERS = 8
# So there cannot be more inputs, outputs, dimensions and parameters in all.
MAX_THINGS = MAX_HEAD_CHARACTERS // NUMBER_CHARACTERS
# Elements of a shape, whatever there is of them: a shape costs nothing to write.
MAX_COUNTABLE = 2**63 - 1
# Heads that are remembered, and how long each may be: 4 MiB in all.
MAX_HEADS = 4096
MAX_REMEMBERED_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request's rows go."""

    key: BatchKey
    max_row_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A checked head. `sizes`: bytes of each input's raw contents, -1 for BYTES; `timeout_s`: as the request asks.

    `outputs`: the names that are wanted, all when empty; `asked`: those that its batch has to ask for; `classes`: as
    how many classes each of `outputs` is to be told, 0 for as it is; empty when none is.
    """

    target: Target
    rows: int
    sizes: tuple[int, ...]
    timeout_s: float | None
    is_batch_class: bool
    outputs: tuple[str, ...]
    asked: tuple[str, ...]
    classes: tuple[int, ...]


class Heads:
    """Reads heads by the settings and models of now."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self._settings = settings
        self._models = models
        self._max_heads = min(MAX_HEADS, settings.limits.max_keys)
        self._find_model = functools.lru_cache(maxsize=settings.limits.max_keys)(self._find)
        # `typed` looks at the arguments only, so the types of the parameters' values are one of them.
        self._find_target = functools.lru_cache(maxsize=settings.limits.max_keys)(self._make_target)
        # State: heads by their bytes, the oldest first.
        self._known: dict[bytes, Head] = {}

    def find(self, message: pb.ModelInferRequest) -> Head:
        """The head of a message that has neither an id nor contents.

        Raises:
            RouterError: there is no such model, or no such request of it.
            Unlearned: see Models.
        """
        data = message.SerializeToString()
        head = self._known.get(data)
        if head is None:
            head = self.read(message)
            _check_no_contents(message.inputs)
            if len(data) <= MAX_REMEMBERED_BYTES:
                self._remember(data, head)
        return head

    def _remember(self, data: bytes, head: Head) -> None:
        if len(self._known) >= self._max_heads:
            del self._known[next(iter(self._known))]
        self._known[data] = head

    def read(self, message: pb.ModelInferRequest) -> Head:
        """The same, not remembered; the message may have contents."""
        _check_counts(message)
        _check_names(message, self._settings.limits.max_name_length)
        asked = message.parameters
        timeout_s, is_batch_class = parameters.timeout_s(asked), parameters.is_batch_class(asked)
        agent_type = parameters.agent_type(asked)
        model = self._find_model(message.model_name, message.model_version, agent_type)
        specs, rows = _read_specs(message.inputs, is_batched=model.is_batched)
        kept = parameters.of_the_key(asked, model.settings.ignore_parameters)
        outputs, classes = _read_outputs(message.outputs)
        model.check_outputs(outputs)
        told = model.told_outputs
        apart = () if told else tuple(sorted(outputs))
        _check_head(specs, kept, apart)
        whose = message.model_name, message.model_version, agent_type
        target = self._find_target(whose, specs, kept, tuple(type(value) for _, value in kept), apart)
        return Head(target, rows, _sizes(specs, rows), timeout_s, is_batch_class, outputs, outputs or told, classes)

    def _find(self, model_name: str, model_version: str, agent_type: str) -> Model:
        if not model_name:
            raise InvalidArgument("model_name is empty")
        longest = self._settings.limits.max_name_length
        named = {"model_name": model_name, "model_version": model_version, parameters.AGENT_TYPE: agent_type}
        for field, name in named.items():
            check_name(field, name, longest)
        return self._models.find(model_name, model_version, agent_type)

    def _make_target(
        self,
        whose: tuple[str, str, str],
        specs: tuple[TensorSpec, ...],
        kept: tuple[tuple[str, ParameterValue], ...],
        _types: tuple[type, ...],
        outputs: tuple[str, ...],
    ) -> Target:
        model = self._find_model(*whose)
        model.check_inputs(specs)
        if model.settings.send_agent_type and whose[2]:
            kept = tuple(sorted([*kept, (parameters.AGENT_TYPE, whose[2])], key=lambda item: item[0]))
        target = Target(BatchKey(*whose, specs, kept, model.is_batched, outputs), model.settings.max_batch_bytes)
        if target.key.row_bytes > target.max_row_bytes:
            raise too_wide(target.key.row_bytes, target)
        return target


def too_wide(row_bytes: int, target: Target) -> InvalidArgument:
    """A row that no batch could hold."""
    return InvalidArgument(f"a row of {row_bytes} bytes is over max_batch_bytes = {target.max_row_bytes}")


def _check_no_contents(inputs: Sequence[pb.ModelInferRequest.InferInputTensor]) -> None:
    for tensor in inputs:
        if tensor.HasField("contents"):
            raise InvalidArgument(f"input {tensor.name!r} has contents, and the request raw contents")


def _check_counts(message: pb.ModelInferRequest) -> None:
    """Before anything is looked at one by one: a message has room for millions, and each would take microseconds."""
    inputs, outputs = message.inputs, message.outputs
    things = len(inputs) + len(outputs) + len(message.parameters)
    things += sum(len(tensor.shape) + len(tensor.parameters) for tensor in inputs[:MAX_THINGS])
    things += sum(len(output.parameters) for output in outputs[:MAX_THINGS])
    if things > MAX_THINGS:
        what = f"inputs, outputs, dimensions and parameters take {things * NUMBER_CHARACTERS} characters or more"
        raise InvalidArgument(f"{what}, at most {MAX_HEAD_CHARACTERS} are allowed")


def _check_names(message: pb.ModelInferRequest, longest: int) -> None:
    """Before any of them is part of an error."""
    names = [*message.parameters]
    for tensor in message.inputs:
        check_name("an input's name", tensor.name, longest)
        check_name("a datatype", tensor.datatype, longest)
        names += tensor.parameters
    for output in message.outputs:
        check_name("an output's name", output.name, longest)
        names += output.parameters
    for name in names:
        check_name("a parameter's name", name, longest)


def _read_specs(
    inputs: Sequence[pb.ModelInferRequest.InferInputTensor], *, is_batched: bool
) -> tuple[tuple[TensorSpec, ...], int]:
    """What the inputs are, and the rows that all of them have; one, which is all of it, where there are no batches."""
    if not inputs:
        raise InvalidArgument("the request has no inputs")
    read = _read_spec if is_batched else _read_whole
    specs = tuple(read(tensor) for tensor in inputs)
    rows = inputs[0].shape[0] if is_batched else 1
    for tensor in inputs if is_batched else ():
        if tensor.shape[0] != rows:
            first = f"{inputs[0].name!r} has {rows}"
            raise InvalidArgument(f"input {tensor.name!r} has {tensor.shape[0]} rows where {first}")
    if len({spec.name for spec in specs}) < len(specs):
        raise InvalidArgument("two inputs have the same name")
    for spec in specs:
        if rows * spec.row_elements > MAX_COUNTABLE:  # a number of thousands of digits, which Python refuses to print
            raise InvalidArgument(f"input {spec.name!r} has a shape of more than {MAX_COUNTABLE} elements")
    return specs, rows


def _read_spec(tensor: pb.ModelInferRequest.InferInputTensor) -> TensorSpec:
    _check_tensor(tensor)
    shape = tuple(tensor.shape)
    if not shape or min(shape) < 1:
        raise InvalidArgument(
            f"input {tensor.name!r} has shape {list(shape)}, must be [rows, ...] with at least 1 each"
        )
    return TensorSpec(tensor.name, tensor.datatype, shape[1:])


def _read_whole(tensor: pb.ModelInferRequest.InferInputTensor) -> TensorSpec:
    _check_tensor(tensor)
    shape = tuple(tensor.shape)
    if shape and min(shape) < 0:
        raise InvalidArgument(f"input {tensor.name!r} has shape {list(shape)}")
    return TensorSpec(tensor.name, tensor.datatype, shape)


def _check_tensor(tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    parameters.check_of_input(tensor.name, tensor.parameters)
    if tensor.datatype != "BYTES" and tensor.datatype not in ITEM_SIZE:
        raise InvalidArgument(f"input {tensor.name!r} has the unknown datatype {tensor.datatype!r}")


def _check_head(
    specs: Sequence[TensorSpec], kept: Sequence[tuple[str, ParameterValue]], outputs: Sequence[str]
) -> None:
    characters = sum(len(spec.name) + NUMBER_CHARACTERS * (1 + len(spec.row_shape)) for spec in specs)
    characters += sum(map(len, outputs))
    for name, value in kept:
        characters += len(name) + (len(value) if isinstance(value, str) else NUMBER_CHARACTERS)
    if characters > MAX_HEAD_CHARACTERS:
        what = f"names of inputs and outputs, shapes and parameters take {characters} characters"
        raise InvalidArgument(f"{what}, at most {MAX_HEAD_CHARACTERS} are allowed")


def _read_outputs(
    outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor],
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names, and as how many classes each is to be told; no numbers where none is."""
    names = tuple(output.name for output in outputs)
    classes = tuple(parameters.classes_of_output(output.name, output.parameters) for output in outputs)
    if len(set(names)) < len(names):
        raise InvalidArgument("an output is asked for twice")
    return names, classes if any(classes) else ()


def _sizes(specs: Sequence[TensorSpec], rows: int) -> tuple[int, ...]:
    return tuple(-1 if spec.is_variable else rows * spec.row_bytes for spec in specs)
