"""`Predict`, over real gRPC, against the mock's function."""

import asyncio
import math

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from mock_nn.config import Fault, FaultKind, parse_fault
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as pb
from tests.integration.stack import Gate, Stub, mock_config, open_channel, serving, truth

pytestmark = pytest.mark.anyio

BOTH_PROTOCOLS = pytest.mark.parametrize("protocol", ["stream", "unary"])


def agent(*vector: float, model: str = "churn", agent_type: str = "a") -> pb.Agent:
    return pb.Agent(model_name=model, agent_type=agent_type, vector=vector)


async def fails(stub: Stub, request: pb.PredictRequest, rpc_s: float | None = None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.Predict(request, timeout=rpc_s)
    return failed.value


async def test_agents_of_different_models_and_lengths_get_their_own_answers_by_name() -> None:
    async with serving() as stack:
        agents = {
            "alice": agent(0.1, 0.2),
            "bob": agent(0.3, 0.4),
            "carol": agent(1, 2, 3, model="fraud"),
            "dave": agent(1, 2, 3, model="fraud", agent_type="other"),
            "": agent(5, model="fraud"),
            "名前 \x00": agent(0.1, 0.2),
        }
        response = await stack.stub.Predict(pb.PredictRequest(agents=agents))
        for name, one in agents.items():
            assert list(response.results[name].output) == truth(one.model_name, [list(one.vector)], one.agent_type)
            assert not response.results[name].HasField("explanation")
        assert len(response.results) == len(agents)
        assert sorted(batch.rows for batch in stack.mock.batches) == [1, 1, 1, 3]


async def test_wide_outputs_arrive_whole() -> None:
    async with serving(MockServer(mock_config(output_width=3))) as stack:
        response = await stack.stub.Predict(pb.PredictRequest(agents={"alice": agent(1, 2), "bob": agent(3, 4)}))
        (one,) = truth("churn", [[3, 4]])
        assert list(response.results["bob"].output) == pytest.approx([one, 2 * one, 3 * one])


async def test_an_explanation_is_given_when_asked_for() -> None:
    async with serving() as stack:
        request = pb.PredictRequest(agents={"alice": agent(1), "bob": agent(2)}, explain=True)
        told = (await stack.stub.Predict(request)).results["bob"].explanation
        assert told.replica == stack.mock.address
        assert (told.batch_rows, told.attempts) == (2, 1)
        assert told.batch_id == stack.mock.batches[0].batch_id
        assert told.queued_s >= 0
        assert told.backend_s >= 0


async def test_a_request_larger_than_a_batch_is_split_and_answered_as_one() -> None:
    async with serving(model={"max_batch_size": 8}) as stack:
        agents = {f"agent-{number}": agent(number) for number in range(20)}
        response = await stack.stub.Predict(pb.PredictRequest(agents=agents))
        assert {name: list(result.output) for name, result in response.results.items()} == {
            f"agent-{number}": truth("churn", [[number]]) for number in range(20)
        }
        assert sorted(batch.rows for batch in stack.mock.batches) == [4, 8, 8]


async def test_a_batch_closes_at_its_bytes_too() -> None:
    async with serving(model={"max_batch_bytes": 100}) as stack:
        agents = {f"agent-{number}": agent(number, 0) for number in range(20)}
        await stack.stub.Predict(pb.PredictRequest(agents=agents))
        assert sorted(batch.rows for batch in stack.mock.batches) == [8, 12]


async def test_a_bad_agent_gets_its_own_error_and_its_neighbours_answers() -> None:
    async with serving(model={"match": {"model_name": "churn"}}) as stack:
        agents = {
            "good": agent(1, 2),
            "empty": agent(),
            "nan": agent(1, math.nan),
            "infinite": agent(math.inf, 1),
            "1e39": agent(1, 1e39),
            "nameless": agent(1, model=""),
            "long": agent(*([0.0] * 65_537)),
            "unknown": agent(1, model="unknown"),
            "n" * 257: agent(1),
        }
        results = (await stack.stub.Predict(pb.PredictRequest(agents=agents))).results
        assert list(results["good"].output) == truth("churn", [[1, 2]])
        told = {name: (result.error.code, result.error.message) for name, result in results.items() if name != "good"}
        assert told == {
            "empty": ("INVALID_ARGUMENT", "vector is empty"),
            "nan": ("INVALID_ARGUMENT", "vector[1] is nan; every value must be finite as a float32"),
            "infinite": ("INVALID_ARGUMENT", "vector[0] is inf; every value must be finite as a float32"),
            "1e39": ("INVALID_ARGUMENT", "vector[1] is inf; every value must be finite as a float32"),
            "nameless": ("INVALID_ARGUMENT", "model_name is empty"),
            "long": ("INVALID_ARGUMENT", "vector has 65537 values, at most 65536 are allowed"),
            "unknown": ("NOT_FOUND", "no model 'unknown' for agent type 'a'"),
            "n" * 257: ("INVALID_ARGUMENT", "an agent's name has 257 characters, at most 256 are allowed"),
        }
        assert stack.count("router_requests_total", method="Predict", code="PARTIAL") == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.PredictRequest(), "agents is empty"),
        (pb.PredictRequest(agents={str(n): agent(1) for n in range(1025)}), "1025 agents, at most 1024"),
        (pb.PredictRequest(agents={"a": agent(1)}, timeout_s=0), "timeout_s is 0; it must be greater than zero"),
        (pb.PredictRequest(agents={"a": agent(1)}, timeout_s=-1), "timeout_s is -1"),
        (pb.PredictRequest(agents={"a": agent(1)}, timeout_s=math.nan), "timeout_s is nan"),
        (pb.PredictRequest(agents={"a": agent(1)}, tenant="t" * 257), "tenant has 257 characters"),
        (pb.PredictRequest(agents={"a": agent(1)}, priority_class=9), "priority_class 9 is not one of"),  # type: ignore[arg-type]
        (pb.PredictRequest(agents={"a": agent(), "b": agent()}), "vector is empty"),
    ],
)
async def test_a_bad_request_fails_as_an_rpc(request_: pb.PredictRequest, message: str) -> None:
    async with serving() as stack:
        error = await fails(stack.stub, request_)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in str(error.details())
        assert stack.count("router_requests_total", method="Predict", code="INVALID_ARGUMENT") == 1


