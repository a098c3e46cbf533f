"""`ModelInfer` of the Open Inference Protocol, over real gRPC, against the mock's functions."""

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from mock_nn.config import parse_fault
from mock_nn.sentiment import score
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as native_pb
from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from tests.builders import decode_texts, encode_texts
from tests.integration.stack import Gate, Stack, mock_config, open_channel, serving, truth

pytestmark = pytest.mark.anyio

Stub: TypeAlias = "pb_grpc.GRPCInferenceServiceAsyncStub"

MIB = 1024 * 1024
SERVICE = "inference.GRPCInferenceService"


@asynccontextmanager
async def serving_texts(
    *mocks: MockServer, model: Mapping[str, object] | None = None, max_in_flight: int = 4, **changes: object
) -> AsyncIterator[tuple[Stack, Stub]]:
    """A stack and its Open Inference front."""
    async with (
        serving(*mocks, model=model, max_in_flight=max_in_flight, **changes) as stack,
        open_channel(stack.router.address) as channel,
    ):
        yield stack, pb_grpc.GRPCInferenceServiceStub(channel)


def tensor(
    name: str, datatype: str, shape: Sequence[int], contents: pb.InferTensorContents | None = None
) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=contents)


def texts(*values: str, outputs: Sequence[str] = (), **parameters: int | str) -> pb.ModelInferRequest:
    """Texts for the model `sentiment`, raw."""
    request = pb.ModelInferRequest(
        model_name="sentiment",
        inputs=[tensor("text", "BYTES", [len(values)])],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[encode_texts(*values)],
    )
    return with_parameters(request, parameters)


def vectors(
    *rows: Sequence[float], model: str = "churn", name: str = "vector", **parameters: int | str
) -> pb.ModelInferRequest:
    matrix = np.array(rows, "<f4")
    request = pb.ModelInferRequest(
        model_name=model, inputs=[tensor(name, "FP32", matrix.shape)], raw_input_contents=[matrix.tobytes()]
    )
    return with_parameters(request, parameters)


def with_parameters(request: pb.ModelInferRequest, parameters: Mapping[str, int | str]) -> pb.ModelInferRequest:
    for name, value in parameters.items():
        if isinstance(value, int):
            request.parameters[name].int64_param = value
        else:
            request.parameters[name].string_param = value
    return request


