"""/v2 over HTTP: tritonclient as it comes, and the real router behind the gateway.

`tritonclient` blocks, so it runs in a thread. Where the router's own metadata is not the point, a scripted model server
stands for the router: it speaks the same protocol.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from mock_nn.sentiment import score
from protos.open_inference import open_inference_pb2 as pb
from router_client import RouterClient
from tests.fakes import FakeRouter
from tests.integration.stack import serving, truth
from tests.integration.test_rest_gateway import Gateway, gateway_of, raw_client
from tests.open_inference_server import Abort, OpenInferenceServer, ServedModel, metadata

pytestmark = pytest.mark.anyio

T = TypeVar("T")
NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}


def echo(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """The inputs are the outputs; only those that are asked for, in that order."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    tensors = zip(request.inputs, request.raw_input_contents, strict=True)
    inputs = {tensor.name: (tensor, raw) for tensor, raw in tensors}
    for name in [output.name for output in request.outputs] or list(inputs):
        tensor, raw = inputs[name]
        response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(raw)
    return response


def refuse(_: pb.ModelInferRequest) -> pb.ModelInferResponse:
    raise Abort(grpc.StatusCode.UNKNOWN, "the model raised ValueError")


@pytest.fixture
def models() -> OpenInferenceServer:
    told = metadata("echo", [("x", "FP32", (-1, 2))], [("x", "FP32", (-1, 2))])
    config = pb.ModelConfig(name="echo", max_batch_size=8)
    return OpenInferenceServer(
        {
            "echo": ServedModel(told, echo, config),
            "a/b c": ServedModel(told, echo),
            "sick": ServedModel(told, refuse, is_ready=False),
        }
    )


@pytest.fixture
async def gateway(models: OpenInferenceServer) -> AsyncIterator[Gateway]:
    """A gateway before a router that has these `models`."""
    async with FakeRouter(open_inference=models) as router, RouterClient(router.target) as client:
        assert await client.wait_connected(20)
        async with gateway_of(client) as gateway:
            yield gateway


@asynccontextmanager
async def gateway_and_router(**settings: object) -> AsyncIterator[Gateway]:
    """A gateway before a real router and its mock."""
    async with serving(**settings) as stack, RouterClient(stack.router.address) as client:  # type: ignore[arg-type]
        assert await client.wait_connected(20)
        async with gateway_of(client) as gateway:
            yield gateway


async def ask(gateway: Gateway, work: Callable[[triton.InferenceServerClient], T]) -> T:
    """What `work` gets out of tritonclient."""

    def run() -> T:
        with triton.InferenceServerClient(f"{gateway.host}:{gateway.port}") as client:
            return work(client)

    return await asyncio.to_thread(run)


async def fails(gateway: Gateway, work: Callable[[triton.InferenceServerClient], object]) -> tuple[str | None, str]:
    with pytest.raises(InferenceServerException) as failed:
        await ask(gateway, work)
    return failed.value.status(), failed.value.message()


def tensor(name: str, datatype: str, values: Any, *, binary: bool = True) -> triton.InferInput:  # noqa: ANN401
    array = np.array(values, NUMPY[datatype])
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def asked(name: str, *, binary: bool) -> triton.InferRequestedOutput:
    return triton.InferRequestedOutput(name, binary_data=binary)


# Inference


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("datatype", list(NUMPY))
async def test_every_datatype_survives_in_both_forms(
    gateway: Gateway, datatype: str, binary_in: bool, binary_out: bool
) -> None:
    values: list[list[Any]] = [["für", ""], ["a:b", '{"c": 1}']] if datatype == "BYTES" else [[0, 1], [1, 1]]
    given = tensor("x", datatype, values, binary=binary_in)
    outputs = [asked("x", binary=binary_out)]
    result = await ask(gateway, lambda client: client.infer("echo", [given], outputs=outputs).as_numpy("x"))
    if datatype == "BYTES":
        values = [[text.encode() for text in row] for row in values] if binary_out else values
    assert result.tolist() == np.array(values, NUMPY[datatype]).tolist()
    assert result.dtype == NUMPY[datatype]


