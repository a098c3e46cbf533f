"""Models of every kind behind the Open Inference Protocol, as a process: `python -m tests.interop.model_server`.

echo_<datatype>  `x` [-1, 3] of that datatype comes back as `y`
combine          `a` FP32 [-1, 2], `b` INT64 [-1, 1], `name` BYTES [-1] -> `sum` FP32, `product` FP64, `label` BYTES
picky            doubles; a row that begins with 666 is refused
whole            takes no batches: `x` [-1, 3] -> `total` [1]
decoupled        answers more than once
headless         takes batches, but its output does not carry them
resting          is not ready
"""

import asyncio
import sys
from collections.abc import Sequence

import grpc
import numpy as np

from protos.open_inference import open_inference_pb2 as pb
from tests.interop.values import DATATYPES
from tests.open_inference_server import Abort, OpenInferenceServer, ServedModel, double, metadata

BAD_NUMBER = 666.0
BAD_ROW = "this row is beyond me"


def echo(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """The only input as `y`."""
    tensor = request.inputs[0]
    response = _response(request)
    response.outputs.add(name="y", datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.append(request.raw_input_contents[0])
    return response


def combine(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Sum and product of two inputs, and the third in capitals: those that are asked for, in their own order."""
    raw = {tensor.name: contents for tensor, contents in zip(request.inputs, request.raw_input_contents, strict=True)}
    rows = request.inputs[0].shape[0]
    a = np.frombuffer(raw["a"], "<f4").reshape(rows, 2)
    b = np.frombuffer(raw["b"], "<i8").reshape(rows, 1)
    answers = {
        "sum": ("FP32", [rows, 2], (a + b).astype("<f4").tobytes()),
        "product": ("FP64", [rows, 2], (a.astype("<f8") * b).tobytes()),
        "label": ("BYTES", [rows], raw["name"].upper()),
    }
    asked = [output.name for output in request.outputs] or list(answers)
    response = _response(request)
    for name in (name for name in answers if name in asked):
        datatype, shape, contents = answers[name]
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(contents)
    return response


def picky(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Twice the input, unless a row begins with the bad number."""
    if (_matrix(request)[:, 0] == BAD_NUMBER).any():
        raise Abort(grpc.StatusCode.INTERNAL, BAD_ROW)
    return double(request)


def total(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """The sum of all numbers, [1]."""
    response = _response(request)
    response.outputs.add(name="total", datatype="FP32", shape=[1])
    response.raw_output_contents.append(_matrix(request).sum(dtype="<f4").tobytes())
    return response


def _matrix(request: pb.ModelInferRequest) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.frombuffer(request.raw_input_contents[0], "<f4").reshape(list(request.inputs[0].shape))


def _response(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)


def _echo_models() -> dict[str, ServedModel]:
    shape: Sequence[int] = (-1, 3)
    return {
        f"echo_{datatype}": ServedModel(
            metadata(f"echo_{datatype}", [("x", datatype, shape)], [("y", datatype, shape)]), echo
        )
        for datatype in DATATYPES
    }


def models() -> dict[str, ServedModel]:
    """All models by name."""
    x, y = ("x", "FP32", (-1, 3)), ("y", "FP32", (-1, 3))
    inputs = [("a", "FP32", (-1, 2)), ("b", "INT64", (-1, 1)), ("name", "BYTES", (-1,))]
    outputs = [("sum", "FP32", (-1, 2)), ("product", "FP64", (-1, 2)), ("label", "BYTES", (-1,))]
    decoupled = pb.ModelConfig(name="decoupled", max_batch_size=8)
    decoupled.model_transaction_policy.decoupled = True
    return _echo_models() | {
        "combine": ServedModel(metadata("combine", inputs, outputs), combine),
        "picky": ServedModel(metadata("picky", [x], [y]), picky),
        "whole": ServedModel(
            metadata("whole", [x], [("total", "FP32", (1,))]), total, pb.ModelConfig(name="whole", max_batch_size=0)
        ),
        "decoupled": ServedModel(metadata("decoupled", [x], [y]), config=decoupled),
        "headless": ServedModel(metadata("headless", [x], [("y", "FP32", (3,))])),
        "resting": ServedModel(metadata("resting", [x], [y]), is_ready=False),
    }


async def main() -> None:
    """Serve until killed."""
    async with OpenInferenceServer(models()) as server:
        print(f"listening on {server.address}", file=sys.stderr, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