def labels(response: pb.ModelInferResponse) -> list[tuple[str, float]]:
    """What the answer says of each text."""
    raw = {
        output.name: contents for output, contents in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    confidences = np.frombuffer(raw["confidence"], "<f4").tolist()
    return list(zip(decode_texts(raw["sentiment"]), confidences, strict=True))


def said_of(*values: str) -> list[tuple[str, float]]:
    return [(label, float(np.float32(confidence))) for label, confidence in map(score, values)]


async def fails(stub: Stub, request: pb.ModelInferRequest, rpc_s: float | None = None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.ModelInfer(request, timeout=rpc_s)
    return failed.value


# Texts


async def test_texts_of_several_callers_share_one_batch_and_each_gets_its_own_answer() -> None:
    gate = Gate()
    async with serving_texts(gate.mock(), max_in_flight=1) as (stack, stub):
        first = asyncio.ensure_future(stub.ModelInfer(texts("alone")))
        await stack.mock.wait_for_arrivals(1)
        asked = [[f"I love it {number} times", "I hate it"][: 1 + number % 2] for number in range(20)]
        calls = [asyncio.ensure_future(stub.ModelInfer(texts(*values))) for values in asked]
        await stack.until_queued(30)
        gate.open()
        assert [labels(await call) for call in calls] == [said_of(*values) for values in asked]
        assert labels(await first) == said_of("alone")
        assert [batch.rows for batch in stack.mock.batches] == [1, 30]


async def test_a_request_larger_than_a_batch_is_put_together_again_in_its_order() -> None:
    async with serving_texts(model={"max_batch_size": 8}) as (stack, stub):
        values = [["good", "bad", "so so", "excellent!"][number % 4] + " " * number for number in range(20)]
        assert labels(await stub.ModelInfer(texts(*values))) == said_of(*values)
        assert sorted(batch.rows for batch in stack.mock.batches) == [4, 8, 8]


async def test_a_batch_of_texts_closes_at_its_bytes_too() -> None:
    async with serving_texts(model={"max_batch_bytes": 100}) as (stack, stub):
        values = ["x" * 46, "y" * 46, "z", "good" * 20, "bad"]
        assert labels(await stub.ModelInfer(texts(*values))) == said_of(*values)
        assert sorted(batch.rows for batch in stack.mock.batches) == [2, 3]


async def test_empty_texts_and_unicode_arrive_as_they_are() -> None:
    async with serving_texts() as (_, stub):
        values = ["", "I ❤ 名前", "\0", "ü" * 1000, ""]
        assert labels(await stub.ModelInfer(texts(*values))) == said_of(*values)


async def test_a_text_of_1_mib_travels_among_short_ones() -> None:
    async with serving_texts() as (stack, stub):
        values = ["good", "x" * MIB, "bad"]
        assert labels(await stub.ModelInfer(texts(*values))) == said_of(*values)
        assert stack.count("router_rows_total") == 3


async def test_the_id_is_echoed_and_every_output_raw() -> None:
    async with serving_texts() as (_, stub):
        request = texts("good")
        request.id, request.model_version = "request 7", "1"
        response = await stub.ModelInfer(request)
        assert (response.id, response.model_name, response.model_version) == ("request 7", "sentiment", "1")
        assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
            ("sentiment", "BYTES", [1]),
            ("confidence", "FP32", [1]),
        ]
        assert not any(output.HasField("contents") for output in response.outputs)


async def test_outputs_that_are_asked_for_come_in_their_order_and_share_the_batch() -> None:
    gate = Gate()
    async with serving_texts(gate.mock(), max_in_flight=1) as (stack, stub):
        first = asyncio.ensure_future(stub.ModelInfer(texts("first")))
        await stack.mock.wait_for_arrivals(1)
        wanted: list[tuple[str, ...]] = [("confidence",), ("confidence", "sentiment"), ()]
        calls = [asyncio.ensure_future(stub.ModelInfer(texts("good", outputs=names))) for names in wanted]
        await stack.until_queued(3)
        gate.open()
        found = [tuple(output.name for output in (await call).outputs) for call in calls]
        assert found == [("confidence",), ("confidence", "sentiment"), ("sentiment", "confidence")]
        await first
        assert [batch.rows for batch in stack.mock.batches] == [1, 3]


async def test_an_output_that_the_model_has_not_is_refused_before_anything_waits() -> None:
    async with serving_texts() as (stack, stub):
        error = await fails(stub, texts("good", outputs=("score",)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "the model has no output 'score', only 'sentiment', 'confidence'"
        assert stack.mock.arrived == 0


async def test_typed_texts_are_the_same_as_raw_ones() -> None:
    async with serving_texts() as (_, stub):
        contents = pb.InferTensorContents(bytes_contents=[b"", "名前".encode(), b"good"])
        request = pb.ModelInferRequest(model_name="sentiment", inputs=[tensor("text", "BYTES", [3], contents)])
        assert labels(await stub.ModelInfer(request)) == said_of("", "名前", "good")


# Vectors


async def test_rows_of_native_and_open_inference_callers_share_one_batch() -> None:
    gate = Gate()
    async with serving_texts(gate.mock(), max_in_flight=1) as (stack, stub):
        first = asyncio.ensure_future(stub.ModelInfer(vectors([0, 0], agent_type="a")))
        await stack.mock.wait_for_arrivals(1)
        agents = {"x": native_pb.Agent(model_name="churn", agent_type="a", vector=[1, 2])}
        native = asyncio.ensure_future(stack.stub.Predict(native_pb.PredictRequest(agents=agents)))
        ours = asyncio.ensure_future(stub.ModelInfer(vectors([3, 4], [5, 6], agent_type="a")))
        other = asyncio.ensure_future(stub.ModelInfer(vectors([3, 4], agent_type="b")))
        await stack.until_queued(4)
        gate.open()
        assert list((await native).results["x"].output) == truth("churn", [[1, 2]])
        response = await ours
        assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == truth("churn", [[3, 4], [5, 6]])
        assert list(response.outputs[0].shape) == [2]
        response = await other
        assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == truth("churn", [[3, 4]], "b")
        await first
        assert sorted(batch.rows for batch in stack.mock.batches) == [1, 1, 3]


async def test_wide_outputs_of_a_split_request_are_joined_by_row() -> None:
    async with serving_texts(MockServer(mock_config(output_width=3)), model={"max_batch_size": 4}) as (_, stub):
        rows = [[float(number), 1.0] for number in range(10)]
        response = await stub.ModelInfer(vectors(*rows))
        assert list(response.outputs[0].shape) == [10, 3]
        found = np.frombuffer(response.raw_output_contents[0], "<f4").reshape(10, 3)
        assert found[:, 0].tolist() == truth("churn", rows, "")
        assert found[:, 2].tolist() == pytest.approx([3 * value for value in truth("churn", rows, "")])


async def test_parameters_that_change_the_answer_keep_rows_apart_and_no_others_do() -> None:
    gate = Gate()
    async with serving_texts(gate.mock(), max_in_flight=1) as (stack, stub):
        first = asyncio.ensure_future(stub.ModelInfer(texts("first")))
        await stack.mock.wait_for_arrivals(1)
        requests = [
            texts("a", timeout=20_000_000, priority=2),
            texts("b", triton_enable_empty_final_response=1, headers="h", binary_data_output=1),
            texts("c", classification=3),
            texts("d", temperature=1),
            texts("e", temperature=2),
            texts("f", temperature=1),
        ]
        calls = [asyncio.ensure_future(stub.ModelInfer(request)) for request in requests]
        await stack.until_queued(6)
        gate.open()
        for call in calls:
            await call
        await first
        assert sorted(batch.rows for batch in stack.mock.batches) == [1, 1, 2, 3]


# Bad requests


def raw(data: bytes, rows: int = 1, datatype: str = "BYTES", **fields: object) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        **{  # type: ignore[arg-type]
            "model_name": "sentiment",
            "inputs": [tensor("text", datatype, [rows])],
            "raw_input_contents": [data],
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (raw(b"\x05\0\0\0abc"), "input 'text' is not BYTES[1]: element 0 is cut off"),
        (raw(b"\x01"), "input 'text' is not BYTES[1]: 1 bytes are too few for 1 elements"),
        (raw(encode_texts("a", "b")), "input 'text' is not BYTES[1]: 5 bytes follow the last of 1 elements"),
        (raw(encode_texts("a", "b"), rows=3), "input 'text' is not BYTES[3]: 10 bytes are too few for 3 elements"),
        (raw(struct.pack("<I", 0xFFFFFFFF)), "element 0 is cut off"),
        (raw(bytes(4 * 131_073), rows=131_073), "131073 BYTES elements, at most 131072 are allowed in one request"),
        (raw(encode_texts("a"), rows=2**62), "BYTES elements, at most 131072"),
        (raw(encode_texts("a"), rows=0), "input 'text' has shape [0], must be [rows, ...] with at least 1 each"),
        (raw(encode_texts("a"), rows=-1), "input 'text' has shape [-1]"),
        (raw(bytes(8), rows=2, datatype="FP32"), "input 'text' is FP32; the model wants BYTES"),
        (
            raw(bytes(7), model_name="churn", inputs=[tensor("vector", "FP32", [2, 1])]),
            "input 'vector' has 7 bytes, which is not FP32[2, 1]",
        ),
        (raw(bytes(8), rows=2, datatype="STRING"), "input 'text' has the unknown datatype 'STRING'"),
        (raw(b"", inputs=[]), "the request has no inputs"),
        (raw(b"", model_name=""), "model_name is empty"),
        (raw(b"", model_name="m" * 257), "model_name has 257 characters, at most 256 are allowed"),
        (raw(b"", id="i" * 257), "id has 257 characters"),
        (raw(encode_texts("a"), raw_input_contents=[b"", b""]), "the request has 2 raw contents for 1 inputs"),
        (raw(b"", raw_input_contents=[]), "input 'text' has 0 bytes_contents, which is not BYTES[1]"),
        (
            raw(b"", inputs=[tensor("text", "BYTES", [1], pb.InferTensorContents())]),
            "input 'text' has contents, and the request raw contents",
        ),
        (raw(b"", inputs=[tensor("a", "BYTES", [1])] * 2), "two inputs have the same name"),
        (
            raw(b"", inputs=[tensor("a", "BYTES", [1]), tensor("b", "BYTES", [2])]),
            "input 'b' has 2 rows where 'a' has 1",
        ),
        (texts("a", sequence_id=7), "parameter 'sequence_id': sequences of requests are not supported"),
        (texts("a", timeout=-1), "parameter 'timeout' is -1; it must be a whole number from 0"),
        (texts("a", priority="high"), "parameter 'priority' is 'high'; it must be a whole number from 0"),
        (texts("a", agent_type=7), "parameter 'agent_type' is 7; it must be a text"),
        (texts("a", long="x" * 8192), "parameters take 8208 characters, at most 8192 are allowed"),
        (texts("a", outputs=("x", "x")), "an output is asked for twice"),
    ],
)
async def test_a_bad_request_is_told_and_never_reaches_the_model(request_: pb.ModelInferRequest, message: str) -> None:
    async with serving_texts() as (stack, stub):
        error = await fails(stub, request_)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in str(error.details())
        assert stack.mock.arrived == 0
        assert stack.count("router_requests_total", method="ModelInfer", code="INVALID_ARGUMENT") == 1


@pytest.mark.parametrize("owner", ["input", "output"])
async def test_parameters_that_a_batch_could_not_keep_are_refused(owner: str) -> None:
    request = texts("good", outputs=("sentiment",))
    (request.inputs[0] if owner == "input" else request.outputs[0]).parameters["content_type"].string_param = "str"
    async with serving_texts() as (_, stub):
        error = await fails(stub, request)
        assert "has the parameter 'content_type'; only requests may have parameters here" in str(error.details())


@pytest.mark.parametrize(("width", "is_taken"), [(996, True), (997, False)])
async def test_a_row_over_the_bytes_of_a_batch_is_refused(width: int, is_taken: bool) -> None:
    async with serving_texts(model={"max_batch_bytes": 1000}) as (_, stub):
        request = texts("good", "x" * width)
        if is_taken:
            assert len(labels(await stub.ModelInfer(request))) == 2
        else:
            error = await fails(stub, request)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == "a row of 1001 bytes is over max_batch_bytes = 1000"


async def test_an_unknown_model_is_not_found() -> None:
    async with serving_texts(model={"match": {"model_name": "churn"}}) as (_, stub):
        error = await fails(stub, texts("good"))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.NOT_FOUND,
            "no model 'sentiment' for agent type ''",
        )


async def test_bytes_that_are_no_request_are_their_senders_fault() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"\xff\xff\xff")
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.value.details() == "the request cannot be read as a ModelInferRequest"


