"""Rules of models: how what a backend tells of a model, and what its settings say, decide what may be sent to it.

Do rows share calls, and how many may? Do these inputs and outputs fit? Where does a native row go, as what, and where
is it answered from? What holds when several tell different things? Metadata may be missing, whole or in part: what
nobody tells is not checked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal, TypeAlias

from router.core.model_info import ModelInfo, ModelReport, ModelState, TensorInfo
from router.core.types import BYTES, ITEM_SIZE, TensorSpec
from router.errors import InvalidArgument

Batching: TypeAlias = Literal["auto", "on", "off"]

ANY = -1
# Names that an error lists.
MAX_LISTED = 8
# What native rows may be sent as.
VECTOR_DATATYPES = ("FP32", "FP64", "FP16")
DEFAULT_INPUT, DEFAULT_DATATYPE, DEFAULT_OUTPUT = "vector", "FP32", "output"
# Of a native row for a model that takes no batches and does not tell its shapes: [1, dim], as one row of a batch.
UNTOLD_RANK = 2


# -- batches ---------------------------------------------------------------------------------------------------------


def takes_batches(batching: Batching, info: ModelInfo | None) -> bool:
    """Whether rows of several requests may share a call.

    auto: Triton's `max_batch_size` says it; else that every input has a leading dimension of any size. Where nobody
    tells, models are expected to take batches.
    """
    if batching != "auto" or info is None:
        return batching != "off"
    if info.max_batch_size is not None:
        return info.max_batch_size > 0
    return all(_leads_with_rows(tensor) for tensor in info.inputs)


def most_rows(info: ModelInfo | None, max_batch_size: int, *, is_batched: bool) -> int:
    """Rows of the largest call: as the settings say, but no more than Triton takes."""
    if not is_batched:
        return 1
    told = info.max_batch_size if info else None
    return min(max_batch_size, told) if told and told > 0 else max_batch_size


def why_unsupported(info: ModelInfo | None, *, is_batched: bool) -> str | None:
    """Why the model cannot be served, and what would help; None: it can."""
    if info is None:
        return None
    if info.is_decoupled:
        return "it is decoupled (any number of answers to a request); turn that off in its configuration"
    if info.is_sequence:
        return "its requests belong to sequences, which batches would tear apart; only its own server can serve it"
    if is_batched:
        for tensor in info.outputs:
            if not _leads_with_rows(tensor):
                what = f"its output {tensor.name!r} has shape {list(tensor.shape)}, without a dimension of rows"
                return f"{what}, so that answers cannot be told apart; set batching: off"
    return None


def _leads_with_rows(tensor: TensorInfo) -> bool:
    """A shape without dimensions is one that nobody tells."""
    return tensor.shape[:1] in ((), (ANY,))


# -- requests --------------------------------------------------------------------------------------------------------


def check_inputs(info: ModelInfo | None, specs: Sequence[TensorSpec], *, is_batched: bool) -> None:
    """Compare a request's inputs with the model's. Raises InvalidArgument."""
    if info is None or not info.inputs:
        return
    told = {tensor.name: tensor for tensor in info.inputs}
    for spec in specs:
        if spec.name not in told:
            raise InvalidArgument(f"the model has no input {spec.name!r}, only {listed(told)}")
        _check_input(told[spec.name], spec, is_batched=is_batched)
    given = {spec.name for spec in specs}
    missing = [tensor.name for tensor in info.inputs if not tensor.is_optional and tensor.name not in given]
    if missing:
        raise InvalidArgument(f"input {missing[0]!r} is missing; the model wants {listed(told)}")


def _check_input(tensor: TensorInfo, spec: TensorSpec, *, is_batched: bool) -> None:
    if is_datatype(tensor.datatype) and spec.datatype != tensor.datatype:
        raise InvalidArgument(f"input {spec.name!r} is {spec.datatype}; the model wants {tensor.datatype}")
    wanted = _shape(tensor, is_batched=is_batched)
    if wanted is not None and not _fits(spec.row_shape, wanted):
        what = "rows of shape" if is_batched else "shape"
        raise InvalidArgument(f"input {spec.name!r} has {what} {list(spec.row_shape)}; the model wants {list(wanted)}")


def _shape(tensor: TensorInfo, *, is_batched: bool) -> tuple[int, ...] | None:
    """As a `TensorSpec` has it; None: nobody tells."""
    if not tensor.shape:
        return None
    return tensor.shape[1:] if is_batched else tensor.shape


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (ANY, size) for size, want in zip(shape, wanted, strict=True))


def check_outputs(info: ModelInfo | None, wanted: Iterable[str]) -> None:
    """Compare the outputs that a request asks for with the model's. Raises InvalidArgument."""
    if info is None or not info.outputs:
        return
    told = [tensor.name for tensor in info.outputs]
    for name in wanted:
        if name not in told:
            raise InvalidArgument(f"the model has no output {name!r}, only {listed(told)}")


def is_datatype(name: str) -> bool:
    """Whether it is a datatype of the protocol; servers may tell others, or none."""
    return name == BYTES or name in ITEM_SIZE


def listed(names: Iterable[str]) -> str:
    """For an error."""
    found = [repr(name) for name in islice(names, MAX_LISTED + 1)]
    return ", ".join(found[:MAX_LISTED]) + (", ..." if len(found) > MAX_LISTED else "")


# -- native rows -----------------------------------------------------------------------------------------------------


