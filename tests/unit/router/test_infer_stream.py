"""A ModelStreamInfer over a fake backend and a client that reads when the test says so, in virtual time."""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn, cast

import grpc
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.dataplane import DataPlane
from router.errors import DeadlineExceeded
from router.metrics import Metrics
from router.models import Model, Models, Unlearned
from router.servicers.access import Access
from router.servicers.convert import Routes, VectorOutputs
from router.servicers.infer_request import Front
from router.servicers.infer_stream import Context, InferStream
from router.servicers.stream import Surroundings
from router.servicers.tenants import Tenants
from router.servicers.unary import Unreadable
from tests.unit.router.fakes import FakeBackend, pool_of

pytestmark = pytest.mark.anyio


class Client:
    """The other end of the stream: a ServicerContext that hands on what the test sends."""

    def __init__(self, rpc_s: float | None) -> None:
        self._rpc_s = rpc_s
        self._sent: asyncio.Queue[pb.ModelInferRequest | Unreadable | None] = asyncio.Queue()
        self._reads = asyncio.Event()
        self._reads.set()
        self.told: list[tuple[str, float]] = []
        self.errors: list[str] = []
        self.ended_by: grpc.StatusCode | None = None

    def time_remaining(self) -> float | None:
        return self._rpc_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-tenant", "gold"),)

    async def read(self) -> pb.ModelInferRequest | Unreadable | None:
        return await self._sent.get()

    async def write(self, message: pb.ModelStreamInferResponse) -> None:
        response = message.infer_response
        if message.error_message:
            self.errors.append(message.error_message)
            assert response == pb.ModelInferResponse(id=response.id)
            assert message.error_message.startswith(f"[request id: {response.id or '<id_unknown>'}] ")
        else:
            assert response.parameters["triton_final_response"].bool_param
            self.told.append((response.id, float(np.frombuffer(response.raw_output_contents[0], "<f4")[0])))
        await self._reads.wait()

    async def abort(self, code: grpc.StatusCode, _details: str) -> NoReturn:
        self.ended_by = code
        raise _Aborted

    def stop_reading(self) -> None:
        self._reads.clear()

    def read_on(self) -> None:
        self._reads.set()

    def send(self, *messages: pb.ModelInferRequest | Unreadable) -> None:
        for message in messages:
            self._sent.put_nowait(message)

    def hang_up(self) -> None:
        self._sent.put_nowait(None)


class _Aborted(Exception):
    """What grpc.aio raises out of a handler."""


class LateModels(Models):
    """Knows no model until so many seconds after the first question, and then all."""

    def __init__(self, settings: Settings, learn_s: float) -> None:
        super().__init__(settings)
        self._learn_s = learn_s
        self.is_known = False
        self.learning = 0

    def find(self, model_name: str, model_version: str, agent_type: str) -> Model:
        if not self.is_known:
            raise Unlearned((model_name, model_version, agent_type))
        return super().find(model_name, model_version, agent_type)

    async def learn(
        self,
        model_name: str,
        model_version: str,
        agent_type: str,
        *,
        rows: int,
        nbytes: int,
        deadline: float,
        tenant: str = "",
    ) -> None:
        self.learning += 1
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.sleep(self._learn_s)
        except TimeoutError as error:
            raise DeadlineExceeded("nobody told of the model in time") from error
        finally:
            self.learning -= 1
        self.is_known = True


class Session:
    """What a test needs of a stream that runs."""

    def __init__(
        self, rpc_s: float | None, learn_s: float | None, *, trust_tenant: bool = False, **limits: int
    ) -> None:
        settings = Settings(
            backends={"mock": {"addresses": ["fake:1"]}},  # type: ignore[dict-item]
            models=[{"backend": "mock", "max_batch_size": 64, "max_queue_delay_s": 0}],  # type: ignore[list-item]
            log_requests="off",
            trust_tenant=trust_tenant,
            limits=limits,  # type: ignore[arg-type]
        )
        self.metrics = Metrics()
        self.backend = FakeBackend(service_s=0.1)
        self.plane = DataPlane(settings, {"mock": pool_of(self.backend, max_in_flight=4)}, self.metrics)
        access = Access(self.metrics, settings.log_requests)
        self.models = Models(settings) if learn_s is None else LateModels(settings, learn_s)
        around = Surroundings(
            settings, self.plane, self.models, Routes(settings), access, VectorOutputs(), Tenants(settings)
        )
        self.client = Client(rpc_s)
        self.stream = InferStream(Front(around), cast(Context, self.client))

    def count(self, code: str) -> float:
        labels = {"method": "ModelStreamInfer", "code": code}
        return self.metrics.registry.get_sample_value("router_requests_total", labels) or 0.0

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("router_refusals_total", {"reason": reason}) or 0.0


