"""The ways in which the witness answers wrongly: each makes of a right answer what is sent instead."""

import asyncio
import time
from typing import TypeAlias

import numpy as np

from protos.open_inference import open_inference_pb2 as pb

Message: TypeAlias = pb.ModelStreamInferResponse
BLOCK_S = 0.5
LARGE_BYTES = 5 * 1024 * 1024


async def _block(right: Message) -> list[Message]:
    time.sleep(BLOCK_S)  # noqa: ASYNC251 -- as model servers do that compute on their loop
    return [right]


async def _never(_: Message) -> list[Message]:
    await asyncio.Event().wait()
    raise AssertionError


async def _twice(right: Message) -> list[Message]:
    return [right, right]


async def _short(right: Message) -> list[Message]:
    response = right.infer_response
    response.outputs[0].shape[0] -= 1
    response.raw_output_contents[0] = response.raw_output_contents[0][:-4]
    return [right]


async def _nan(right: Message) -> list[Message]:
    values = np.frombuffer(right.infer_response.raw_output_contents[0], "<f4").copy()
    values[-1] = np.nan
    right.infer_response.raw_output_contents[0] = values.tobytes()
    return [right]


async def _foreign(right: Message) -> list[Message]:
    right.infer_response.id = "nobody's"
    return [right]


async def _large(right: Message) -> list[Message]:
    right.infer_response.raw_output_contents[0] = bytes(LARGE_BYTES)
    return [right]


async def _well(right: Message) -> list[Message]:
    """The fault is in the wire, for example: only the strike is noted."""
    return [right]


FAULTS = {
    "block": _block,
    "never": _never,
    "twice": _twice,
    "short": _short,
    "nan": _nan,
    "foreign": _foreign,
    "large": _large,
    "trickle": _well,
}
