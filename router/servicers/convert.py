"""Protobuf to core types and back, with the checks that need no queue: shapes, names, sizes, finite values, deadlines.

Pure: it takes `now`. A fault of one row is that row's error; a fault of a block is that block's.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protos.inference_router.v1 import inference_router_pb2 as pb
from router.config import LimitSettings, Settings
from router.core.batch import partition
from router.core.types import DEFAULT_TENANT, NUMPY_TYPES, BatchAnswer, BatchKey, Block, Part, Recipient, Tensor
from router.errors import InvalidArgument, ModelFailed, RouterError
from router.models import Models, Unlearned

# Taken off a gRPC deadline, so that our own answer still arrives in time.
GRPC_DEADLINE_MARGIN_S = 0.020
# Bad rows that are told apart in one call; a block that holds more than are left of them is refused whole.
MAX_BAD_ROWS = 1024
FLOAT32 = np.dtype("<f4")
FloatArray = npt.NDArray[np.float32]

_CLASSES = frozenset(pb.PriorityClass.values())


@dataclass(frozen=True, slots=True)
class Route:
    """Where a native row goes and which output it is answered from (None: `output`, else the first).

    `wanted`: the outputs that a batch must ask for; (): all. `row_bytes`: of a row as it comes, where it goes on as it
    is; -1: it goes on as `datatype`.
    """

    key: BatchKey
    output: str | None
    wanted: tuple[str, ...]
    row_bytes: int
    datatype: str


class Routes:
    """Agent type, model name and vector length to a route; looked up for every block, so remembered."""

    def __init__(self, settings: Settings, models: Models | None = None) -> None:
        self._settings = settings
        self._models = models or Models(settings)
        self.find: Callable[[str, str, int], Route] = functools.lru_cache(maxsize=settings.limits.max_keys)(self._find)

    def _find(self, agent_type: str, model_name: str, dim: int) -> Route:
        """Raises RouterError for rows that cannot be served, and Unlearned."""
        limits = self._settings.limits
        check_name("model_name", model_name, limits.max_name_length)
        check_name("agent_type", agent_type, limits.max_name_length)
        if not model_name:
            raise InvalidArgument("model_name is empty")
        if not dim:
            raise InvalidArgument("vector is empty")
        if dim > limits.max_vector_length:
            raise InvalidArgument(f"vector has {dim} values, at most {limits.max_vector_length} are allowed")
        return self._known(agent_type, model_name, dim)

    def _known(self, agent_type: str, model_name: str, dim: int) -> Route:
        model = self._models.find(model_name, "", agent_type)
        settings = model.settings
        spec = model.vector_spec(dim)
        if spec.row_bytes > settings.max_batch_bytes:
            what = f"a row of {spec.row_bytes} bytes is over max_batch_bytes"
            raise InvalidArgument(f"{what} = {settings.max_batch_bytes}")
        parameters = (("agent_type", agent_type),) if settings.send_agent_type and agent_type else ()
        key = BatchKey(model_name, "", agent_type, (spec,), parameters, is_batched=model.is_batched)
        output, wanted = model.vector_output()
        return Route(key, output, wanted, key.row_bytes if spec.datatype == "FP32" else -1, spec.datatype)


@dataclass(slots=True)
class Terms:
    """What holds for all rows of a call. Times in monotonic seconds."""

    arrived_at: float
    timeout_s: float
    tenant: str = DEFAULT_TENANT
    is_batch_class: bool = False

    @property
    def deadline(self) -> float:
        """When the call's open rows expire."""
        return self.arrived_at + self.timeout_s


def check_name(field: str, name: str, longest: int) -> None:
    """Raise InvalidArgument when a name is too long."""
    if len(name) > longest:
        raise InvalidArgument(f"{field} has {len(name)} characters, at most {longest} are allowed")