@asynccontextmanager
async def running(
    *, rpc_s: float | None = None, learn_s: float | None = None, trust_tenant: bool = False, **limits: int
) -> AsyncIterator[Session]:
    """A stream that is over, with nothing open, at the end of the block."""
    session = Session(rpc_s, learn_s, trust_tenant=trust_tenant, **limits)
    task = asyncio.create_task(session.stream.run(), name="stream")
    yield session
    session.client.hang_up()
    await asyncio.wait([task])
    if session.client.ended_by is None:
        await task
    else:
        assert isinstance(task.exception(), _Aborted)
    assert "<DataPlane 0 open calls" in repr(session.plane)
    assert repr(session.stream) == "<InferStream 0 open requests, 0 answers ready>"
    await session.plane.aclose()


def request(id: str, value: float, *, timeout_s: float = 0) -> pb.ModelInferRequest:  # noqa: A002
    data = np.array([value], "<f4").tobytes()
    message = pb.ModelInferRequest(model_name="m", id=id, raw_input_contents=[data])
    message.inputs.add(name="vector", datatype="FP32", shape=[1, 1])
    if timeout_s:
        message.parameters["timeout"].int64_param = int(timeout_s * 1e6)
    return message


async def seconds(number: float) -> None:
    """Let so much virtual time pass."""
    await asyncio.sleep(number)


async def test_the_streams_deadline_is_every_requests_and_counts_from_its_beginning() -> None:
    async with running(rpc_s=10.0) as one:
        one.backend.service_s = None
        await seconds(9)
        one.client.send(request("x", 1))
        await seconds(0.97)
        assert one.client.errors == []
        await seconds(0.02)
        assert one.client.errors == ["[request id: x] no answer within 0.98 s"]


@pytest.mark.parametrize(("is_trusted", "tenant"), [(True, "gold"), (False, "default")])
async def test_requests_are_their_streams_tenants_and_have_a_class_each(is_trusted: bool, tenant: str) -> None:
    async with running(trust_tenant=is_trusted) as one:
        low = request("low", 1)
        low.parameters["priority"].uint64_param = 2
        one.client.send(low)
        await seconds(1)
        one.client.send(request("high", 1))
        await seconds(1)
        blocks = [part.block for sent in one.backend.sent for part in sent.batch.parts]
        assert [(block.tenant, block.is_batch_class) for block in blocks] == [(tenant, True), (tenant, False)]


async def test_typed_contents_are_not_kept_beside_the_rows_made_of_them() -> None:
    async with running() as one:
        one.backend.service_s = None
        message = pb.ModelInferRequest(model_name="m", id="x")
        contents = pb.InferTensorContents(fp32_contents=[1.0])
        message.inputs.add(name="vector", datatype="FP32", shape=[1, 1], contents=contents)
        own = sys.getrefcount(message)
        one.client.send(message, request("y", 2))  # a stream knows the message that it read last
        await seconds(1)
        assert sys.getrefcount(message) == own
        for sent in one.backend.sent:
            sent.answer()
        await seconds(1)
        assert sorted(one.client.told) == [("x", 2.0), ("y", 4.0)]


async def test_an_answer_that_is_ready_first_is_written_first() -> None:
    async with running() as one:
        one.backend.service_s = None
        one.client.send(request("x", 1))
        await seconds(1)
        one.client.send(request("y", 2))
        await seconds(1)
        one.backend.sent[1].answer()
        await seconds(1)
        assert one.client.told == [("y", 4.0)]
        one.backend.sent[0].answer()
        await seconds(1)
        assert one.client.told == [("y", 4.0), ("x", 2.0)]


async def test_answers_wait_for_a_client_that_does_not_read_and_keep_their_order() -> None:
    async with running() as one:
        one.client.stop_reading()
        one.client.send(request("1", 10))
        await seconds(2)
        one.client.send(*(request(str(number), number) for number in range(2, 9)))
        await seconds(2)
        assert one.client.told == [("1", 20.0)]
        one.client.read_on()
        await seconds(1)
        assert one.client.told == [("1", 20.0), *((str(number), 2.0 * number) for number in range(2, 9))]


async def test_requests_of_who_reads_nothing_are_refused_and_then_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.servicers.infer_stream.MAX_UNREAD_BYTES", 800)  # two answers, and not three
    async with running() as one:
        one.client.stop_reading()
        for number in range(10):
            one.client.send(request(str(number), number))
            await seconds(1)
        assert one.refused("unread") == 2  # a refusal is an answer, too: after these nothing was read
        one.client.read_on()
        await seconds(1)
        assert len(one.client.told) == 8
        assert one.client.errors[0] == "[request id: 3] the answers of this stream are not being read"


