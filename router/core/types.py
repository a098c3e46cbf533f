"""The nouns of the data path: key, block, part, batch, outputs. Never one object per row, and never changed.

What is made once per block (`Block`, `Part`) is frozen by agreement only: `frozen=True` makes it three times as dear
(1.3 µs instead of 0.4 for a block). Where rows are shared (`single_flight.py`) a block's deadline may become later.

A request's rows for one key travel as a `Block`: raw little-endian bytes per input tensor. A `Part` is a run of a
block's rows; a boundary between batches may cut a block, so a `Batch` is made of parts. Coordinates: a block begins at
row `first_row` of the caller's block number `index`; a part begins at row `first` of its block.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from router.core.elements import Offsets, scan
from router.errors import Malformed, RouterError

ParameterValue = bool | int | float | str

# Whose rows nobody tells.
DEFAULT_TENANT = "default"

# Elements of this datatype carry their own length; rows of it have no common width.
BYTES = "BYTES"
# Bytes per element of every other OIP datatype.
ITEM_SIZE = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
# And what numpy calls those it knows.
NUMPY_TYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model's input: `row_shape` is the shape of one row, () for a scalar."""

    name: str
    datatype: str
    row_shape: tuple[int, ...]

    @property
    def is_variable(self) -> bool:
        """Whether rows differ in width."""
        return self.datatype == BYTES

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; 0 where rows differ in width."""
        return 0 if self.is_variable else self.row_elements * ITEM_SIZE[self.datatype]


@dataclass(frozen=True, slots=True, eq=False)
class BatchKey:
    """What may share a batch: rows with equal keys and no others.

    `parameters` are those of the OIP request that change the answer, sorted by name. The hash is computed once,
    because a key is looked up for every block.
    """

    model_name: str
    model_version: str
    agent_type: str
    inputs: tuple[TensorSpec, ...]
    parameters: tuple[tuple[str, ParameterValue], ...] = ()
    # False: the model takes no batches. A row is a whole request then, a batch one row, and `row_shape` the shape on
    # the wire, without a dimension of rows before it.
    is_batched: bool = True
    # The outputs that every row of it wants, where nobody tells what else the model has: who names none gets what the
    # backend likes then, which need not be these. Empty otherwise.
    outputs: tuple[str, ...] = ()
    # Bytes of one row over all inputs of a fixed width; whether there are others.
    row_bytes: int = field(init=False, repr=False)
    is_variable: bool = field(init=False, repr=False)
    _identity: tuple[Hashable, ...] = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # True == 1 == 1.0 in Python, but not for a model: the values' types are part of the identity.
        typed = tuple((name, type(value).__name__, value) for name, value in self.parameters)
        identity = (
            self.model_name,
            self.model_version,
            self.agent_type,
            self.inputs,
            typed,
            self.is_batched,
            self.outputs,
        )
        object.__setattr__(self, "row_bytes", sum(spec.row_bytes for spec in self.inputs))
        object.__setattr__(self, "is_variable", any(spec.is_variable for spec in self.inputs))
        object.__setattr__(self, "_identity", identity)
        object.__setattr__(self, "_hash", hash(identity))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, BatchKey) and self._identity == other._identity)

    @property
    def model(self) -> tuple[str, str]:
        """Name and version: what slots are counted by."""
        return self.model_name, self.model_version


class Recipient(Protocol):
    """The caller behind a block, as the core and the batcher see it."""

    @property
    def is_closed(self) -> bool:
        """Every row was answered, or nobody waits any more."""

    def answer(self, part: "Part", answer: "BatchAnswer", offset: int) -> None:
        """Take the answer of `part`: rows offset .. offset + part.rows - 1 of the batch."""

    def fail(self, part: "Part", error: RouterError) -> None:
        """Take the failure of every row of `part`."""

    def expire(self) -> None:
        """The deadline has passed: every row without an answer fails, wherever it is."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Block:
    """Consecutive rows of one call for one key; the unit that is queued.

    `inputs`: raw bytes per tensor of the key, row-major, `rows` rows each. `deadline` and `arrived_at`: monotonic
    seconds. `tenant` and class: whose share of a batch the rows take. `outputs`: the names of those that are wanted,
    all when empty. Rows that differ in width are in `variable.VariableBlock`.
    """

    key: BatchKey
    index: int
    first_row: int
    rows: int
    inputs: tuple[bytes, ...]
    row_bytes: int
    arrived_at: float
    deadline: float
    recipient: Recipient
    tenant: str = DEFAULT_TENANT
    is_batch_class: bool = False
    outputs: tuple[str, ...] = ()

    def whole(self) -> "Part":
        """All rows of the block, never tried yet."""
        return Part(self, 0, self.rows, 0)

    def slice(self, number: int, first: int, rows: int) -> memoryview:
        """The bytes of `rows` rows from row `first` in input number `number`."""
        data = self.inputs[number]
        width = len(data) // self.rows
        return memoryview(data)[first * width : (first + rows) * width]