async def test_bf16_travels_in_binary_and_is_refused_in_json(gateway: Gateway) -> None:
    given = triton.InferInput("x", [2], "BF16")
    given._raw_data, given._parameters["binary_data_size"] = b"\x80\x3f\x00\x40", 4  # noqa: SLF001 -- no ml_dtypes here
    raw = await ask(gateway, lambda client: client.infer("echo", [given])._buffer)  # noqa: SLF001
    assert raw == b"\x80\x3f\x00\x40"
    outputs = [asked("x", binary=False)]
    status, message = await fails(gateway, lambda client: client.infer("echo", [given], outputs=outputs))
    assert status == "422"
    assert "is BF16, which JSON does not carry; ask for it with its parameter binary_data: true" in message


async def test_bytes_that_are_no_text_come_back_in_binary_only(gateway: Gateway) -> None:
    given = tensor("x", "BYTES", [b"\xff\x00", b"ok"])
    result = await ask(gateway, lambda client: client.infer("echo", [given]).as_numpy("x"))
    assert result.tolist() == [b"\xff\x00", b"ok"]
    outputs = [asked("x", binary=False)]
    status, message = await fails(gateway, lambda client: client.infer("echo", [given], outputs=outputs))
    assert (status, "bytes that are not UTF-8" in message) == ("422", True)


async def test_nan_is_null_in_json_which_numpy_reads_as_nan(gateway: Gateway) -> None:
    given = tensor("x", "FP32", [np.nan, np.inf, 1])
    outputs = [asked("x", binary=False)]
    result = await ask(gateway, lambda client: client.infer("echo", [given], outputs=outputs).as_numpy("x"))
    np.testing.assert_array_equal(result, np.array([np.nan, np.nan, 1], np.float32))


async def test_several_outputs_come_in_the_order_and_form_they_are_asked_for(gateway: Gateway) -> None:
    inputs = [tensor("a", "INT8", [1]), tensor("b", "BYTES", ["x"], binary=False), tensor("c", "FP64", [0.5])]
    outputs = [asked("c", binary=True), asked("a", binary=False), asked("b", binary=True)]
    result = await ask(gateway, lambda client: client.infer("echo", inputs, outputs=outputs))
    assert [output["name"] for output in result.get_response()["outputs"]] == ["c", "a", "b"]
    assert [result.as_numpy(name).tolist() for name in "abc"] == [[1], [b"x"], [0.5]]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_what_the_client_packs_is_unpacked(gateway: Gateway, algorithm: str) -> None:
    given = tensor("x", "FP32", [1, 2])
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    result = await ask(gateway, lambda client: client.infer("echo", [given], **options).as_numpy("x"))
    assert result.tolist() == [1, 2]


async def test_what_the_client_says_beside_its_tensors_arrives(gateway: Gateway, models: OpenInferenceServer) -> None:
    given = tensor("x", "FP32", [1])
    result = await ask(
        gateway,
        lambda client: client.infer(
            "a/b c", [given], "7", request_id="r-1", priority=2, timeout=5_000_000, parameters={"mine": "text"}
        ).get_response(),
    )
    (request,) = models.requests
    assert (request.model_name, request.model_version, request.id) == ("a/b c", "7", "r-1")
    assert 1_000_000 < request.parameters["timeout"].int64_param <= 5_000_000
    assert (request.parameters["priority"].int64_param, request.parameters["mine"].string_param) == (2, "text")
    assert (result["id"], result["model_version"]) == ("r-1", "1")
    assert "binary_data_output" not in request.parameters


async def test_errors_reach_the_client_in_their_own_words(gateway: Gateway) -> None:
    given = tensor("x", "FP32", [1])
    assert await fails(gateway, lambda client: client.infer("sick", [given])) == ("502", "the model raised ValueError")
    assert await fails(gateway, lambda client: client.infer("none", [given])) == ("404", "unknown model 'none'")
    empty = triton.InferInput("x", [1], "FP32")
    message = 'input "x" must have exactly one of data and the parameter binary_data_size'
    assert await fails(gateway, lambda client: client.infer("echo", [empty])) == ("422", message)
    assert await fails(gateway, lambda client: client.load_model("m")) == ("404", "there is no such route")


# Health and metadata


