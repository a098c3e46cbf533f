"""A real Triton with models in Python; runs in .venv-triton: `triton_server.py GRPC HTTP METRICS WORKSPACE [MODEL …]`.

scale      batched, at most 16 rows, 20 ms: `features` FP32 [4] -> `scores`, twice as much, and `sums`; 666 fails
loud       batched: `text` BYTES [1] -> `loud`, in capitals
total      takes no batches: `matrix` FP32 [-1, 3] -> `total` [1]
stepwise   decoupled: answers three times

The first three are ports. With models named there are only these, and what PyTriton keeps to itself by default (the
index, loading) stays so.
"""

import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig

# Numbers by tensor name, as PyTriton gives and takes them.
Arrays = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]

SCALE_MAX_BATCH = 16
SCALE_CALL_S = 0.02
BAD_NUMBER = 666.0
BAD_ROW = "this row is beyond me"


@batch
def scale(features):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 -- PyTriton reads the signature
    time.sleep(SCALE_CALL_S)
    if (features[:, 0] == BAD_NUMBER).any():
        raise ValueError(BAD_ROW)
    return {"scores": 2 * features, "sums": features.sum(axis=1, keepdims=True)}


@batch
def loud(text):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return {"loud": np.char.upper(text.astype(np.bytes_)).astype(np.object_)}


def total(requests):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return [{"total": request.data["matrix"].sum(dtype=np.float32).reshape(1)} for request in requests]


def stepwise(requests) -> Iterator[list[Arrays]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    for _ in range(3):
        yield [{"y": request.data["x"]} for request in requests]


def fp32(name: str, *shape: int) -> Tensor:
    return Tensor(name=name, dtype=np.float32, shape=shape)


Spec = tuple[Callable[..., object], list[Tensor], list[Tensor], ModelConfig]
MODELS: dict[str, Spec] = {
    "scale": (
        scale,
        [fp32("features", 4)],
        [fp32("scores", 4), fp32("sums", 1)],
        ModelConfig(max_batch_size=SCALE_MAX_BATCH, batcher=DynamicBatcher()),
    ),
    "loud": (
        loud,
        [Tensor(name="text", dtype=bytes, shape=(1,))],
        [Tensor(name="loud", dtype=bytes, shape=(1,))],
        ModelConfig(max_batch_size=8),
    ),
    "total": (total, [fp32("matrix", -1, 3)], [fp32("total", 1)], ModelConfig(batching=False)),
    "stepwise": (stepwise, [fp32("x", 1)], [fp32("y", 1)], ModelConfig(batching=False, decoupled=True)),
}


def main(ports: list[int], workspace: str, names: list[str]) -> None:
    # Triton's Python is a library that it looks for by itself; a system's one of another patch level cannot run the
    # standard library of this one.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    here, (grpc_port, http_port, metrics_port) = "127.0.0.1", ports
    config = TritonConfig(
        grpc_address=here, grpc_port=grpc_port, http_address=here, http_port=http_port, metrics_port=metrics_port
    )
    security = TritonSecurityConfig(restricted_endpoints=None if names else [])
    with Triton(config=config, workspace=workspace, security_config=security) as triton:
        for name in names or MODELS:
            function, inputs, outputs, model_config = MODELS[name]
            triton.bind(name, function, inputs, outputs, config=model_config)
        triton.run()
        print("triton serves", flush=True, file=sys.stderr)
        signal.pause()


if __name__ == "__main__":
    main([int(port) for port in sys.argv[1:4]], sys.argv[4], sys.argv[5:])