async def test_methods_that_are_not_there_are_unimplemented() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/ModelStatistics")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"")
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Failures, deadlines, cancels


async def test_a_model_that_fails_says_so_in_its_own_words() -> None:
    mock = MockServer(mock_config(parse_fault("error:model=sentiment")))
    async with serving_texts(mock) as (stack, stub):
        error = await fails(stub, texts("good"))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNKNOWN,
            "the model failed (a fault on demand)",
        )
        assert stack.count("router_requests_total", method="ModelInfer", code="UNKNOWN") == 1


async def test_one_failed_batch_fails_its_request_and_its_rows_that_wait_are_dropped() -> None:
    gate = Gate()
    config = mock_config(parse_fault("error:first=1,code=NOT_FOUND"), latency_s=1.0)
    mock = MockServer(config, sleep=gate.sleep)
    async with serving_texts(mock, model={"max_batch_size": 2}, max_in_flight=1) as (stack, stub):
        large = asyncio.ensure_future(fails(stub, texts("a", "b", "c", "d", "e")))
        await mock.wait_for_arrivals(1)
        await stack.until_queued(3)
        neighbour = asyncio.ensure_future(stub.ModelInfer(texts("good")))
        await stack.until_queued(4)
        gate.open()
        assert (await large).details() == "the model failed (a fault on demand)"
        assert labels(await neighbour) == said_of("good")
        assert [batch.rows for batch in mock.batches] == [2, 1]