@dataclass(slots=True, eq=False)
class Part:
    """Rows first .. first + rows - 1 of a block.

    `attempts` counts how often they came back without an answer, `losses` how often that was with a lost stream or by
    a timeout.
    """

    block: Block
    first: int
    rows: int
    attempts: int
    losses: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of these rows over all inputs."""
        return self.rows * self.block.row_bytes

    def cut(self, rows: int) -> tuple["Part", "Part"]:
        """The first `rows` rows and the rest; both have at least one."""
        head = Part(self.block, self.first, rows, self.attempts, self.losses)
        return head, Part(self.block, self.first + rows, self.rows - rows, self.attempts, self.losses)

    def within(self, first: int, rows: int) -> "Part | None":
        """What is in it of the block's rows first .. first + rows - 1."""
        begin, end = max(first, self.first), min(first + rows, self.first + self.rows)
        if begin >= end:
            return None
        part = self if begin == self.first else self.cut(begin - self.first)[1]
        return part if part.rows == end - begin else part.cut(end - begin)[0]

    def tried(self) -> "Part":
        """The same rows after one more attempt in vain."""
        return Part(self.block, self.first, self.rows, self.attempts + 1, self.losses)

    def lost(self) -> "Part":
        """The same rows after one more attempt that was lost."""
        return Part(self.block, self.first, self.rows, self.attempts + 1, self.losses + 1)


@dataclass(frozen=True, slots=True)
class Contract:
    """What a model's answers must hold beside a row for each row.

    `output`: the name of a tensor that may not be missing; None: any will do. `allow_nan`: whether floats may be NaN or
    infinite.
    """

    output: str | None = None
    allow_nan: bool = True


ANY_ANSWER = Contract()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one key, in order, for one backend call."""

    id: str
    key: BatchKey
    parts: tuple[Part, ...]
    rows: int
    formed_at: float
    contract: Contract = ANY_ANSWER


@dataclass(frozen=True, slots=True)
class Tensor:
    """One output of a backend: `shape` (rows, ...), `data` raw little-endian bytes, row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    # Of BYTES, once it was scanned: an answer is split among many callers.
    _offsets: "Offsets | None" = field(default=None, init=False, repr=False, compare=False)

    def rows(self, first: int, rows: int) -> bytes:
        """The bytes of `rows` rows from row `first`; not for BYTES, whose rows have no common width."""
        width = len(self.data) // self.shape[0]
        return self.data[first * width : (first + rows) * width]

    def variable_rows(self, first: int, rows: int) -> bytes:
        """The same for BYTES."""
        offsets = self.scanned()
        return self.data[offsets[first] : offsets[first + rows]]

    def scanned(self) -> Offsets:
        """Where the rows of a BYTES tensor begin; found once. Raises ValueError when they are not what `shape` says."""
        offsets = self._offsets
        if offsets is None:
            offsets = scan(self.data, self.shape[0], math.prod(self.shape[1:]))
            object.__setattr__(self, "_offsets", offsets)
        return offsets


Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What came back for a batch, and what an explanation needs to know of it. Times in monotonic seconds.

    `row_errors`: messages of the rows that failed by themselves, by their number in the batch. `fault`: why the answer
    should be asked for once more elsewhere, although all rows but these can be told from it. `model_version`: of the
    model that answered, if the backend tells.
    """

    outputs: Outputs
    batch_id: str
    batch_rows: int
    replica: str
    dispatched_at: float
    answered_at: float
    row_errors: Mapping[int, str] | None = None
    fault: Malformed | None = None
    model_version: str = ""