def check_class(priority_class: int) -> None:
    """Raise InvalidArgument for a number that names no class; proto3 enums are open."""
    if priority_class not in _CLASSES:
        raise InvalidArgument(f"priority_class {priority_class} is not one of {', '.join(pb.PriorityClass.keys())}")


def timeout_s(asked_s: float | None, rpc_s: float | None, settings: Settings) -> float:
    """Seconds a call may take: the earliest of the message's, the RPC's and `max_timeout_s`.

    `rpc_s`: what is left of the gRPC deadline. Without either, `default_timeout_s`. May be negative: too late already.
    """
    if asked_s is not None and not asked_s > 0:
        raise InvalidArgument(f"timeout_s is {asked_s:g}; it must be greater than zero")
    given = [] if asked_s is None else [asked_s]
    if rpc_s is not None:
        given.append(rpc_s - GRPC_DEADLINE_MARGIN_S)
    return min(*given, settings.max_timeout_s) if given else min(settings.default_timeout_s, settings.max_timeout_s)


# -- rows in ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """Consecutive good rows of a block (error None), or one bad row."""

    first: int
    rows: int
    error: RouterError | None


class RawBlock(NamedTuple):
    """A block of the wire, each field read once: reading them costs more than most of what is done with them."""

    agent_type: str
    model_name: str
    rows: int
    dim: int
    vectors: bytes


class RawCall(NamedTuple):
    """A call of the wire with its blocks, of which there may be one too many."""

    message: pb.Call
    blocks: list[RawBlock]


def read_calls(calls: Iterable[pb.Call], size: int, max_blocks: int) -> Iterator[list[RawCall]]:
    """Calls in lists of about `size` calls and blocks. Of each call at most one block more than may be is read."""
    some: list[RawCall] = []
    weight = 0
    for call in calls:
        blocks = [
            RawBlock(block.agent_type, block.model_name, block.rows, block.dim, block.vectors)
            for block in islice(call.blocks, max_blocks + 1)
        ]
        some.append(RawCall(call, blocks))
        weight += 1 + len(blocks)
        if weight >= size:
            yield some
            some, weight = [], 0
    if some:
        yield some


def check_call(call: RawCall, limits: LimitSettings) -> int:
    """The call's rows in all. Raises InvalidArgument for a fault of the whole call."""
    message, longest = call.message, limits.max_name_length
    tenant, request_id = message.tenant, message.request_id
    if message.priority_class not in _CLASSES or len(tenant) > longest or len(request_id) > longest:
        check_class(message.priority_class)
        check_name("tenant", tenant, longest)
        check_name("request_id", request_id, longest)
    if len(call.blocks) > limits.max_agents:
        count = len(message.blocks)
        raise InvalidArgument(f"the call has {count} blocks, at most {limits.max_agents} are allowed")
    rows = 0
    for index, block in enumerate(call.blocks):
        if not block.rows:
            raise InvalidArgument(f"block {index} has no rows")
        rows += block.rows
    if not rows:
        raise InvalidArgument("the call has no blocks")
    return rows


def check_size(vectors: bytes, rows: int, dim: int) -> None:
    """Raise InvalidArgument unless `vectors` holds rows x dim float32."""
    if len(vectors) != rows * dim * FLOAT32.itemsize:
        raise InvalidArgument(f"vectors has {len(vectors)} bytes, which is not {rows} rows of {dim} float32")


def are_finite(vectors: Sequence[bytes]) -> bool:
    """Whether all of these vectors hold whole finite float32; one look at all takes a tenth of a look at each.

    False: at least one does not, or cannot be told here.
    """
    are_whole = {len(one) % FLOAT32.itemsize for one in vectors} <= {0}
    return are_whole and _is_finite(np.frombuffer(b"".join(vectors), FLOAT32))


