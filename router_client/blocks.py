"""Agents to blocks and answers back to agents. Pure: bytes and protobuf; no stream, loop or clock.

The router knows rows, not agents. `group` sorts named agents into columnar blocks, one per agent type, model and vector
length, and returns the names in the order of the rows; the names never leave the process. A `Roster` (for answers as
they come) or `spread` (for all of them) turns answers back into names:

    blocks, names = group([("ann", "nn", "m1", b"....")])
    for name, outcome, explanation in spread(await client.infer(blocks), names): ...

Both give every agent exactly one outcome, whatever the router sends: an answer that does not fit (an unknown block,
rows outside of it or answered before, bytes that are no matrix) fails the agents that are still open with INTERNAL,
because a guess could hand one agent the output of another.
"""

import struct
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client.errors import AgentError, ProtocolError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FLOAT_BYTES = 4

Row: TypeAlias = "tuple[str, bytes | pb.Error, pb.Explanation | None]"
"""A name, its output as float32 little-endian bytes or its error, and the explanation when the call asked for one."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One named row of a request.

    ``vector`` is a sequence of floats or a one-dimensional float32 array, which is copied as it is.
    """

    model_name: str
    vector: "Sequence[float] | npt.NDArray[np.float32]"
    agent_type: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the time of an answer went; see the message of the same name in the protocol."""

    queued_s: float
    backend_s: float
    batch_id: str
    batch_rows: int
    replica: str
    attempts: int


@dataclass(frozen=True, slots=True)
class AgentResult:
    """The answer for one agent: ``output`` floats, or an error and no output."""

    output: list[float]
    error: AgentError | None = None
    explanation: Explanation | None = None


class Coverage:
    """Which rows of a call are answered: disjoint ranges per block, so that the cost grows with answers, not rows."""

    __slots__ = ("_ranges", "_rows", "rows_left")

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = rows
        self._ranges: list[list[tuple[int, int]]] = [[] for _ in rows]
        self.rows_left = sum(rows)

    def mark(self, block: int, first: int, rows: int) -> None:
        """Note rows ``first .. first + rows - 1`` of ``block`` as answered.

        Raises:
            ProtocolError: there is no such block or row, or one of them was answered before. Nothing is noted then.
        """
        if block >= len(self._rows):
            raise ProtocolError(f"the answer names block {block} of {len(self._rows)}")
        if first + rows > self._rows[block]:
            raise ProtocolError(f"the answer names rows {first}..{first + rows - 1} of {self._rows[block]}")
        ranges = self._ranges[block]
        if not ranges:
            ranges.append((first, first + rows))
            self.rows_left -= rows
            return
        at = bisect_left(ranges, (first, 0))
        if (at and ranges[at - 1][1] > first) or (at < len(ranges) and ranges[at][0] < first + rows):
            raise ProtocolError(f"rows {first}..{first + rows - 1} of block {block} are answered twice")
        ranges.insert(at, (first, first + rows))
        self.rows_left -= rows

    def gaps(self, block: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges ``(first, stop)`` within the given one that are not answered yet, in order."""
        for done_first, done_stop in self._ranges[block]:
            if first < min(done_first, stop):
                yield first, min(done_first, stop)
            first = max(first, done_stop)
        if first < stop:
            yield first, stop


class Roster:
    """Gives the rows of one call their names back, as its answers come in.

    ``names`` holds one list per block, one name per row: what `group` returned.
    """

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        self._names = names
        self._coverage = Coverage([len(block) for block in names])

    @property
    def agents_left(self) -> int:
        """Agents without an outcome so far."""
        return self._coverage.rows_left

    def take(self, answer: pb.Answer) -> list[Row]:
        """Return the outcomes that ``answer`` holds; all that were still open when it is the last or does not fit."""
        try:
            rows = self._named(answer)
        except ProtocolError as exc:
            return self.fail_rest(pb.Error(code="INTERNAL", message=str(exc)))
        if answer.done and self.agents_left:
            rows += self.fail_rest(pb.Error(code="INTERNAL", message="the call ended without an answer for this agent"))
        return rows

    def fail_rest(self, error: pb.Error) -> list[Row]:
        """Return ``error`` for every agent that has no outcome yet."""
        rows: list[Row] = []
        for block, names in enumerate(self._names):
            for first, stop in list(self._coverage.gaps(block, 0, len(names))):
                self._coverage.mark(block, first, stop - first)
                rows += [(name, error, None) for name in names[first:stop]]
        return rows

    def _named(self, answer: pb.Answer) -> list[Row]:
        check_shape(answer)
        if not answer.rows:
            return self.fail_rest(answer.error)
        first, stop = answer.first_row, answer.first_row + answer.rows
        self._coverage.mark(answer.block, first, answer.rows)
        names = self._names[answer.block][first:stop]
        explanation = answer.explanation if answer.HasField("explanation") else None
        if answer.HasField("error"):
            return [(name, answer.error, explanation) for name in names]
        outputs, width = answer.outputs, len(answer.outputs) // answer.rows
        return [(name, outputs[at * width : (at + 1) * width], explanation) for at, name in enumerate(names)]


