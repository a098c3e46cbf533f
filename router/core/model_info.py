"""What a backend tells of a model: its tensors, whether it takes batches, whether it is ready."""

from dataclasses import dataclass
from enum import Enum


class ModelState(Enum):
    """Whether a backend serves a model."""

    READY = "ready"
    UNREADY = "not ready"
    ABSENT = "not there"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output as the backend tells it: `shape` whole, -1 for a dimension of any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's metadata. `max_batch_size`: what Triton's configuration says, 0: no batches; None: nobody says."""

    name: str
    platform: str = ""
    versions: tuple[str, ...] = ()
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    max_batch_size: int | None = None
    # A request may have any number of answers.
    is_decoupled: bool = False
    # Requests belong to sequences.
    is_sequence: bool = False


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What a backend has answered about a model; `info` None: it does not tell."""

    state: ModelState
    info: ModelInfo | None = None


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A model of a backend's repository. `state` and `reason` in the backend's words: READY, UNAVAILABLE, ..."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""