def finite_runs(
    vectors: bytes, rows: int, dim: int, most_bad: int = MAX_BAD_ROWS, sent: npt.NDArray[Any] | None = None
) -> list[Run]:
    """Tell rows with a NaN or an infinity from the rest; a bad row's message names its first bad value.

    `sent`: the same values in the datatype that they are sent as, which may be too narrow for some.

    Raises:
        InvalidArgument: there are more than `most_bad` of them.
    """
    flat = np.frombuffer(vectors, FLOAT32)
    judged = flat if sent is None else sent
    if _is_finite(judged):
        return [Run(0, rows, None)]
    finite = np.isfinite(judged)
    matrix = finite.reshape(rows, dim)
    is_good = np.logical_and.reduce(matrix, axis=1)
    bad_rows = len(is_good) - int(np.count_nonzero(is_good))
    if bad_rows > most_bad:
        what = f"more than {MAX_BAD_ROWS} in one call are not told apart"
        raise InvalidArgument(f"{bad_rows} rows hold NaN or infinity; {what}")
    begins = ~is_good[1:] | ~is_good[:-1]
    starts = [0, *(np.flatnonzero(begins) + 1).tolist()]
    ends = [*starts[1:], rows]
    values = flat.reshape(rows, dim)
    return [
        Run(start, end - start, None if is_good[start] else _not_finite(values[start], matrix[start]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _is_finite(flat: npt.NDArray[Any]) -> bool:
    """Looked for in the bytes of the answers: 0.7 µs for a short vector, where `all()` makes it 1.4."""
    return b"\0" not in np.isfinite(flat).tobytes()


def _not_finite(row: FloatArray, is_finite: npt.NDArray[np.bool_]) -> InvalidArgument:
    where = int(np.flatnonzero(~is_finite)[0])
    if np.isfinite(row[where]):
        return InvalidArgument(f"vector[{where}] is {row[where]:g}, which is beyond FP16, as it is sent to the model")
    return InvalidArgument(f"vector[{where}] is {row[where]:g}; every value must be finite as a float32")


def read_rows(
    route: Route, vectors: bytes, rows: int, dim: int, most_bad: int = MAX_BAD_ROWS
) -> tuple[bytes, list[Run]]:
    """The rows as they are sent, and which of them are good.

    Raises:
        InvalidArgument: the bytes are not so many rows, or more than `most_bad` of these are bad.
    """
    check_size(vectors, rows, dim)
    if route.datatype == "FP32":
        return vectors, finite_runs(vectors, rows, dim, most_bad)
    with np.errstate(over="ignore"):  # told row by row
        sent = np.frombuffer(vectors, FLOAT32).astype(NUMPY_TYPES[route.datatype])
    return sent.tobytes(), finite_runs(vectors, rows, dim, most_bad, sent)


def to_blocks(
    route: Route, index: int, vectors: bytes, runs: Sequence[Run], terms: Terms, recipient: Recipient
) -> Iterator[Block]:
    """A core block for each good run of rows as they are sent."""
    row_bytes = route.key.row_bytes
    for run in runs:
        if run.error is None:
            whole = len(runs) == 1
            rows = vectors if whole else vectors[run.first * row_bytes : (run.first + run.rows) * row_bytes]
            times, whose = (terms.arrived_at, terms.deadline), (terms.tenant, terms.is_batch_class)
            yield Block(
                route.key, index, run.first, run.rows, (rows,), row_bytes, *times, recipient, *whose, route.wanted
            )


def to_waiting(block: RawBlock, index: int, terms: Terms, recipient: Recipient) -> Block:
    """A block as it came, while nobody knows what its rows are sent as. Raises InvalidArgument for a wrong size."""
    check_size(block.vectors, block.rows, block.dim)
    key = BatchKey(block.model_name, "", block.agent_type, ())
    row_bytes = len(block.vectors) // block.rows
    times, whose = (terms.arrived_at, terms.deadline), (terms.tenant, terms.is_batch_class)
    return Block(key, index, 0, block.rows, (block.vectors,), row_bytes, *times, recipient, *whose)


@dataclass(slots=True)
class NamedBlock:
    """Rows of a unary request that share a model and a length; row n is the agent `names[n]`.

    `route` None: the model is not known yet.
    """

    names: tuple[str, ...]
    raw: RawBlock
    route: Route | None


def from_agents(
    agents: Mapping[str, pb.Agent], routes: Routes, longest_name: int
) -> tuple[list[NamedBlock], dict[str, RouterError]]:
    """Split a request's agents by key; agents that cannot be served come back by name with their error."""
    errors: dict[str, RouterError] = {}
    found: dict[tuple[str, str, int], Route | None] = {}
    routed = []
    for name, agent in agents.items():
        place = agent.agent_type, agent.model_name, len(agent.vector)
        try:
            check_name("an agent's name", name, longest_name)
            found[place] = _find(routes, place)
            routed.append((place, name))
        except RouterError as error:
            errors[name] = error
    blocks = []
    for place, names in partition(routed).items():
        agent_type, model_name, dim = place
        vectors = b"".join([to_bytes(agents[name].vector) for name in names])
        raw = RawBlock(agent_type, model_name, len(names), dim, vectors)
        blocks.append(NamedBlock(tuple(names), raw, found[place]))
    return blocks, errors


def _find(routes: Routes, place: tuple[str, str, int]) -> Route | None:
    try:
        return routes.find(*place)
    except Unlearned:
        return None


def to_bytes(vector: Sequence[float]) -> bytes:
    """float32 little-endian."""
    return np.asarray(vector, FLOAT32).tobytes()


# -- rows out --------------------------------------------------------------------------------------------------------


class VectorOutputs:
    """Answers' rows as float32. A batch is handed out part by part; what was made of it is kept for the next part."""

    def __init__(self) -> None:
        # State: the answer and the wanted output that were asked for last, its data as float32 and bytes per row.
        self._answer: BatchAnswer | None = None
        self._output: str | None = None
        self._data = b""
        self._row_bytes = 0

    def rows(self, answer: BatchAnswer, output: str | None, first: int, rows: int) -> bytes:
        """Rows first .. first + rows - 1 of a batch's answer as float32 little-endian, row-major.

        Raises:
            ModelFailed: the output is missing or cannot be told in floats.
        """
        if answer is not self._answer or output != self._output:
            tensor = _choose(answer.outputs, output)
            self._data = _to_float32(tensor)
            self._row_bytes = len(self._data) // tensor.shape[0]
            self._answer, self._output = answer, output
        width = self._row_bytes
        return self._data[first * width : (first + rows) * width]


def _to_float32(tensor: Tensor) -> bytes:
    if tensor.datatype == "FP32":
        return tensor.data
    if tensor.datatype not in NUMPY_TYPES:
        raise ModelFailed(f"the model's output {tensor.name!r} is {tensor.datatype}, which has no form as floats")
    with np.errstate(over="ignore"):  # an FP64 beyond a float32 is infinite to a native caller
        return np.frombuffer(tensor.data, NUMPY_TYPES[tensor.datatype]).astype(FLOAT32).tobytes()


def _choose(outputs: Sequence[Tensor], name: str | None) -> Tensor:
    wanted = name or "output"
    for tensor in outputs:
        if tensor.name == wanted:
            return tensor
    if name is None:
        return outputs[0]
    found = ", ".join(repr(tensor.name) for tensor in outputs)
    raise ModelFailed(f"the model's answer has no output {name!r}, only {found}")


def explain(part: Part, answer: BatchAnswer) -> pb.Explanation:
    """Where the time of a part's answer went; the batch may have been sent, or answered, before the rows arrived."""
    begun_at = max(answer.dispatched_at, part.block.arrived_at)
    return pb.Explanation(
        queued_s=begun_at - part.block.arrived_at,
        backend_s=max(answer.answered_at - begun_at, 0.0),
        batch_id=answer.batch_id,
        batch_rows=answer.batch_rows,
        replica=answer.replica,
        attempts=part.attempts + 1,
    )
