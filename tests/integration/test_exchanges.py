"""Batches to a model server by either protocol, over real gRPC: answers, failures, and calls that end early."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.config import ProtocolName
from router.core.types import Batch, BatchAnswer, BatchKey, Block, TensorSpec
from router.dispatch.replica import Replica
from router.dispatch.wire import to_request
from router.errors import (
    BackendExhausted,
    BatchTimeout,
    Blame,
    Malformed,
    Refused,
    StreamLost,
)
from tests.builders import Listener, make_batch, make_block, make_key
from tests.open_inference_server import Abort, OpenInferenceServer, ServedModel, double

pytestmark = pytest.mark.anyio

BOTH = pytest.mark.parametrize("protocol", ["stream", "unary"])
PATIENCE_S = 30.0
# gRPC's own bound for what a server reads.
SERVER_MESSAGE_BYTES = 4 * 1024 * 1024


def batch_of(*values: float, dim: int = 1, batch_id: str = "b-1") -> Batch:
    return make_batch(make_block(*values, key=make_key(dim=dim)).whole(), batch_id=batch_id)


def values(answer: BatchAnswer) -> list[float]:
    return [float(value) for value in np.frombuffer(answer.outputs[0].data, "<f4")]


@asynccontextmanager
async def replica_of(
    server: OpenInferenceServer,
    protocol: ProtocolName,
    *,
    batch_timeout_s: float = 60.0,
    max_message_bytes: int = 64 * 1024 * 1024,
) -> AsyncIterator[Replica]:
    """A connected replica."""
    is_connected = asyncio.Event()
    replica = Replica(
        server.address,
        batch_timeout_s=batch_timeout_s,
        max_message_bytes=max_message_bytes,
        max_in_flight=100,
        protocol=protocol,
    )
    replica.start(is_connected.set)
    try:
        await asyncio.wait_for(is_connected.wait(), PATIENCE_S)
        yield replica
    finally:
        await replica.aclose()


async def until_lost(server: OpenInferenceServer, calls: int) -> None:
    """Return when so many calls have ended at the server; there is no event of it."""
    async with asyncio.timeout(PATIENCE_S):
        while server.lost < calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_arrived(server: OpenInferenceServer, batches: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(server.requests) < batches:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def refusing(code: grpc.StatusCode) -> ServedModel:
    def infer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        raise Abort(code, "a word of the model")

    return ServedModel(infer=infer)


@BOTH
async def test_a_batch_is_answered(protocol: ProtocolName) -> None:
    async with OpenInferenceServer({"m": ServedModel()}) as server, replica_of(server, protocol) as replica:
        for number in range(3):
            assert values(await replica.infer(batch_of(number, 5, batch_id=f"b-{number}"))) == [2 * number, 10]
        assert [request.id for request in server.requests] == ["b-0", "b-1", "b-2"]
        assert len(server.left_s) == (3 if protocol == "unary" else 0)


@BOTH
async def test_a_model_without_batches_gets_a_request_in_its_own_shape(protocol: ProtocolName) -> None:
    key = BatchKey("m", "", "", (TensorSpec("x", "FP32", (2, 3)),), is_batched=False)
    numbers = np.arange(6, dtype="<f4")
    batch = make_batch(Block(key, 0, 0, 1, (numbers.tobytes(),), key.row_bytes, 0.0, 60.0, Listener()).whole())
    async with OpenInferenceServer({"m": ServedModel()}) as server, replica_of(server, protocol) as replica:
        answer = await replica.infer(batch)
        assert [list(tensor.shape) for tensor in server.requests[0].inputs] == [[2, 3]]
        assert answer.outputs[0].shape == (1, 2, 3)
        assert values(answer) == (2 * numbers).tolist()


async def test_unary_calls_do_not_wait_for_each_other() -> None:
    async with OpenInferenceServer({"m": ServedModel()}) as server, replica_of(server, "unary") as replica:
        server.may_answer.clear()
        tasks = [asyncio.create_task(replica.infer(batch_of(number))) for number in range(3)]
        await until_arrived(server, 3)
        server.may_answer.set()
        assert [values(answer) for answer in await asyncio.gather(*tasks)] == [[0], [2], [4]]
        assert "0 idle streams" in repr(replica)


@pytest.mark.parametrize("answered", ["", "made-by-the-server"])
async def test_a_unary_answer_may_bear_any_id(answered: str) -> None:
    def infer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        response = double(request)
        response.id = answered
        return response

    async with OpenInferenceServer({"m": ServedModel(infer=infer)}) as server:
        async with replica_of(server, "unary") as replica:
            answer = await replica.infer(batch_of(1))
            assert (answer.batch_id, values(answer)) == ("b-1", [2])
        async with replica_of(server, "stream") as replica:
            with pytest.raises(Malformed):
                await replica.infer(batch_of(1))


@BOTH
async def test_typed_answers_are_read(protocol: ProtocolName) -> None:
    def infer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        response = double(request)
        numbers = np.frombuffer(response.raw_output_contents.pop(), "<f4")
        response.outputs[0].contents.fp32_contents.extend(numbers.tolist())
        return response

    model = ServedModel(infer=infer)
    async with OpenInferenceServer({"m": model}) as server, replica_of(server, protocol) as replica:
        assert values(await replica.infer(batch_of(1, 2))) == [2, 4]


@pytest.mark.parametrize(
    ("code", "kind", "blame"),
    [
        (grpc.StatusCode.UNAVAILABLE, StreamLost, None),
        (grpc.StatusCode.CANCELLED, StreamLost, None),
        (grpc.StatusCode.DEADLINE_EXCEEDED, StreamLost, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, BackendExhausted, None),
        (grpc.StatusCode.INVALID_ARGUMENT, Refused, Blame.ROWS),
        (grpc.StatusCode.NOT_FOUND, Refused, Blame.MODEL),
        (grpc.StatusCode.UNIMPLEMENTED, Refused, Blame.MODEL),
        (grpc.StatusCode.INTERNAL, Refused, Blame.UNCLEAR),
        (grpc.StatusCode.UNKNOWN, Refused, Blame.UNCLEAR),
    ],
)
async def test_a_unary_status_is_the_batchs_failure_and_the_next_batch_is_fine(
    code: grpc.StatusCode, kind: type[Exception], blame: Blame | None
) -> None:
    models = {"m": refusing(code)}
    async with OpenInferenceServer(models) as server, replica_of(server, "unary") as replica:
        with pytest.raises(kind, match="a word of the model") as failed:
            await replica.infer(batch_of(1))
        assert (failed.value.blame if isinstance(failed.value, Refused) else None) is blame
        models["m"] = ServedModel()
        assert values(await replica.infer(batch_of(1))) == [2]


@BOTH
async def test_a_server_that_goes_loses_its_batches(protocol: ProtocolName) -> None:
    server = OpenInferenceServer({"m": ServedModel()})
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(server)
        replica = await stack.enter_async_context(replica_of(server, protocol))
        server.may_answer.clear()
        out = asyncio.create_task(replica.infer(batch_of(1)))
        await until_arrived(server, 1)
        await server.__aexit__()
        with pytest.raises(StreamLost):
            await out
        with pytest.raises(StreamLost):
            await replica.infer(batch_of(2))


@BOTH
async def test_a_batch_that_times_out_ends_at_the_server_too(protocol: ProtocolName) -> None:
    async with (
        OpenInferenceServer({"m": ServedModel()}) as server,
        replica_of(server, protocol, batch_timeout_s=0.3) as replica,
    ):
        server.may_answer.clear()
        with pytest.raises(BatchTimeout, match=r"did not answer within 0\.3 s"):
            await replica.infer(batch_of(1))
        await until_lost(server, 1)


@pytest.mark.parametrize(("timeout_s", "least_s", "most_s"), [(20.0, 15.0, 24.0), (1e300, 1e6, 1e9)])
async def test_a_unary_call_tells_the_server_a_deadline_just_behind_our_own(
    timeout_s: float, least_s: float, most_s: float
) -> None:
    async with OpenInferenceServer({"m": ServedModel()}) as server:
        async with replica_of(server, "unary", batch_timeout_s=timeout_s) as replica:
            await replica.infer(batch_of(1))
        # A slow machine takes some of it, and gRPC rounds it up.
        assert least_s < server.left_s[0] <= most_s


@BOTH
async def test_a_cancelled_batch_ends_its_call_and_no_other(protocol: ProtocolName) -> None:
    async with OpenInferenceServer({"m": ServedModel()}) as server, replica_of(server, protocol) as replica:
        server.may_answer.clear()
        given_up, other = (asyncio.create_task(replica.infer(batch_of(number))) for number in (1, 2))
        await until_arrived(server, 2)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await until_lost(server, 1)
        server.may_answer.set()
        assert values(await other) == [4]
        assert server.lost == 1


@BOTH
async def test_batches_that_are_given_up_are_lost_and_end_at_the_server(protocol: ProtocolName) -> None:
    async with OpenInferenceServer({"m": ServedModel()}) as server, replica_of(server, protocol) as replica:
        server.may_answer.clear()
        out = [asyncio.create_task(replica.infer(batch_of(number))) for number in (1, 2)]
        await until_arrived(server, 2)
        replica.abandon()
        for task in out:
            with pytest.raises(StreamLost, match="gave no sign of life"):
                await task
        await until_lost(server, 2)
        server.may_answer.set()
        assert values(await replica.infer(batch_of(3))) == [6]


@BOTH
async def test_a_batch_that_the_server_does_not_read_has_too_many_rows(protocol: ProtocolName) -> None:
    async with OpenInferenceServer({"m": ServedModel()}) as server, replica_of(server, protocol) as replica:
        with pytest.raises(Refused, match="larger than max") as refused:
            await replica.infer(batch_of(1, 2, dim=SERVER_MESSAGE_BYTES // 8 + 1))
        assert refused.value.blame is Blame.ROWS
        assert values(await replica.infer(batch_of(1))) == [2]


@BOTH
async def test_an_answer_over_our_limit_may_be_the_replicas_fault(protocol: ProtocolName) -> None:
    def infer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        response = double(request)
        response.parameters["padding"].string_param = "x" * 20_000 if request.id == "wide" else ""
        return response

    model = ServedModel(infer=infer)
    async with (
        OpenInferenceServer({"m": model}) as server,
        replica_of(server, protocol, max_message_bytes=10_000) as replica,
    ):
        with pytest.raises(Refused, match="larger than max") as refused:
            await replica.infer(batch_of(1, batch_id="wide"))
        assert refused.value.blame is Blame.UNCLEAR
        with pytest.raises(Refused, match="over the message limit of 10000 bytes") as refused:
            await replica.infer(batch_of(*range(3000)))
        assert refused.value.blame is Blame.ROWS
        assert values(await replica.infer(batch_of(1))) == [2]


# -- servers that answer in another form -------------------------------------------------------------------------------


@asynccontextmanager
async def answering(method: str, *answers: bytes) -> AsyncIterator[OpenInferenceServer]:
    """A server with one method, which answers with these bytes and then waits for more."""

    async def stream(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.read()
        for answer in answers:
            await context.write(answer)
        await context.read()

    async def unary(_request: bytes, _context: object) -> bytes:
        return answers[0]

    handler: grpc.RpcMethodHandler[Any, Any] = (
        grpc.stream_stream_rpc_method_handler(stream)
        if method == "ModelStreamInfer"
        else grpc.unary_unary_rpc_method_handler(unary)
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {method: handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield OpenInferenceServer({}, address=f"127.0.0.1:{port}")
    finally:
        await server.stop(0)


@pytest.mark.parametrize("version", ["", "v1.0.0"])
async def test_mlservers_form_of_a_stream_is_told_at_once_with_the_way_out(version: str) -> None:
    # Where it could not be read the batch waited for its timeout, and else the callers read the model's name.
    response = double(to_request(batch_of(1)))
    response.model_version = version
    answer = response.SerializeToString()
    async with answering("ModelStreamInfer", answer) as server, replica_of(server, "stream") as replica:
        with pytest.raises(Malformed, match="set protocol: unary"):
            await asyncio.wait_for(replica.infer(batch_of(1)), PATIENCE_S)


async def test_a_server_without_streams_is_told_with_the_way_out() -> None:
    async with answering("ModelInfer", b"") as server, replica_of(server, "stream") as replica:
        with pytest.raises(Refused, match="set protocol: unary"):
            await replica.infer(batch_of(1))


async def test_bytes_that_are_no_answer_are_malformed() -> None:
    async with answering("ModelInfer", b"nonsense") as server, replica_of(server, "unary") as replica:
        with pytest.raises(Malformed, match="no ModelInferResponse"):
            await replica.infer(batch_of(1))