def group(agents: Iterable[tuple[str, str, str, bytes]]) -> tuple[list[pb.Block], list[list[str]]]:
    """Sort agents ``(name, agent_type, model_name, vector)`` into blocks of one type, model and vector length.

    ``vector`` is float32 little-endian. Blocks come in the order of their first agent, rows in the order of the agents.

    Returns:
        The blocks, and for each block the names of its rows.

    Raises:
        ValueError: a vector's bytes are no whole number of floats, or a text cannot be encoded as UTF-8.
    """
    columns: dict[tuple[str, str, int], tuple[list[str], list[bytes]]] = {}
    for name, agent_type, model_name, vector in agents:
        names, vectors = columns.setdefault((agent_type, model_name, len(vector)), ([], []))
        names.append(name)
        vectors.append(vector)
    blocks = [_block(*key, vectors) for key, (_, vectors) in columns.items()]
    return blocks, [names for names, _ in columns.values()]


def spread(answers: Iterable[pb.Answer], names: Sequence[Sequence[str]]) -> Iterator[Row]:
    """Yield every agent's outcome from all answers of a call; ``names`` as `group` returned them."""
    roster = Roster(names)
    for answer in answers:
        yield from roster.take(answer)
    yield from roster.fail_rest(pb.Error(code="INTERNAL", message="the call ended without an answer for this agent"))


def check_shape(answer: pb.Answer) -> None:
    """Check what can be told from an answer alone: rows with a matrix or an error, or no rows, an error and the end.

    Raises:
        ProtocolError: it is neither.
    """
    if not answer.rows:
        if not (answer.done and answer.HasField("error")):
            raise ProtocolError("an answer without rows must hold an error and be the last")
    elif not answer.HasField("error"):
        size = len(answer.outputs)
        if not size or size % (FLOAT_BYTES * answer.rows):
            raise ProtocolError(f"{size} bytes are no float32 matrix of {answer.rows} rows")


def cut(answer: pb.Answer, first: int, stop: int) -> pb.Answer:
    """Return a copy of ``answer`` with only the rows ``first .. stop - 1`` of its block."""
    piece = pb.Answer()
    piece.CopyFrom(answer)
    if stop - first < answer.rows:
        width = len(answer.outputs) // answer.rows
        at = first - answer.first_row
        piece.outputs = answer.outputs[at * width : (at + stop - first) * width]
        piece.first_row, piece.rows = first, stop - first
    return piece


def pack(vector: "Sequence[float] | npt.NDArray[np.float32]") -> bytes:
    """Return a vector as float32 little-endian bytes.

    Raises:
        ValueError: it is not one-dimensional, not of numbers, or holds one that no float32 can hold.
    """
    raw = _raw_float32(vector)
    if raw is not None:
        return raw
    try:
        return struct.pack(f"<{len(vector)}f", *vector)
    except (struct.error, OverflowError, TypeError) as exc:
        raise ValueError(str(exc)) from exc


def encode(agents: Mapping[str, Agent]) -> tuple[list[pb.Block], list[list[str]], dict[str, AgentResult]]:
    """Return the blocks of all agents that can be sent, their names, and the results of those that cannot.

    A bad agent is INVALID_ARGUMENT alone; its neighbours go on.
    """
    rows: list[tuple[str, str, str, bytes]] = []
    refused: dict[str, AgentResult] = {}
    for name, agent in agents.items():
        try:
            _check_text(agent.agent_type, agent.model_name)
            rows.append((name, agent.agent_type, agent.model_name, pack(agent.vector)))
        except ValueError as exc:
            refused[name] = AgentResult([], AgentError("INVALID_ARGUMENT", str(exc)))
    return *group(rows), refused


def decode(outcome: bytes | pb.Error, explanation: pb.Explanation | None) -> AgentResult:
    """Return what the caller of `predict` sees of one row."""
    explained = _explained(explanation) if explanation is not None else None
    if isinstance(outcome, pb.Error):
        pushback_ms = outcome.retry_pushback_ms if outcome.HasField("retry_pushback_ms") else None
        return AgentResult([], AgentError(outcome.code, outcome.message, pushback_ms), explained)
    return AgentResult(list(struct.unpack(f"<{len(outcome) // FLOAT_BYTES}f", outcome)), None, explained)


def _raw_float32(vector: object) -> bytes | None:
    """Return the memory of a float32 array, None for what must be converted number by number."""
    if isinstance(vector, (list, tuple)):
        return None
    try:
        view = memoryview(vector)  # type: ignore[arg-type]  # whether it has a buffer is the question
    except TypeError:
        return None
    if view.ndim != 1:
        raise ValueError(f"a vector has one dimension, not {view.ndim}")
    return view.tobytes() if view.format == "f" and sys.byteorder == "little" else None


def _block(agent_type: str, model_name: str, row_bytes: int, vectors: list[bytes]) -> pb.Block:
    if row_bytes % FLOAT_BYTES:
        raise ValueError(f"a vector of {row_bytes} bytes is not float32")
    return pb.Block(
        agent_type=agent_type,
        model_name=model_name,
        rows=len(vectors),
        dim=row_bytes // FLOAT_BYTES,
        vectors=b"".join(vectors),
    )


def _check_text(*texts: str) -> None:
    for text in texts:
        text.encode()  # a lone surrogate is a str and no UTF-8


def _explained(explanation: pb.Explanation) -> Explanation:
    return Explanation(
        queued_s=explanation.queued_s,
        backend_s=explanation.backend_s,
        batch_id=explanation.batch_id,
        batch_rows=explanation.batch_rows,
        replica=explanation.replica,
        attempts=explanation.attempts,
    )