def native_input(info: ModelInfo | None, name: str | None, datatype: str | None) -> tuple[str, str]:
    """Name and datatype of the input for native rows. `name`, `datatype`: of the settings, None: as the model has it.

    Raises InvalidArgument where several inputs could be meant, or where vectors have no such form.
    """
    tensor = _native_tensor(info, name)
    if tensor is None:
        return name or DEFAULT_INPUT, datatype or DEFAULT_DATATYPE
    chosen = datatype or (tensor.datatype if is_datatype(tensor.datatype) else DEFAULT_DATATYPE)
    if chosen not in VECTOR_DATATYPES:
        forms = ", ".join(VECTOR_DATATYPES)
        raise InvalidArgument(f"the model's input {tensor.name!r} is {chosen}; vectors can be sent as {forms}")
    return tensor.name, chosen


def _native_tensor(info: ModelInfo | None, name: str | None) -> TensorInfo | None:
    """None: nobody tells of it."""
    if info is None or not info.inputs:
        return None
    if name is not None:
        return next((tensor for tensor in info.inputs if tensor.name == name), None)
    required = [tensor for tensor in info.inputs if not tensor.is_optional] or list(info.inputs)
    if len(required) > 1:
        names = listed(tensor.name for tensor in required)
        raise InvalidArgument(f"the model has the inputs {names}; vector_input must name the one for vectors")
    return required[0]


def native_spec(
    info: ModelInfo | None, name: str | None, datatype: str | None, dim: int, *, is_batched: bool
) -> TensorSpec:
    """The input that a vector of `dim` values is sent as. Raises InvalidArgument when the model takes no such."""
    tensor = _native_tensor(info, name)
    wanted = _shape(tensor, is_batched=is_batched) if tensor else None
    spec = TensorSpec(*native_input(info, name, datatype), _native_shape(dim, wanted, is_batched=is_batched))
    if wanted is not None:
        _check_vector(spec, wanted, dim, is_batched=is_batched)
    check_inputs(info, (spec,), is_batched=is_batched)
    return spec


def _native_shape(dim: int, wanted: tuple[int, ...] | None, *, is_batched: bool) -> tuple[int, ...]:
    rank = len(wanted) if wanted is not None else 1 if is_batched else UNTOLD_RANK
    return () if not rank else (1,) * (rank - 1) + (dim,)


def _check_vector(spec: TensorSpec, wanted: tuple[int, ...], dim: int, *, is_batched: bool) -> None:
    """A row has one dimension, or none for a single value; a whole request may have one before it, of 1."""
    if len(wanted) > (1 if is_batched else UNTOLD_RANK):
        what = f"{'rows of ' if is_batched else ''}shape {list(wanted)}"
        raise InvalidArgument(f"the model's input {spec.name!r} takes {what}; a vector has one dimension")
    takes = wanted[-1] if wanted else 1
    if takes not in (ANY, dim):
        raise InvalidArgument(f"vector has {dim} values; the model's input {spec.name!r} takes {takes}")


def native_output(info: ModelInfo | None, name: str | None) -> str | None:
    """The output that native rows are answered from. `name`: of the settings. None: `output`, else the first.

    Raises InvalidArgument when the model has no such output.
    """
    told = [tensor.name for tensor in info.outputs] if info else []
    if name is None and told:
        return DEFAULT_OUTPUT if DEFAULT_OUTPUT in told else told[0]
    if told and name not in told:
        raise InvalidArgument(f"the model has no output {name!r}, as vector_output says, only {listed(told)}")
    return name


def to_ask_for(info: ModelInfo | None, output: str | None) -> tuple[str, ...]:
    """What a batch must ask for so that no more is computed and sent than this output; (): there is nothing else."""
    return (output,) if output is not None and info is not None and len(info.outputs) > 1 else ()


# -- what several say, or one after the other --------------------------------------------------------------------------


def agree(reports: Sequence[ModelReport | None]) -> ModelReport | None:
    """What replicas tell of a model, in their order; None for one that is silent, and for what nobody can tell.

    One that serves it speaks for all, else one that has it. Only if every one says so it is absent.
    """
    for state in (ModelState.READY, ModelState.UNREADY):
        of_state = [report for report in reports if report and report.state is state]
        if of_state:
            return next((report for report in of_state if report.info), of_state[0])
    return ModelReport(ModelState.ABSENT) if reports and None not in reports else None


def differ(reports: Iterable[ModelReport | None]) -> bool:
    """Whether replicas tell different things of a model."""
    return len({report.info for report in reports if report and report.info}) > 1


def remember(before: ModelReport | None, now: ModelReport) -> ModelReport:
    """What is known of a model that is told about again: a server that has told once may fail to, and is the same.

    Without this every such moment would send rows as something else.
    """
    if before is None or before.info is None or now.state is ModelState.ABSENT:
        return now
    if now.info is None:
        return replace(now, info=before.info)
    if now.info.max_batch_size is None and before.info.max_batch_size is not None:
        return replace(now, info=_with_config(now.info, before.info))
    return now


def _with_config(info: ModelInfo, before: ModelInfo) -> ModelInfo:
    """What only Triton's configuration tells, as it was before."""
    optional = {tensor.name for tensor in before.inputs if tensor.is_optional}
    return replace(
        info,
        inputs=tuple(replace(tensor, is_optional=tensor.name in optional) for tensor in info.inputs),
        max_batch_size=before.max_batch_size,
        is_decoupled=before.is_decoupled,
        is_sequence=before.is_sequence,
    )
