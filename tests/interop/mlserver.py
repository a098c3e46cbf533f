"""MLServer with models for tests, and a router of this process in front of it."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router.config import Settings
from router.server import RouterServer
from router_client import RouterClient

RUNTIME = Path(__file__).with_name("mlserver_model.py")
DIM = 4
PATIENCE_S = 60.0
Answers: TypeAlias = list[list[float]]
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


def add_model(repository: Path, name: str) -> Path:
    """A gated model, its gate open; its folder."""
    folder = repository / name
    folder.mkdir(parents=True)
    shutil.copy(RUNTIME, folder)
    settings = {
        "name": name,
        "implementation": f"{RUNTIME.stem}.GatedModel",
        "platform": "test",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, DIM]}],
        "outputs": [{"name": output, "datatype": "FP32", "shape": [-1, DIM]} for output in ("y", "z")],
    }
    (folder / "model-settings.json").write_text(json.dumps(settings))
    open_gate(folder)
    return folder


def close_gate(folder: Path) -> None:
    """From now on what the model gets waits."""
    (folder / "gate").unlink()


def open_gate(folder: Path) -> None:
    """What waits goes on."""
    (folder / "gate").touch()


@dataclass(frozen=True, slots=True)
class Front:
    """A router in front of MLServer, as callers and tests see it."""

    router: RouterServer
    stub: "pb_grpc.GRPCInferenceServiceAsyncStub"
    native: RouterClient

    async def ask(self, rows: Sequence[Sequence[float]], model: str = "gated") -> Answers:
        """The rows' answers; raises grpc.aio.AioRpcError."""
        values = np.array(rows, "<f4")
        response = await self.stub.ModelInfer(infer_request(model, "x", values, ["y"]), timeout=PATIENCE_S)
        (output,) = response.outputs
        answers: Answers = read(response).reshape(output.shape).tolist()
        return answers

    def count(self, name: str, **labels: str) -> float:
        """A figure of the router's metrics."""
        return self.router.metrics.registry.get_sample_value(name, labels) or 0.0

    async def until(self, name: str, value: float, **labels: str) -> None:
        """Return when a figure has a value; what brings it there has no event to wait for."""
        async with asyncio.timeout(PATIENCE_S):
            while self.count(name, **labels) != value:  # noqa: ASYNC110
                await asyncio.sleep(0)


@asynccontextmanager
async def held(
    front: Front, folder: Path, rows: Sequence[Sequence[float]]
) -> AsyncIterator[list["asyncio.Task[Answers]"]]:
    """Each row's call, the first at a model whose gate is closed, the others behind it in one queue.

    The gate opens at the end of the block, or in it.
    """
    close_gate(folder)
    batches = front.count("router_batch_rows_count", backend="mlserver")
    first, *others = rows
    tasks = [asyncio.create_task(front.ask([first], folder.name), name="first")]
    await front.until("router_batch_rows_count", batches + 1, backend="mlserver")
    tasks += [asyncio.create_task(front.ask([row], folder.name), name=f"row {row}") for row in others]
    await front.until("router_queued_rows", len(others))
    try:
        yield tasks
    finally:
        open_gate(folder)


def infer_request(model: str, name: str, values: NDArray[Any], outputs: Sequence[str] = ()) -> pb.ModelInferRequest:
    """One FP32 input, raw."""
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=values.shape)],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=output) for output in outputs],
        raw_input_contents=[values.astype("<f4").tobytes()],
    )


def read(response: pb.ModelInferResponse) -> NDArray[Any]:
    """The first output's values."""
    kinds = {"FP32": "<f4", "INT64": "<i8"}
    return np.frombuffer(response.raw_output_contents[0], kinds[response.outputs[0].datatype])


@asynccontextmanager
async def routed(address: str) -> AsyncIterator[Front]:
    """One slot, so that what a gate holds back shares the next batch."""
    settings = {
        "listen": "127.0.0.1:0",
        "metrics": None,
        "drain_delay_s": 0.0,
        "log_requests": "off",
        "backends": {"mlserver": {"addresses": [address], "protocol": "unary", "max_in_flight": 1}},
        # Which tensors native rows travel in, the models' metadata tells.
        "models": [{"backend": "mlserver"}],
    }
    router = RouterServer(Settings(**settings))  # type: ignore[arg-type]
    await router.start()
    try:
        async with (
            grpc.aio.insecure_channel(router.address, CHANNEL_OPTIONS) as channel,
            RouterClient(router.address) as native,
        ):
            yield Front(router, pb_grpc.GRPCInferenceServiceStub(channel), native)
    finally:
        await router.stop()