async def test_agents_that_failed_differently_are_told_one_by_one() -> None:
    async with serving(model={"match": {"model_name": "churn"}}) as stack:
        response = await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(), "b": agent(1, model="x")}))
        assert {result.error.code for result in response.results.values()} == {"INVALID_ARGUMENT", "NOT_FOUND"}


async def test_a_message_over_16_mib_is_refused_and_harms_no_neighbour() -> None:
    gate = Gate()
    async with serving(gate.mock(), batch_timeout_s=30) as stack:
        neighbour = asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)})))
        await stack.mock.wait_for_arrivals(1)
        huge = pb.PredictRequest(agents={str(n): agent(*([1.0] * 65_536)) for n in range(65)})
        error = await fails(stack.stub, huge)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.open()
        assert list((await neighbour).results["a"].output) == truth("churn", [[1]])


@pytest.mark.parametrize("is_grpc_deadline", [True, False])
async def test_a_deadline_is_kept_while_the_backend_is_busy(is_grpc_deadline: bool) -> None:
    gate = Gate()
    async with serving(gate.mock()) as stack:
        request = pb.PredictRequest(agents={"a": agent(1)}, timeout_s=None if is_grpc_deadline else 0.2)
        loop = asyncio.get_running_loop()
        started = loop.time()
        error = await fails(stack.stub, request, rpc_s=0.2 if is_grpc_deadline else None)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.17 <= loop.time() - started < 0.5
        gate.open()


async def test_agents_answered_before_the_deadline_keep_their_answers() -> None:
    stall = parse_fault("stall:model=slow")
    async with serving(MockServer(mock_config(stall))) as stack:
        agents = {"a": agent(1), "b": agent(1, model="slow")}
        results = (await stack.stub.Predict(pb.PredictRequest(agents=agents, timeout_s=0.3))).results
        assert list(results["a"].output) == truth("churn", [[1]])
        assert results["b"].error.code == "DEADLINE_EXCEEDED"
        assert results["b"].error.message == "no answer within 0.3 s"


