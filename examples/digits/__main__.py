"""A real network behind the router: scikit-learn's digits, served by MLServer, asked in every way.

make example-digits

Starts MLServer with the network that train.py has left in var/digits, router and gateway, on free ports; sends each
test image in a request of its own, 64 at a time; and prints how many were read right, beside what the network says
without any of this. Exit status: 0 when all predictions are the same, 1 otherwise.
"""

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc.aio
import httpx
import numpy as np
from numpy.typing import NDArray

from bench.processes import BenchError
from bench.systems import ANY_PORT, BatchCount, Launcher, System, address_of
from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from tools.mlserver import serving

HERE = Path(__file__).resolve().parent
DIRECTORY = HERE.parent.parent / "var" / "digits"
CALLERS = 64
TIMEOUT_S = 60.0
OUTPUT = "predict"

Images: TypeAlias = NDArray[np.float32]
Digits: TypeAlias = NDArray[np.int64]
Ask: TypeAlias = Callable[[Images], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Truth:
    """What was kept back from the training: images, what they show, and what the network itself says."""

    images: Images
    labels: Digits
    predictions: Digits

    def accuracy(self, predictions: Digits) -> float:
        return float((predictions == self.labels).mean())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back on one way, and the batches that the router made of it."""

    way: str
    predictions: Digits
    batches: BatchCount


def main() -> int:
    """Ask and compare."""
    try:
        truth = load(DIRECTORY / "test.npz")
        outcomes = asyncio.run(_ask_all(truth.images))
    except BenchError as exc:
        print(f"example-digits: {exc}", file=sys.stderr)
        return 1
    print(_table(truth, outcomes))
    return 0 if all((outcome.predictions == truth.predictions).all() for outcome in outcomes) else 1


def load(file: Path) -> Truth:
    """What train.py has left."""
    with np.load(file) as test:
        return Truth(test["images"], test["labels"], test["predictions"])


async def _ask_all(images: Images) -> list[Outcome]:
    """Every image on every way; what is started here is ended here."""
    async with AsyncExitStack() as stack:
        launcher = Launcher(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="digits-"))))
        print("starting MLServer, router and gateway")
        server = await stack.enter_async_context(serving(DIRECTORY / "repository"))
        system = await _start(launcher, server.address)
        assert system.router is not None
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(await address_of(system.router), [("grpc.enable_http_proxy", 0)])
        )
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{system.address}", timeout=TIMEOUT_S, trust_env=False)
        )
        ways: dict[str, Ask] = {
            "POST /predict": _Predict(client),
            "gRPC ModelInfer": _Grpc(pb_grpc.GRPCInferenceServiceStub(channel)),
            "POST /v2/models/digits/infer": _Rest(client),
        }
        return [await _ask_each(way, ask, images, system) for way, ask in ways.items()]


async def _start(launcher: Launcher, backend: str) -> System:
    """The example's own settings, but for the addresses."""
    router = await launcher.start(
        *("router", "router", "--config", str(HERE / "router.yaml")),
        ROUTER_LISTEN=ANY_PORT,
        ROUTER_METRICS=ANY_PORT,
        ROUTER_BACKENDS__MLSERVER__ADDRESSES=f'["{backend}"]',
    )
    metrics_url = (await router.wait_for(r"metrics on (\S+)"))[1]
    gateway = await launcher.start(
        "gateway", "rest_gateway", GATEWAY_LISTEN=ANY_PORT, GATEWAY_ROUTER=await address_of(router)
    )
    return System("rest", await address_of(gateway), router, gateway, metrics_url=metrics_url)


async def _ask_each(way: str, ask: Ask, images: Images, system: System) -> Outcome:
    """One image a request."""
    print(f"asking by {way}")
    seats = asyncio.Semaphore(CALLERS)

    async def ask_one(image: Images) -> int:
        async with seats:
            return await ask(image)

    before = await system.count_batches()
    try:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask_one(image), name=f"image {n}") for n, image in enumerate(images)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    after = await system.count_batches()
    assert before is not None
    assert after is not None
    batches = BatchCount(after.batches - before.batches, after.rows - before.rows)
    return Outcome(way, np.array([task.result() for task in asked]), batches)


class _Predict:
    """The router's own API: an image is an agent."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(self, image: Images) -> int:
        agents = {"image": {"model_name": "digits", "vector": image.tolist()}}
        response = await self._client.post("/predict", json={"agents": agents})
        _check(response)
        return int(response.json()["results"]["image"]["output"][0])


class _Rest:
    """The Open Inference Protocol in JSON."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(self, image: Images) -> int:
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, len(image)], "data": image.tolist()}
        response = await self._client.post(
            "/v2/models/digits/infer", json={"inputs": [tensor], "outputs": [{"name": OUTPUT}]}
        )
        _check(response)
        return int(np.ravel(response.json()["outputs"][0]["data"])[0])


class _Grpc:
    """The Open Inference Protocol over gRPC."""

    def __init__(self, stub: "pb_grpc.GRPCInferenceServiceAsyncStub") -> None:
        self._stub = stub

    async def __call__(self, image: Images) -> int:
        request = pb.ModelInferRequest(
            model_name="digits",
            inputs=[pb.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=[1, len(image)])],
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=OUTPUT)],
            raw_input_contents=[image.astype("<f4").tobytes()],
        )
        try:
            response = await self._stub.ModelInfer(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise BenchError(f"{error.code().name}: {error.details()}") from error
        return int(np.frombuffer(response.raw_output_contents[0], "<i8")[0])


def _check(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        raise BenchError(f"{response.request.url.path}: {response.status_code} {response.text}")


def _table(truth: Truth, outcomes: Sequence[Outcome]) -> str:
    """A line per way."""
    lines = [
        f"\n{len(truth.labels)} images that the network has not seen, one a request, {CALLERS} requests at a time\n",
        f"{'':30}{'accuracy':>9}{'like directly computed':>25}{'batches':>9}{'images a batch':>16}",
        f"{'directly computed':30}{truth.accuracy(truth.predictions):9.2%}",
    ]
    for outcome in outcomes:
        same = int((outcome.predictions == truth.predictions).sum())
        lines.append(
            f"{outcome.way:30}{truth.accuracy(outcome.predictions):9.2%}{f'{same} of {len(truth.labels)}':>25}"
            f"{outcome.batches.batches:9.0f}{outcome.batches.rows / max(outcome.batches.batches, 1):16.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
