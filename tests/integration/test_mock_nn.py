"""The mock over real gRPC: the protocol, the order on streams, faults as a client sees them, drain."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NoReturn, TypeAlias

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from mock_nn.config import parse_config
from mock_nn.models import FloatArray, expected
from mock_nn.server import SERVICE, ListenError, MockServer
from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc

pytestmark = pytest.mark.anyio

Stub: TypeAlias = "pb_grpc.GRPCInferenceServiceAsyncStub"  # a class for the type checker only
Stream: TypeAlias = grpc.aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]

ROWS = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)


def mock_with(flags: str = "") -> MockServer:
    return MockServer(
        parse_config([*["--listen", "127.0.0.1:0", "--latency", "0", "--drain-delay", "0"], *flags.split()])
    )


@contextlib.asynccontextmanager
async def channel_to(mock: MockServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(mock.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield channel


@contextlib.asynccontextmanager
async def client_of(mock: MockServer) -> AsyncIterator[Stub]:
    async with channel_to(mock) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


@contextlib.asynccontextmanager
async def stream_to(mock: MockServer) -> AsyncIterator[Stream]:
    async with client_of(mock) as stub:
        stream = stub.ModelStreamInfer()
        try:
            yield stream
        finally:
            stream.cancel()


def batch_request(
    batch_id: str = "b1", model_name: str = "m", agent_type: str = "cat", rows: FloatArray = ROWS
) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=rows.shape)
    request = pb.ModelInferRequest(
        model_name=model_name, id=batch_id, inputs=[tensor], raw_input_contents=[rows.tobytes()]
    )
    request.parameters["agent_type"].string_param = agent_type
    return request


async def read(stream: Stream) -> pb.ModelStreamInferResponse:
    message = await stream.read()
    assert isinstance(message, pb.ModelStreamInferResponse), "the stream ended"
    return message


async def ask(stream: Stream, request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
    await stream.write(request)
    return await read(stream)


def values(response: pb.ModelInferResponse) -> list[float]:
    numbers: list[float] = np.frombuffer(response.raw_output_contents[0], dtype=np.float32).tolist()
    return numbers


def right_values(model_name: str = "m", agent_type: str = "cat", rows: FloatArray = ROWS) -> list[float]:
    numbers: list[float] = expected(model_name, agent_type, rows).tolist()
    return numbers


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    return (await check(health_pb2.HealthCheckRequest(service=service))).status


# The protocol


async def test_a_unary_call_is_answered_by_the_formula() -> None:
    async with mock_with() as mock, client_of(mock) as stub:
        response = await stub.ModelInfer(batch_request())
    assert (response.id, response.model_name, response.model_version) == ("b1", "m", "1")
    assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
        ("output", "FP32", [2])
    ]
    assert values(response) == right_values()


async def test_a_stream_answers_batch_after_batch_of_different_models() -> None:
    async with mock_with() as mock, stream_to(mock) as stream:
        for number in range(10):
            model_name, rows = f"m{number % 3}", ROWS + np.float32(number)
            message = await ask(stream, batch_request(f"b{number}", model_name, rows=rows))
            assert message.infer_response.id == f"b{number}"
            assert values(message.infer_response) == right_values(model_name, rows=rows)
        await stream.done_writing()
        assert await stream.read() == grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK
    assert [batch.batch_id for batch in mock.batches] == [f"b{number}" for number in range(10)]


async def test_batches_written_ahead_are_answered_in_order_one_at_a_time() -> None:
    running, most = 0, 0

    async def count(_seconds: float) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    config = parse_config(["--listen", "127.0.0.1:0", "--latency", "1"])
    async with MockServer(config, sleep=count) as mock, stream_to(mock) as stream:
        for number in range(20):
            await stream.write(batch_request(f"b{number}"))
        ids = [(await read(stream)).infer_response.id for _ in range(20)]
    assert ids == [f"b{number}" for number in range(20)]
    assert most == 1


async def test_streams_run_side_by_side() -> None:
    both_run = asyncio.Event()

    async def wait_for_both(_seconds: float) -> None:
        if mock.arrived == 2:
            both_run.set()
        await both_run.wait()

    mock = MockServer(parse_config(["--listen", "127.0.0.1:0"]), sleep=wait_for_both)
    async with mock, stream_to(mock) as one, stream_to(mock) as other:
        await asyncio.gather(ask(one, batch_request("b1")), ask(other, batch_request("b2")))


async def test_a_width_gives_a_matrix_of_answers() -> None:
    async with mock_with("--output-width 3") as mock, client_of(mock) as stub:
        response = await stub.ModelInfer(batch_request())
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
    assert list(response.outputs[0].shape) == [2, 3]
    assert values(response) == expected("m", "cat", ROWS, width=3).ravel().tolist()
    assert list(metadata.outputs[0].shape) == [-1, 3]


async def test_what_metadata_tells_is_what_is_taken_and_given() -> None:
    flags = "--vector-input INPUT0 --vector-datatype FP64 --vector-output OUTPUT0"
    async with mock_with(flags) as mock, client_of(mock) as stub:
        told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
        (input_,), (output,) = told.inputs, told.outputs
        request = pb.ModelInferRequest(model_name="m", raw_input_contents=[ROWS.astype("<f8").tobytes()])
        request.inputs.add(name=input_.name, datatype=input_.datatype, shape=ROWS.shape)
        request.outputs.add(name=output.name)
        request.parameters["agent_type"].string_param = "cat"
        response = await stub.ModelInfer(request)
        assert [(one.name, one.datatype) for one in response.outputs] == [("OUTPUT0", output.datatype)]
        assert values(response) == expected("m", "cat", ROWS).tolist()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(batch_request())
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_large_matrix_goes_through() -> None:
    rows = np.ones((1024, 8192), dtype=np.float32)  # 32 MiB
    options = [("grpc.max_send_message_length", 64 * 2**20)]
    async with mock_with() as mock, grpc.aio.insecure_channel(mock.address, options=options) as channel:
        response = await pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(batch_request(rows=rows))
    assert values(response) == right_values(rows=rows)


async def test_the_server_describes_itself() -> None:
    async with mock_with("--models m") as mock, client_of(mock) as stub:
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="m"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
        assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "mock_nn"
        assert (await stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))).inputs[0].datatype == "FP32"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelMetadata(pb.ModelMetadataRequest(name="other"))
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_health_and_reflection_are_served() -> None:
    async with mock_with() as mock, channel_to(mock) as channel:
        for service in ("", SERVICE):
            assert await health_of(channel, service) == health_pb2.HealthCheckResponse.SERVING
        ask_for = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        reflect = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        services, files = [answered async for answered in reflect(iter(ask_for))]
    assert SERVICE in [service.name for service in services.list_services_response.service]
    (file,) = [FileDescriptorProto.FromString(raw) for raw in files.file_descriptor_response.file_descriptor_proto]
    assert file.package == "inference"


# Refusals


@pytest.mark.parametrize(
    ("flags", "request_", "code", "text"),
    [
        (
            "--models a",
            batch_request(),
            grpc.StatusCode.NOT_FOUND,
            "Request for unknown model: 'm' is not found",
        ),
        (
            "--max-batch-size 1",
            batch_request(),
            grpc.StatusCode.INVALID_ARGUMENT,
            "inference request batch-size must be <= 1 for 'm', got 2",
        ),
        (
            "",
            pb.ModelInferRequest(model_name="m", id="b1"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "expected 1 input but got 0 inputs for model 'm'",
        ),
    ],
)
async def test_a_bad_request_has_a_status_or_an_error_message_and_the_stream_lives(
    flags: str, request_: pb.ModelInferRequest, code: grpc.StatusCode, text: str
) -> None:
    async with mock_with(flags) as mock, client_of(mock) as stub, stream_to(mock) as stream:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(request_)
        assert (refused.value.code(), refused.value.details()) == (code, text)
        for _ in range(2):
            message = await ask(stream, request_)
            assert message.error_message == f"[request id: b1] {text}"
            assert not message.HasField("infer_response")
        good = batch_request("b2", model_name="a", rows=ROWS[:1])
        assert (await ask(stream, good)).infer_response.id == "b2"


async def test_an_error_without_an_id_says_so() -> None:
    async with mock_with() as mock, stream_to(mock) as stream:
        message = await ask(stream, pb.ModelInferRequest(model_name="m"))
    assert message.error_message.startswith("[request id: <id_unknown>] ")


# Faults


async def test_an_error_is_a_message_on_the_stream_and_a_status_of_a_unary_call() -> None:
    async with mock_with("--fault error") as mock, client_of(mock) as stub, stream_to(mock) as stream:
        message = await ask(stream, batch_request())
        assert message.error_message == "[request id: b1] the model failed (a fault on demand)"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(batch_request())
    assert failed.value.code() == grpc.StatusCode.INTERNAL


async def test_an_error_with_a_code_ends_the_stream_with_it() -> None:
    flags = "--fault error:first=2,code=RESOURCE_EXHAUSTED"
    async with mock_with(flags) as mock, client_of(mock) as stub, stream_to(mock) as stream:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await ask(stream, batch_request())
        assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(batch_request())
        assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.ModelInfer(batch_request())).id == "b1"


async def test_a_poison_row_fails_its_whole_matrix_and_no_other() -> None:
    poisoned = np.array([[1, 2, 3], [666, 5, 6]], dtype=np.float32)
    async with mock_with("--fault poison") as mock, client_of(mock) as stub, stream_to(mock) as stream:
        message = await ask(stream, batch_request(rows=poisoned))
        assert message.error_message == "[request id: b1] the model cannot compute one of the rows (a fault on demand)"
        assert values((await ask(stream, batch_request(rows=poisoned[:1]))).infer_response) == right_values(
            rows=poisoned[:1]
        )
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(batch_request(rows=poisoned))
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stalled_batch_leaves_other_streams_alone() -> None:
    async with mock_with("--fault stall:first=1") as mock:
        async with stream_to(mock) as stalled, stream_to(mock) as stream:
            await stalled.write(batch_request("b1"))
            await mock.wait_for_arrivals(1)
            assert (await ask(stream, batch_request("b2"))).infer_response.id == "b2"
            assert [batch.batch_id for batch in mock.batches] == ["b2"]
        await mock.wait_until_idle()
        assert [batch.fault for batch in mock.batches] == ["", "stall"]


async def test_a_dropped_batch_ends_its_stream_without_an_answer() -> None:
    async with mock_with("--fault drop") as mock, client_of(mock) as stub, stream_to(mock) as stream:
        await stream.write(batch_request())
        assert await stream.read() == grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(batch_request())
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_duplicate_comes_twice_and_the_next_answer_after_it() -> None:
    async with mock_with("--fault duplicate:first=1") as mock, stream_to(mock) as stream:
        await stream.write(batch_request("b1"))
        await stream.write(batch_request("b2"))
        assert [(await read(stream)).infer_response.id for _ in range(3)] == ["b1", "b1", "b2"]


async def test_out_of_order_brings_the_stream_s_previous_answer_again() -> None:
    async with mock_with("--fault out_of_order:every=2") as mock, stream_to(mock) as stream:
        await stream.write(batch_request("b1"))
        await stream.write(batch_request("b2"))
        assert [(await read(stream)).infer_response.id for _ in range(3)] == ["b1", "b1", "b2"]


@pytest.mark.parametrize("kind", ["duplicate", "out_of_order"])
async def test_a_unary_call_has_one_answer_the_right_one(kind: str) -> None:
    async with mock_with(f"--fault {kind}") as mock, client_of(mock) as stub:
        response = await stub.ModelInfer(batch_request())
    assert (response.id, values(response)) == ("b1", right_values())


async def test_a_bad_answer_reaches_both_kinds_of_call() -> None:
    async with mock_with("--fault short") as mock, client_of(mock) as stub, stream_to(mock) as stream:
        assert values((await ask(stream, batch_request())).infer_response) == right_values()[:1]
        assert values(await stub.ModelInfer(batch_request())) == right_values()[:1]


async def test_a_crash_takes_the_injected_way() -> None:
    exit_codes: list[int] = []

    def crash(exit_code: int) -> NoReturn:
        exit_codes.append(exit_code)
        raise RuntimeError("crashed")

    config = parse_config(["--listen", "127.0.0.1:0", "--latency", "0", "--fault", "crash:value=4"])
    async with MockServer(config, crash=crash) as mock, client_of(mock) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="crashed"):
            await stub.ModelInfer(batch_request())
    assert exit_codes == [70]


# Callers that leave


async def test_a_caller_that_leaves_frees_its_instance() -> None:
    async with mock_with("--instances 1 --fault stall:first=1") as mock, stream_to(mock) as stream:
        async with stream_to(mock) as leaving:
            await leaving.write(batch_request("b1"))
            await mock.wait_for_arrivals(1)
            await stream.write(batch_request("b2"))
            await mock.wait_for_arrivals(2)
        assert (await read(stream)).infer_response.id == "b2"


async def test_no_call_stays_open_when_clients_leave() -> None:
    async with mock_with() as mock:
        for _ in range(20):
            async with stream_to(mock) as stream:
                await ask(stream, batch_request())
        await mock.wait_until_idle()
        assert mock.open_calls == 0


# Listening and draining


async def test_a_port_in_use_is_refused_with_the_reason() -> None:
    async with mock_with() as mock:
        second = MockServer(parse_config(["--listen", mock.address]))
        with pytest.raises(ListenError, match=rf"^cannot listen on {mock.address}: Address already in use$"):
            await second.start()


async def test_an_idle_server_without_a_drain_delay_drains_at_once() -> None:
    async with mock_with() as mock:
        await mock.drain()


async def test_an_idle_server_serves_new_streams_until_its_drain_delay_is_over() -> None:
    """It used to leave at once, and a router that was stopped with it took calls for which there was no backend."""
    async with mock_with("--drain-delay 60 --drain-timeout 90") as mock, client_of(mock) as stub:
        drain = asyncio.create_task(mock.drain())
        while (await stub.ServerReady(pb.ServerReadyRequest())).ready:
            pass
        async with stream_to(mock) as stream:
            assert (await ask(stream, batch_request("b1"))).infer_response.id == "b1"
        await mock.wait_until_idle()
        assert not drain.done()
        drain.cancel()


async def test_a_draining_server_is_not_ready_and_answers_until_the_client_closes() -> None:
    async with mock_with() as mock, channel_to(mock) as channel, stream_to(mock) as stream:
        await ask(stream, batch_request("b1"))
        drain = asyncio.create_task(mock.drain())
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        while (await stub.ServerReady(pb.ServerReadyRequest())).ready:
            pass
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="m"))).ready
        assert await health_of(channel, SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await ask(stream, batch_request("b2"))).infer_response.id == "b2"
        assert (await ask(stream, batch_request("b3"))).infer_response.id == "b3"
        assert not drain.done()
        await stream.done_writing()
        assert await stream.read() == grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK
        await drain


async def test_a_draining_server_finishes_a_unary_call() -> None:
    may_answer = asyncio.Event()

    async def hold(_seconds: float) -> None:
        await may_answer.wait()

    config = parse_config(["--listen", "127.0.0.1:0", "--drain-delay", "0"])
    async with MockServer(config, sleep=hold) as mock, client_of(mock) as stub:
        call = asyncio.ensure_future(stub.ModelInfer(batch_request()))
        await mock.wait_for_arrivals(1)
        drain = asyncio.create_task(mock.drain())
        while (await stub.ServerReady(pb.ServerReadyRequest())).ready:
            pass
        assert not drain.done()
        may_answer.set()
        assert values(await call) == right_values()
        await drain


async def test_a_stream_that_outlasts_the_drain_timeout_gets_unavailable() -> None:
    async with mock_with("--fault stall --drain-timeout 0.01") as mock, stream_to(mock) as stream:
        await stream.write(batch_request())
        await mock.wait_for_arrivals(1)
        drain = asyncio.create_task(mock.drain())
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await stream.read()
        assert cut.value.code() == grpc.StatusCode.UNAVAILABLE
        await drain
