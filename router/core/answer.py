"""Read a backend's answer: is it what was asked for, and which of its rows have failed by themselves.

An answer with a row too few or too many, a tensor too short, another type, or without the model's output is Malformed:
nobody can tell which row is whose, so none of it is used. Rows that the backend names in the parameter `row_errors`
(JSON, `{"3": "message"}`: row number in the batch and why) have failed, and the others are fine. So it is with rows
that hold NaN or infinity where the model's settings forbid that; but since the replica may be the culprit, the answer
has a `fault`, too, for those who can ask another one.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from router.core.batch import check, wanted_outputs
from router.core.types import NUMPY_TYPES, Batch, BatchAnswer, Outputs, Tensor
from router.errors import Malformed

ROW_ERRORS = "row_errors"
MODEL_TEXT_MAX = 1000
# A traceback ends with what it is about: of a longer text so much of the end is kept, and of the beginning the rest.
_MODEL_TEXT_END = 600
_CUT = " ... "

_FLOATS = {name: NUMPY_TYPES[name] for name in ("FP16", "FP32", "FP64")}


def read_answer(
    batch: Batch,
    outputs: Outputs,
    *,
    row_errors: str | None,
    replica: str,
    dispatched_at: float,
    answered_at: float,
    model_version: str = "",
) -> BatchAnswer:
    """The checked answer; `row_errors` is the parameter's text, None without it.

    Raises:
        Malformed: it does not fit its batch, and no row of it can be trusted.
    """
    check(outputs, batch.rows)
    _check_outputs(outputs, wanted_outputs(batch), batch.contract.output, are_told=not batch.key.outputs)
    failed = read_row_errors(row_errors, batch.rows) if row_errors is not None else {}
    fault = None
    if not batch.contract.allow_nan:
        not_finite = {row: text for row, text in _not_finite(outputs, batch.rows).items() if row not in failed}
        if not_finite:
            fault = Malformed(f"{len(not_finite)} of {batch.rows} rows: {next(iter(not_finite.values()))}")
            failed |= not_finite
    return BatchAnswer(
        outputs,
        batch.id,
        batch.rows,
        replica,
        dispatched_at,
        answered_at,
        row_errors=failed or None,
        fault=fault,
        model_version=model_version,
    )


def _check_outputs(outputs: Outputs, wanted: Sequence[str], promised: str | None, *, are_told: bool) -> None:
    """Refuse an answer without the output that the contract names, or with none of those that were asked for.

    With some of them it is good for some of the callers, and each looks for its own. More than was asked for harms
    nobody, and who did not ask for what the contract names does not miss it. `are_told`: the backend itself tells what
    was asked for; where it does not, the replica is not to blame for the names that callers make up.
    """
    if are_told and wanted and not any(tensor.name in wanted for tensor in outputs):
        raise Malformed(f"the model's answer has no output {_listed(wanted)}, only {_found(outputs)}")
    is_due = promised is not None and (not wanted or promised in wanted)
    if is_due and all(tensor.name != promised for tensor in outputs):
        raise Malformed(f"the model's answer has no output {promised!r}, only {_found(outputs)}")


def _found(outputs: Outputs) -> str:
    return _listed([tensor.name for tensor in outputs])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def read_row_errors(text: str, rows: int) -> dict[int, str]:
    """Row numbers of a batch of `rows` to messages. Raises Malformed unless every one is a row's, and once."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{ROW_ERRORS} is not JSON: {error}") from error
    numbers = {str(number) for number in range(rows)}
    if not isinstance(pairs, list) or not all(_is_named(pair, numbers) for pair in pairs):
        raise Malformed(f"{ROW_ERRORS} is not an object of row numbers below {rows} and texts: {model_text(text)}")
    named = {int(number): model_text(_encodable(message)) for number, message in pairs}
    if len(named) != len(pairs):
        raise Malformed(f"{ROW_ERRORS} names a row more than once: {model_text(text)}")
    return named


def _encodable(text: str) -> str:
    """JSON can spell halves of a surrogate pair, which no message and no response can carry."""
    return text.encode(errors="replace").decode()


def _is_named(pair: Any, numbers: set[str]) -> bool:  # noqa: ANN401 (whatever JSON may hold)
    return isinstance(pair, tuple) and pair[0] in numbers and isinstance(pair[1], str)


def model_text(text: str) -> str:
    """A model's own words for a caller, 1,000 characters; of more the middle is left out."""
    if len(text) <= MODEL_TEXT_MAX:
        return text
    return text[: MODEL_TEXT_MAX - _MODEL_TEXT_END - len(_CUT)] + _CUT + text[-_MODEL_TEXT_END:]


def _not_finite(outputs: Outputs, rows: int) -> dict[int, str]:
    """Why a row may not be answered, for each that holds NaN or infinity; one look at each output of floats."""
    found: dict[int, str] = {}
    for tensor in outputs:
        if tensor.datatype in _FLOATS:
            for row in _rows_not_finite(tensor, rows):
                found.setdefault(row, f"the model's output {tensor.name!r} holds NaN or infinity")
    return found


def _rows_not_finite(tensor: Tensor, rows: int) -> list[int]:
    finite = np.isfinite(np.frombuffer(tensor.data, _FLOATS[tensor.datatype]))
    if finite.all():
        return []
    numbers: list[int] = np.flatnonzero(~finite.reshape(rows, -1).all(axis=1)).tolist()
    return numbers
