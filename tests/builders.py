"""Small makers of core objects for tests, with defaults that do not matter to the test at hand."""

import struct
from dataclasses import dataclass, field

import numpy as np

from router.core.batch import merge
from router.core.elements import scan
from router.core.types import Batch, BatchAnswer, BatchKey, Block, Part, Tensor, TensorSpec
from router.core.variable import VariableBlock
from router.errors import RouterError

TEXT_KEY = BatchKey("sentiment", "", "", (TensorSpec("text", "BYTES", ()),))


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


def make_texts(
    *texts: str, at: float = 0.0, deadline: float = 60.0, recipient: Listener | None = None
) -> VariableBlock:
    """A block of one text a row."""
    raw = encode_texts(*texts)
    offsets = (scan(raw, len(texts), 1),)
    return VariableBlock(TEXT_KEY, 0, 0, len(texts), (raw,), 0, at, deadline, recipient or Listener(), offsets=offsets)


def encode_texts(*texts: str) -> bytes:
    """The raw contents of a BYTES tensor."""
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def decode_texts(raw: bytes) -> list[str]:
    """The texts in the raw contents of a BYTES tensor."""
    texts = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        texts.append(raw[4:end].decode())
        raw = raw[end:]
    return texts


def texts_of(parts: tuple[Part, ...]) -> list[str]:
    """The texts of some parts, by the way they go to a backend."""
    return decode_texts(merge(make_batch(*parts))[0]) if parts else []


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
