"""MLServer as a backend, called once for each batch: a real network, and a model that waits or fails as a test says."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest

from examples.digits.__main__ import Truth, load
from protos.open_inference import open_inference_pb2 as pb
from router_client import Agent
from tests.acceptance.processes import fixed_ports
from tests.interop.mlserver import DIM, PATIENCE_S, Front, add_model, held, infer_request, read, routed
from tools.mlserver import PYTHON, MLServer, serving, why_missing
from tools.run import ROOT

SYSTEM = "MLServer as a unary backend"

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(bool(why_missing()), reason=why_missing())]


@dataclass(frozen=True, slots=True)
class Served:
    """A running MLServer with a network and two gated models, and a router in front of it."""

    server: MLServer
    front: Front
    truth: Truth
    gated: Path


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = tmp_path_factory.mktemp("mlserver")
    await asyncio.to_thread(_train, directory)
    gated = add_model(directory / "repository", "gated")
    add_model(directory / "repository", "other")
    async with (
        serving(directory / "repository", workers=0, ports=_ports()) as server,
        routed(server.address) as front,
    ):
        yield Served(server, front, load(directory / "test.npz"), gated)


def _train(directory: Path) -> None:
    subprocess.run([PYTHON, ROOT / "examples/digits/train.py", directory], check=True)


def _ports() -> tuple[int, int]:
    grpc_port, rest_port = fixed_ports(2)
    return grpc_port, rest_port


def row(value: float) -> list[float]:
    return [value] * DIM


async def test_a_network_answers_every_image_as_it_does_directly(served: Served) -> None:
    async def ask(image: np.ndarray) -> int:
        response = await served.front.stub.ModelInfer(
            infer_request("digits", "image", image[np.newaxis], ["predict"]), timeout=PATIENCE_S
        )
        return int(read(response)[0])

    predictions = await asyncio.gather(*(ask(image) for image in served.truth.images))
    assert predictions == served.truth.predictions.tolist()


async def test_it_answers_native_agents_too(served: Served) -> None:
    """Their rows come as float32 and go as float32, whatever the model's integers are."""
    agents = {
        f"{number}": Agent(model_name="digits", vector=image.tolist())
        for number, image in enumerate(served.truth.images)
    }
    results = await served.front.native.predict(agents, timeout_s=PATIENCE_S)
    assert [results[name].output for name in agents] == [[digit] for digit in served.truth.predictions.tolist()]


async def test_rows_of_many_callers_share_a_batch(served: Served) -> None:
    before = served.front.count("router_batch_rows_count", backend="mlserver")
    async with held(served.front, served.gated, [row(value) for value in range(32, 64)]) as calls:
        pass
    assert await asyncio.gather(*calls) == [[row(2 * value)] for value in range(32, 64)]
    assert served.front.count("router_batch_rows_count", backend="mlserver") == before + 2


async def test_a_model_that_it_does_not_have_is_not_found(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await served.front.ask([row(1)], "nobody")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert "nobody" in (failure.value.details() or "")


async def test_a_models_error_reaches_the_caller_with_its_text(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await served.front.ask([row(13)])
    assert failure.value.code() is grpc.StatusCode.UNKNOWN
    assert "cannot bear 13" in (failure.value.details() or "")


async def test_a_bad_row_costs_only_itself(served: Served) -> None:
    """At MLServer itself all eight fail: it knows no errors of single rows."""
    values = [1, 10, 11, 12, 13, 14, 15, 16, 17]
    async with held(served.front, served.gated, [row(value) for value in values]) as calls:
        pass
    answers = dict(zip(values, await asyncio.gather(*calls, return_exceptions=True), strict=True))
    failure = answers.pop(13)
    assert isinstance(failure, grpc.aio.AioRpcError)
    assert failure.code() is grpc.StatusCode.UNKNOWN
    assert answers == {value: [row(2 * value)] for value in values if value != 13}


async def test_callers_who_want_different_outputs_each_get_theirs(served: Served) -> None:
    """Asked for nothing in particular its runtimes answer one output; who asks the router so gets all that are told."""
    values = np.array([row(5)], "<f4")
    stub = served.front.stub
    async with held(served.front, served.gated, [row(1)]):
        calls = [
            stub.ModelInfer(infer_request("gated", "x", values, outputs), timeout=PATIENCE_S)
            for outputs in (["y"], ["z"], ["z", "y"], [])
        ]
        asked = [asyncio.ensure_future(_outputs(call)) for call in calls]
        await served.front.until("router_queued_rows", 4)
    assert await asyncio.gather(*asked) == [{"y": 10}, {"z": 15}, {"z": 15, "y": 10}, {"y": 10, "z": 15}]


async def _outputs(call: "grpc.aio.UnaryUnaryCall[pb.ModelInferRequest, pb.ModelInferResponse]") -> dict[str, float]:
    response = await call
    return {
        output.name: float(np.frombuffer(data, "<f4")[0])
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }


async def test_its_metadata_is_read(served: Served) -> None:
    stub = served.front.stub
    told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="gated"), timeout=PATIENCE_S)
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in (*told.inputs, *told.outputs)] == [
        ("x", "FP32", [-1, DIM]),
        ("y", "FP32", [-1, DIM]),
        ("z", "FP32", [-1, DIM]),
    ]
    assert told.platform == "test"


async def test_requests_are_checked_by_its_metadata(served: Served) -> None:
    batches = served.front.count("router_batch_rows_count", backend="mlserver")
    for name, width in (("nothing", DIM), ("x", DIM + 1)):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await served.front.stub.ModelInfer(
                infer_request("gated", name, np.ones((1, width), "<f4")), timeout=PATIENCE_S
            )
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert served.front.count("router_batch_rows_count", backend="mlserver") == batches


async def test_a_model_that_is_unloaded_is_not_ready_until_it_is_loaded_again(served: Served) -> None:
    """Told over MLServer's own repository API."""
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        for step, is_ready, state in (("unload", False, "UNAVAILABLE"), ("load", True, "READY")):
            url = f"http://{served.server.rest_address}/v2/repository/models/other/{step}"
            (await client.post(url)).raise_for_status()
            ready = await served.front.stub.ModelReady(pb.ModelReadyRequest(name="other"), timeout=PATIENCE_S)
            index = await served.front.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=PATIENCE_S)
            assert (ready.ready, {model.name: model.state for model in index.models}["other"]) == (is_ready, state)
    assert await served.front.ask([row(3)], "other") == [row(6)]


async def test_rows_outlive_the_server(tmp_path: Path) -> None:
    """Killed with a row at the model and others waiting; what comes in its place computes them all."""
    folder = add_model(tmp_path, "gated")
    ports = _ports()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tmp_path, workers=0, ports=ports))
        front = await stack.enter_async_context(routed(server.address))
        async with held(front, folder, [row(value) for value in range(8)]) as calls:
            await server.program.end()
        async with serving(tmp_path, workers=0, ports=ports):
            assert await asyncio.gather(*calls) == [[row(2 * value)] for value in range(8)]