@pytest.mark.parametrize("fault", ["short", "wrong_shape", "wrong_datatype", "missing_output"])
async def test_an_answer_that_does_not_fit_is_never_split(fault: str) -> None:
    async with serving_texts(MockServer(mock_config(parse_fault(f"{fault}:first=1")))) as (_, stub):
        assert (await fails(stub, texts("good", "bad"))).code() is grpc.StatusCode.UNKNOWN
        assert labels(await stub.ModelInfer(texts("good", "bad"))) == said_of("good", "bad")


async def test_texts_whose_stream_is_lost_run_again() -> None:
    async with serving_texts(MockServer(mock_config(parse_fault("drop:first=2")))) as (stack, stub):
        assert labels(await stub.ModelInfer(texts("good", ""))) == said_of("good", "")
        assert [batch.rows for batch in stack.mock.batches] == [2, 2, 1, 1]  # after two losses each row alone


@pytest.mark.parametrize("is_grpc_deadline", [True, False])
async def test_a_deadline_is_kept_while_the_model_is_busy(is_grpc_deadline: bool) -> None:
    gate = Gate()
    async with serving_texts(gate.mock()) as (stack, stub):
        loop = asyncio.get_running_loop()
        started = loop.time()
        request = texts("good") if is_grpc_deadline else texts("good", timeout=200_000)
        error = await fails(stub, request, rpc_s=0.2 if is_grpc_deadline else None)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.17 <= loop.time() - started < 5  # the gate never opens: any end is the deadline
        assert stack.count("router_open_calls") == 0