async def test_a_cancelled_request_leaves_the_queue_and_its_neighbour_is_answered() -> None:
    gate = Gate()
    async with serving(gate.mock(), max_in_flight=1) as stack:
        first = asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)})))
        await stack.mock.wait_for_arrivals(1)
        cancelled = stack.stub.Predict(pb.PredictRequest(agents={"a": agent(2)}))
        neighbour = asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(3)})))
        await stack.until_queued(2)
        cancelled.cancel()
        await stack.until_queued(1)
        gate.open()
        assert list((await first).results["a"].output) == truth("churn", [[1]])
        assert list((await neighbour).results["a"].output) == truth("churn", [[3]])
        assert [batch.rows for batch in stack.mock.batches] == [1, 1]


async def test_past_the_queues_bound_a_request_is_refused_with_push_back() -> None:
    gate = Gate()
    mock = gate.mock()
    async with serving(mock, max_in_flight=1, limits={"max_queued_rows": 2}) as stack:
        pending = [asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)})))]
        await mock.wait_for_arrivals(1)
        pending.append(
            asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1), "b": agent(2)})))
        )
        await stack.until_queued(2)
        error = await fails(stack.stub, pb.PredictRequest(agents={"a": agent(3)}))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert stack.count("router_refusals_total", reason="queue_rows") == 1
        gate.open()
        await asyncio.gather(*pending)


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("short", "UNKNOWN", "shape [1] for a batch of 2 rows"),
        ("wrong_shape", "UNKNOWN", "shape [3] for a batch of 2 rows"),
        ("wrong_datatype", "UNKNOWN", "8 bytes, which is not FP64[2]"),
        ("missing_output", "UNKNOWN", "without any output"),
        ("error:code=UNIMPLEMENTED", "UNKNOWN", ""),
        ("error:code=FAILED_PRECONDITION", "UNKNOWN", ""),
        ("error:code=UNAUTHENTICATED", "UNKNOWN", ""),
        ("error:code=PERMISSION_DENIED", "UNKNOWN", ""),
        ("error:code=NOT_FOUND", "NOT_FOUND", ""),
    ],
)
@BOTH_PROTOCOLS
async def test_what_no_split_could_help_fails_its_batch_at_once_and_the_next_is_fine(
    fault: str, code: str, message: str, protocol: str
) -> None:
    mock = MockServer(mock_config(parse_fault(f"{fault}{',' if ':' in fault else ':'}first=1")))
    async with serving(mock, protocol=protocol) as stack:
        request = pb.PredictRequest(agents={"a": agent(1), "b": agent(2)})
        error = await fails(stack.stub, request)
        assert error.code() is grpc.StatusCode[code]
        assert message in str(error.details())
        results = (await stack.stub.Predict(request)).results
        assert list(results["b"].output) == truth("churn", [[2]])
        assert stack.mock.arrived == 2


async def test_an_answer_with_another_id_fails_its_batch_where_it_may_be_anothers() -> None:
    mock = MockServer(mock_config(parse_fault("foreign_id:first=1")))
    async with serving(mock) as stack:
        error = await fails(stack.stub, pb.PredictRequest(agents={"a": agent(1)}))
        assert error.code() is grpc.StatusCode.UNKNOWN
        assert "-foreign' when asked for" in str(error.details())
    mock = MockServer(mock_config(parse_fault("foreign_id:first=1")))
    async with serving(mock, protocol="unary") as stack:
        results = (await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)}))).results
        assert list(results["a"].output) == truth("churn", [[1]])


@pytest.mark.parametrize(
    "fault",
    [
        "drop",
        "error:code=UNAVAILABLE",
        "error:code=CANCELLED",
        "error:code=RESOURCE_EXHAUSTED",
        "error:code=DEADLINE_EXCEEDED",
    ],
)
@BOTH_PROTOCOLS
async def test_what_is_lost_or_refused_for_lack_of_room_runs_again(fault: str, protocol: str) -> None:
    mock = MockServer(mock_config(parse_fault(f"{fault}{',' if ':' in fault else ':'}first=2")))
    async with serving(mock, protocol=protocol) as stack:
        results = (await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)}, explain=True))).results
        assert list(results["a"].output) == truth("churn", [[1]])
        assert results["a"].explanation.attempts == 3


