"""Numbers of every datatype as a client has them, their extremes among them."""

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

# Of any datatype: what a test sends must come back bit by bit.
Array: TypeAlias = npt.NDArray[Any]

# numpy's type and three values per row, for the datatypes of the protocol.
_SAMPLES: dict[str, tuple[Any, list[object]]] = {
    "BOOL": (np.bool_, [True, False, True]),
    "UINT8": (np.uint8, [0, 7, 2**8 - 1]),
    "UINT16": (np.uint16, [0, 7, 2**16 - 1]),
    "UINT32": (np.uint32, [0, 7, 2**32 - 1]),
    "UINT64": (np.uint64, [0, 7, 2**64 - 1]),
    "INT8": (np.int8, [-(2**7), 0, 2**7 - 1]),
    "INT16": (np.int16, [-(2**15), 0, 2**15 - 1]),
    "INT32": (np.int32, [-(2**31), 0, 2**31 - 1]),
    "INT64": (np.int64, [-(2**63), 0, 2**63 - 1]),
    "FP16": (np.float16, [-65504.0, 6e-8, 0.1]),
    "BF16": (ml_dtypes.bfloat16, [-3e38, 1e-38, 0.1]),
    "FP32": (np.float32, [-3.4e38, 1e-45, 0.1]),
    "FP64": (np.float64, [-1.7e308, 5e-324, 0.1]),
    "BYTES": (np.object_, [b"", "I ❤ 名前".encode(), b"a\0b"]),
}
DATATYPES = list(_SAMPLES)


def sample(datatype: str, rows: int) -> Array:
    """(rows, 3) of a datatype, each row different from the one before it."""
    dtype, values = _SAMPLES[datatype]
    return np.stack([np.roll(np.array(values, dtype), row) for row in range(rows)])


def vectors(rows: int, dim: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    """(rows, dim) float32, drawn."""
    return np.random.default_rng(seed).uniform(-9, 9, (rows, dim)).astype(np.float32)


def are_equal(one: Array, other: Array) -> bool:
    """Bit by bit, and of one shape."""
    if one.dtype == np.object_ or other.dtype == np.object_:
        return one.shape == other.shape and one.tolist() == other.tolist()
    return one.shape == other.shape and one.tobytes() == other.tobytes()