async def test_a_cancelled_request_leaves_the_queue_and_its_neighbour_is_answered() -> None:
    gate = Gate()
    async with serving_texts(gate.mock(), max_in_flight=1) as (stack, stub):
        first = asyncio.ensure_future(stub.ModelInfer(texts("first")))
        await stack.mock.wait_for_arrivals(1)
        gone = asyncio.ensure_future(stub.ModelInfer(texts("gone", "gone too")))
        stays = asyncio.ensure_future(stub.ModelInfer(texts("good")))
        await stack.until_queued(3)
        gone.cancel()
        await stack.until_queued(1)
        gate.open()
        assert labels(await stays) == said_of("good")
        await first
        assert [batch.rows for batch in stack.mock.batches] == [1, 1]
        assert stack.count("router_requests_total", method="ModelInfer", code="CANCELLED") == 1


async def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    gate = Gate()
    limits = {"max_queued_bytes": 100}
    async with serving_texts(gate.mock(), max_in_flight=1, limits=limits) as (stack, stub):
        first = asyncio.ensure_future(stub.ModelInfer(texts("first")))
        await stack.mock.wait_for_arrivals(1)
        waiting = asyncio.ensure_future(stub.ModelInfer(texts("x" * 90)))
        await stack.until_queued(1)
        error = await fails(stub, texts("seven77"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
        assert stack.count("router_refusals_total", reason="queue_bytes") == 1
        gate.open()
        await asyncio.gather(first, waiting)


async def test_a_router_that_leaves_refuses_and_says_that_it_has_not_begun() -> None:
    async with serving_texts() as (stack, stub):
        stack.router.plane.refuse_new()
        error = await fails(stub, texts("good"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        told = dict(error.trailing_metadata())
        assert (told["grpc-retry-pushback-ms"], told["inference-router-refused"]) == ("1000", "1")


# Around it


async def test_each_request_is_a_line_with_its_id(caplog: pytest.LogCaptureFixture) -> None:
    async with serving_texts(log_requests="all") as (_, stub):
        with caplog.at_level(logging.INFO, "router.access"):
            request = texts("good", "bad")
            request.id = "mine"
            await stub.ModelInfer(request)
            await stub.ModelInfer(request, metadata=(("x-request-id", "outer"),))
    told = [(vars(record)["request_id"], vars(record)["rows"], vars(record)["code"]) for record in caplog.records]
    assert told == [("mine", 2, "OK"), ("outer", 2, "OK")]


async def test_a_refused_request_of_megabytes_is_a_short_line(caplog: pytest.LogCaptureFixture) -> None:
    request = raw(b"", datatype="D" * MIB, id="i" * MIB)
    async with serving_texts(log_requests="errors") as (_, stub):
        with caplog.at_level(logging.INFO, "router.access"):
            for message in (request, raw(b"", datatype="D" * MIB)):
                assert (await fails(stub, message)).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [len(record.getMessage()) < 1_100 for record in caplog.records] == [True, True]
    assert [len(vars(record)["request_id"]) <= 256 for record in caplog.records] == [True, True]


async def test_a_bug_of_ours_reaches_the_caller_as_a_fixed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    async with serving_texts() as (_, stub):
        monkeypatch.setattr("router.servicers.tensors.read", broken)
        error = await fails(stub, texts("good"))
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")


async def test_health_and_reflection_know_the_service() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        reply = await check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (listed,) = [one async for one in ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))]
        assert {one.name for one in listed.list_services_response.service} == {
            SERVICE,
            "inference_router.v1.InferenceRouterService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for symbol in (SERVICE, f"{SERVICE}.ModelInfer", "inference.ModelInferRequest"):
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
            (answer,) = [one async for one in ask(iter([request]))]
            assert pb.DESCRIPTOR.serialized_pb in answer.file_descriptor_response.file_descriptor_proto