async def test_requests_beyond_those_that_may_be_open_are_refused_and_an_answered_one_makes_room() -> None:
    async with running(max_open_calls=2) as one:
        one.backend.service_s = 5
        one.client.send(*(request(str(number), number) for number in range(3)))
        await seconds(1)
        assert one.client.errors == ["[request id: 2] 2 requests of this stream are open"]
        await seconds(5)
        one.client.send(request("3", 3))
        await seconds(6)
        assert [told[0] for told in one.client.told] == ["0", "1", "3"]


async def test_each_request_is_counted_once_by_its_end() -> None:
    async with running() as one:
        one.client.send(*(request(str(number), number) for number in range(5)), pb.ModelInferRequest(model_name="m"))
        await seconds(2)
        assert (one.count("OK"), one.count("INVALID_ARGUMENT")) == (5, 1)


async def test_a_client_that_is_gone_takes_its_requests_with_it() -> None:
    session = Session(None, None)
    session.backend.service_s = None
    task = asyncio.create_task(session.stream.run(), name="stream")
    session.client.send(request("x", 1), request("y", 2))
    await seconds(1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert "<DataPlane 0 open calls" in repr(session.plane)
    assert session.count("CANCELLED") == 2
    await session.plane.aclose()


async def test_what_cannot_be_read_ends_the_stream_once_the_others_are_answered() -> None:
    async with running() as one:
        one.client.send(request("x", 1), Unreadable(), request("y", 2))
        await seconds(1)
        assert one.client.told == [("x", 2.0)]
        assert one.client.ended_by is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_router_that_ends_says_so_once_all_are_answered() -> None:
    async with running() as one:
        one.client.send(request("x", 1))
        await seconds(0.05)
        one.stream.end()
        await seconds(1)
        assert one.client.told == [("x", 2.0)]
        assert one.client.ended_by is grpc.StatusCode.UNAVAILABLE


async def test_a_request_for_a_model_not_met_yet_begins_once_the_backend_has_told() -> None:
    async with running(learn_s=3) as one:
        one.client.send(request("x", 1), request("y", 2))
        await seconds(2.9)
        assert one.backend.sent == []
        assert "<DataPlane 2 open calls" in repr(one.plane)
        await seconds(1)
        assert sorted(one.client.told) == [("x", 2.0), ("y", 4.0)]


async def test_its_time_runs_while_it_waits_for_the_backend_to_tell() -> None:
    async with running(learn_s=3) as one:
        one.client.send(request("x", 1, timeout_s=2), request("y", 1, timeout_s=3.05))
        await seconds(2.5)
        assert one.client.errors == ["[request id: x] no answer within 2 s"]
        await seconds(1)
        assert one.client.errors[1:] == ["[request id: y] no answer within 3.05 s"]


async def test_a_request_that_comes_too_late_for_its_stream_asks_for_no_model() -> None:
    """Bug: it waited for its model first, and was told that there was no answer within -1 s."""
    async with running(rpc_s=1, learn_s=3) as one:
        await seconds(2)
        one.client.send(request("x", 1))
        await seconds(0.1)
        assert one.client.errors == ["[request id: x] the deadline had passed when the request arrived"]


async def test_a_request_that_was_taken_before_the_router_left_is_answered_once_its_model_is_known() -> None:
    async with running(learn_s=3) as one:
        one.client.send(request("x", 1))
        await seconds(1)
        one.plane.refuse_new()
        await seconds(3)
        assert one.client.told == [("x", 2.0)]


async def test_a_client_that_is_gone_asks_for_no_model_any_more() -> None:
    session = Session(None, 3)
    task = asyncio.create_task(session.stream.run(), name="stream")
    session.client.send(request("x", 1))
    await seconds(1)
    assert isinstance(session.models, LateModels)
    assert session.models.learning == 1
    task.cancel()
    await asyncio.wait([task])
    await seconds(0.1)
    assert session.models.learning == 0
    assert "<DataPlane 0 open calls" in repr(session.plane)
    await session.plane.aclose()


async def test_a_request_leaves_nothing_for_the_garbage_collector() -> None:
    async with running() as one:
        one.client.send(*(request(str(number), number) for number in range(500)))
        await seconds(5)
        gc.collect()
        gc.disable()
        try:
            one.client.send(*(request(str(number), number) for number in range(500)))
            await seconds(5)
            assert len(one.client.told) == 1000
            one.backend.sent.clear()
            assert gc.collect() < 500
        finally:
            gc.enable()