@pytest.mark.parametrize(
    ("fault", "code"), [("drop", "UNAVAILABLE"), ("error:code=RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED")]
)
async def test_after_three_attempts_the_rows_fail(fault: str, code: str) -> None:
    async with serving(MockServer(mock_config(parse_fault(fault)))) as stack:
        error = await fails(stack.stub, pb.PredictRequest(agents={"a": agent(1)}))
        assert error.code() is grpc.StatusCode[code]
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert stack.mock.arrived == 3


async def test_a_model_with_side_effects_is_never_tried_again() -> None:
    async with serving(MockServer(mock_config(parse_fault("drop:first=1"))), model={"retries": 0}) as stack:
        error = await fails(stack.stub, pb.PredictRequest(agents={"a": agent(1)}))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert stack.mock.arrived == 1


@BOTH_PROTOCOLS
async def test_a_batch_that_times_out_runs_elsewhere_and_the_late_call_is_dropped(protocol: str) -> None:
    stalled, healthy = MockServer(mock_config(parse_fault("stall"))), MockServer(mock_config())
    async with serving(stalled, healthy, batch_timeout_s=1.0, protocol=protocol) as stack:
        results = (await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)}, explain=True))).results
        assert list(results["a"].output) == truth("churn", [[1]])
        assert results["a"].explanation.replica == healthy.address
        await stalled.wait_until_idle()


@BOTH_PROTOCOLS
async def test_an_answer_over_the_message_limit_comes_in_pieces_and_its_streams_are_replaced(protocol: str) -> None:
    limits, model = {"max_backend_message_bytes": 50_000}, {"max_batch_bytes": 30_000}
    async with serving(
        MockServer(mock_config(output_width=5_000)), model=model, limits=limits, protocol=protocol
    ) as stack:
        five = pb.PredictRequest(agents={str(number): agent(number) for number in range(5)})
        results = (await stack.stub.Predict(five)).results
        for number in range(5):
            assert results[str(number)].output[0] == pytest.approx(truth("churn", [[number]])[0])
        assert stack.mock.arrived > 1


async def test_a_lone_row_whose_answer_is_over_the_message_limit_is_tried_on_another_replica() -> None:
    # A batch of one row cannot be cut any more, and failed although the replica was at fault.
    wide, healthy = MockServer(mock_config(output_width=20_000)), MockServer(mock_config())
    limits, model = {"max_backend_message_bytes": 50_000}, {"max_batch_bytes": 30_000}
    async with serving(wide, healthy, model=model, limits=limits) as stack:
        while not wide.arrived:
            results = (await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)}))).results
            assert list(results["a"].output) == truth("churn", [[1]])


async def test_a_doubled_answer_is_passed_over_by_the_next_batch_on_the_stream() -> None:
    async with serving(MockServer(mock_config(Fault(FaultKind.DUPLICATE)))) as stack:
        for number in range(5):
            results = (await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(number)}))).results
            assert list(results["a"].output) == truth("churn", [[number]])
        assert stack.mock.open_calls == 1


async def test_a_stale_answer_in_front_of_the_right_one_is_passed_over() -> None:
    async with serving(MockServer(mock_config(parse_fault("out_of_order:every=2")))) as stack:
        for number in range(4):
            results = (await stack.stub.Predict(pb.PredictRequest(agents={"a": agent(number)}))).results
            assert list(results["a"].output) == truth("churn", [[number]])


async def test_a_backend_that_goes_and_comes_back_is_found_again_and_rows_wait_meanwhile() -> None:
    gate = Gate()
    mock = gate.mock()
    async with serving(mock) as stack:
        caught = asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(1)}, explain=True)))
        await mock.wait_for_arrivals(1)
        await mock.stop()
        waiting = asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(2)}, explain=True)))
        await stack.until_queued(2)
        assert stack.count("router_ready_replicas", backend="mock") == 0
        again = MockServer(mock_config(listen=mock.address))
        await again.start()
        try:
            assert list((await caught).results["a"].output) == truth("churn", [[1]])
            assert (await caught).results["a"].explanation.attempts == 2
            assert (await waiting).results["a"].explanation.attempts == 1
        finally:
            await again.stop()


