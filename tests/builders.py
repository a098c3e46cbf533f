"""Small makers of core objects for tests, with defaults that do not matter to the test at hand."""

from dataclasses import dataclass, field

import numpy as np

from router.core.types import Batch, BatchAnswer, BatchKey, Block, Part, Tensor, TensorSpec
from router.errors import RouterError


@dataclass(eq=False)
class Listener:
    """A Recipient that remembers what it was told: answers as (first row, values), failures, expiry."""

    is_closed: bool = False
    answers: list[tuple[int, list[float]]] = field(default_factory=list)
    failures: list[tuple[int, int, RouterError]] = field(default_factory=list)
    has_expired: bool = False

    def answer(self, part: Part, answer: BatchAnswer, offset: int) -> None:
        values = np.frombuffer(answer.outputs[0].rows(offset, part.rows), "<f4").tolist()
        self.answers.append((part.block.first_row + part.first, values))

    def fail(self, part: Part, error: RouterError) -> None:
        self.failures.append((part.block.first_row + part.first, part.rows, error))

    def expire(self) -> None:
        self.has_expired = True
        self.is_closed = True


def make_key(model: str = "m", agent_type: str = "a", dim: int = 1) -> BatchKey:
    return BatchKey(model, "", agent_type, (TensorSpec("vector", "FP32", (dim,)),), (("agent_type", agent_type),))


def make_block(
    *values: float,
    key: BatchKey | None = None,
    at: float = 0.0,
    deadline: float = 60.0,
    recipient: Listener | None = None,
) -> Block:
    """A block of one row per value; a row repeats its value `dim` times."""
    key = key or make_key()
    (dim,) = key.inputs[0].row_shape
    rows = np.repeat(np.array(values, "<f4")[:, None], dim, axis=1).tobytes()
    return Block(key, 0, 0, len(values), (rows,), 4 * dim, at, deadline, recipient or Listener())


def make_batch(*parts: Part, batch_id: str = "b-1") -> Batch:
    return Batch(batch_id, parts[0].block.key, tuple(parts), sum(part.rows for part in parts), 0.0)


def make_answer(batch: Batch, values: list[float], *, at: float = 1.0, name: str = "output") -> BatchAnswer:
    tensor = Tensor(name, "FP32", (len(values),), np.array(values, "<f4").tobytes())
    return BatchAnswer((tensor,), batch.id, batch.rows, "replica:1", 0.0, at)


def values_of(parts: tuple[Part, ...]) -> list[float]:
    """The first value of every row of some parts."""
    rows: list[float] = []
    for part in parts:
        matrix = np.frombuffer(part.block.inputs[0], "<f4").reshape(part.block.rows, -1)
        rows += matrix[part.first : part.first + part.rows, 0].tolist()
    return rows