async def test_health_and_readiness(gateway: Gateway) -> None:
    assert await ask(gateway, lambda client: (client.is_server_live(), client.is_server_ready())) == (True, True)
    ready = await ask(
        gateway, lambda client: [client.is_model_ready(name) for name in ("echo", "sick", "none", "a/b c")]
    )
    assert ready == [True, False, False, True]


async def test_metadata_config_and_index(gateway: Gateway) -> None:
    assert (await ask(gateway, lambda client: client.get_server_metadata()))["name"] == "test"
    tensors = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert await ask(gateway, lambda client: client.get_model_metadata("echo")) == {
        "name": "echo",
        "versions": ["1"],
        "platform": "test",
        "inputs": tensors,
        "outputs": tensors,
    }
    assert (await ask(gateway, lambda client: client.get_model_config("echo")))["max_batch_size"] == 8
    index = await ask(gateway, lambda client: client.get_model_repository_index())
    assert {"name": "sick", "version": "1", "state": "UNAVAILABLE"} in index
    assert await fails(gateway, lambda client: client.get_model_metadata("none")) == ("404", "unknown model 'none'")


# The real router


async def test_rows_of_json_and_binary_callers_are_answered_by_the_mock() -> None:
    rows = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    async with gateway_and_router() as gateway:
        for binary in (True, False):
            given = tensor("vector", "FP32", rows, binary=binary)
            outputs = [asked("output", binary=binary)]
            options: dict[str, Any] = {"outputs": outputs, "parameters": {"agent_type": "a"}}
            result = await ask(gateway, lambda client: client.infer("churn", [given], **options).as_numpy("output"))  # noqa: B023
            assert result.tolist() == pytest.approx(truth("churn", rows))


async def test_texts_are_judged_in_one_request_of_several_outputs() -> None:
    texts = ["This product is amazing!", "I hate it."]
    async with gateway_and_router() as gateway:
        given = tensor("text", "BYTES", texts, binary=False)
        result = await ask(gateway, lambda client: client.infer("sentiment", [given]))
    expected = [score(text) for text in texts]
    assert result.as_numpy("sentiment").tolist() == [label.encode() for label, _ in expected]
    assert result.as_numpy("confidence").tolist() == pytest.approx([confidence for _, confidence in expected])


async def test_the_routers_own_faults_are_told() -> None:
    model = {"match": {"model_name": "churn"}}
    async with gateway_and_router(model=model) as gateway:
        given = tensor("vector", "FP32", [[1, 2]])
        status, message = await fails(gateway, lambda client: client.infer("fraud", [given]))
        assert (status, "fraud" in message) == ("404", True)
        short = triton.InferInput("vector", [2, 2], "FP32")
        short._raw_data, short._parameters["binary_data_size"] = bytes(8), 8  # noqa: SLF001
        status, message = await fails(gateway, lambda client: client.infer("churn", [short]))
        assert (status, "has 8 bytes, which is not FP32[2, 2]" in message) == ("422", True)
        status, message = await fails(gateway, lambda client: client.infer("churn", [given], sequence_id=7))
        assert (status, "sequence" in message) == ("422", True)


# Clients that leave, routers that are away


async def test_a_client_that_leaves_takes_its_request_along(gateway: Gateway, models: OpenInferenceServer) -> None:
    models.may_answer.clear()
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}).encode()
    async with raw_client(gateway) as client:
        head = f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        await client.send(head.encode() + body)
        async with asyncio.timeout(20):
            while not models.requests:  # noqa: ASYNC110 -- the server has no event for it
                await asyncio.sleep(0.001)
        assert len(gateway.open_requests) == 1
        client.vanish()
        async with asyncio.timeout(20):
            while models.lost == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert len(gateway.open_requests) == 0


async def test_a_router_that_is_away_is_waited_for_and_then_a_503() -> None:
    router = FakeRouter()
    async with router:
        pass
    async with RouterClient(router.target, router_wait_s=0.05) as client, gateway_of(client) as gateway:
        given = tensor("x", "FP32", [1])
        status, message = await fails(gateway, lambda triton_client: triton_client.infer("m", [given]))
        assert (status, message) == ("503", "no router took the request in 0.05 s")
        assert await ask(gateway, lambda triton_client: triton_client.is_server_ready()) is False
        async with gateway.http() as http:
            response = await http.get("/v2/models/m")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