@BOTH_PROTOCOLS
async def test_a_lost_replicas_batch_runs_on_the_other(protocol: str) -> None:
    gate = Gate()
    dying, healthy = gate.mock(), gate.mock()
    async with serving(dying, healthy, max_in_flight=1, protocol=protocol) as stack:
        calls = [
            asyncio.ensure_future(stack.stub.Predict(pb.PredictRequest(agents={"a": agent(n, agent_type=str(n))})))
            for n in range(2)
        ]
        await dying.wait_for_arrivals(1)
        await healthy.wait_for_arrivals(1)
        await dying.stop()
        gate.open()
        for number, call in enumerate(calls):
            assert list((await call).results["a"].output) == truth("churn", [[number]], str(number))
        assert [batch.rows for batch in healthy.batches] == [1, 1]


async def test_health_speaks_for_the_router() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        for service in ("", "inference_router.v1.InferenceRouterService"):
            reply = await check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_describes_the_native_api() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        service = "inference_router.v1.InferenceRouterService"
        for symbol in ("inference_router.v1.Agent", service, f"{service}.Predict"):  # ghz asks for the method
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
            (reply,) = [message async for message in ask(iter([request]))]
            assert pb.DESCRIPTOR.serialized_pb in reply.file_descriptor_response.file_descriptor_proto
        unknown = reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"{service}.Predikt")
        (reply,) = [message async for message in ask(iter([unknown]))]
        assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_a_bug_of_ours_reaches_the_caller_as_a_fixed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    async with serving() as stack:
        monkeypatch.setattr("router.servicers.convert.from_agents", broken)
        error = await fails(stack.stub, pb.PredictRequest(agents={"a": agent(1)}))
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")


async def test_bytes_that_are_no_request_are_their_senders_fault() -> None:
    async with serving() as stack, open_channel(stack.router.address) as channel:
        path = "/inference_router.v1.InferenceRouterService/Predict"
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        for data in (b"\xff\xff\xff", b"\x0a\x04\x0a\x02\xff\xfe"):  # no wire format; a name that is no UTF-8
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call(data)
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert failed.value.details() == "the request cannot be read as a PredictRequest"


async def test_a_text_that_no_status_can_hold_is_cut_and_keeps_its_code() -> None:
    """gRPC percent-encodes a status' text; past 8 KiB the caller got RESOURCE_EXHAUSTED instead of the real code."""
    name = "\N{GRINNING FACE}" * 250
    async with serving(model={"match": {"model_name": "churn"}}, limits={"max_name_length": 2_000}) as stack:
        error = await fails(stack.stub, pb.PredictRequest(agents={"a": agent(1, model=name * 4)}))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert len(str(error.details())) > 300


async def test_equal_rows_of_many_requests_are_computed_once_and_their_answer_is_kept() -> None:
    gate = Gate()
    model = {"deterministic": True, "cache_ttl_s": 60.0}
    async with serving(gate.mock(), model=model) as stack:
        request = pb.PredictRequest(
            agents={"alice": agent(1, 2), "bob": agent(1, 2), "carol": agent(3, 4)}, explain=True
        )
        calls = [asyncio.ensure_future(stack.stub.Predict(request)) for _ in range(8)]
        await stack.until_gauge("router_open_calls", len(calls))
        gate.open()
        responses = [*await asyncio.gather(*calls), await stack.stub.Predict(request)]
        alice, carol = truth("churn", [[1, 2], [3, 4]])
        for response in responses:
            assert [list(response.results[name].output) for name in ("alice", "bob", "carol")] == [
                [alice],
                [alice],
                [carol],
            ]
        assert [batch.rows for batch in stack.mock.batches] == [2]
        told = [response.results["carol"].explanation for response in responses]
        assert {one.batch_id for one in told} == {told[0].batch_id}
        assert [one.attempts for one in told] == [1] * 8 + [0]
        assert stack.count("router_shared_rows_total", backend="mock") == 22
        assert stack.count("router_cached_rows_total", backend="mock") == 3
