"""Bad rows and bad answers over real gRPC: the mock misbehaves, the router keeps the damage small."""

import asyncio
from collections.abc import Mapping

import grpc
import pytest

from mock_nn.config import parse_fault
from mock_nn.server import MockServer
from protos.inference_router.v1 import inference_router_pb2 as pb
from tests.integration.stack import Stack, Stream, block, floats, mock_config, serving, truth

pytestmark = pytest.mark.anyio

BAD = 666.0


def mock_of(*faults: str) -> MockServer:
    return MockServer(mock_config(*(parse_fault(fault) for fault in faults)))


def agents_of(*values: float) -> pb.PredictRequest:
    agents = {f"{value:g}": pb.Agent(model_name="churn", agent_type="a", vector=[value]) for value in values}
    return pb.PredictRequest(agents=agents, explain=True)


async def predict(stack: Stack, *values: float) -> Mapping[str, pb.AgentResult]:
    return (await stack.stub.Predict(agents_of(*values))).results


def assert_only_the_bad_row_failed(results: Mapping[str, pb.AgentResult], code: str) -> None:
    for name, result in results.items():
        if float(name) == BAD:
            assert (result.error.code, list(result.output)) == (code, [])
        else:
            assert (result.error.code, list(result.output)) == ("", truth("churn", [[float(name)]]))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("poison", "UNKNOWN"),  # an error message on the stream
        ("poison:code=INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        ("poison:code=INTERNAL", "UNKNOWN"),
        ("poison:code=OUT_OF_RANGE", "UNKNOWN"),
        ("row_errors", "UNKNOWN"),
    ],
)
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("protocol", ["stream", "unary"])
async def test_one_bad_row_among_eight_fails_alone_with_the_models_own_error(
    fault: str, code: str, replicas: int, protocol: str
) -> None:
    if (fault, protocol) == ("poison", "unary"):
        code = "INVALID_ARGUMENT"  # a call has a status where a stream has words only
    async with serving(*(mock_of(fault) for _ in range(replicas)), protocol=protocol) as stack:
        results = await predict(stack, *range(7), BAD)
        assert_only_the_bad_row_failed(results, code)
        assert "a fault on demand" in results["666"].error.message
        calls = sum(mock.arrived for mock in stack.mocks)
        assert calls == 1 if fault == "row_errors" else calls <= 1 + 9


@pytest.mark.parametrize("fault", ["poison", "row_errors"])
async def test_the_log_tells_which_model_refused_rows_and_at_which_replica(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(mock_of(fault)) as stack:
        await predict(stack, 1, BAD)
        assert f", 2 rows of model 'churn' at {stack.mocks[0].address}: " in caplog.text


@pytest.mark.parametrize("slots", [1, 4, 16])
async def test_one_bad_row_among_64_costs_at_most_17_calls_more(slots: int) -> None:
    async with serving(mock_of("poison"), mock_of("poison"), max_in_flight=slots) as stack:
        assert_only_the_bad_row_failed(await predict(stack, *range(40), BAD, *range(40, 63)), "UNKNOWN")
        assert sum(mock.arrived for mock in stack.mocks) <= 1 + 17


async def test_bad_rows_of_one_caller_cost_no_other_caller_an_answer() -> None:
    async with serving(mock_of("poison:code=INVALID_ARGUMENT")) as stack:
        stream = Stream(stack.stub)
        values = {1: [1.0, 2.0], 2: [BAD], 3: [3.0, BAD, 4.0], 4: [5.0]}
        calls = [pb.Call(call_id=n, blocks=[block("churn", [[v] for v in rows])]) for n, rows in values.items()]
        await stream.send(*calls)
        rows: dict[tuple[int, int], float | str] = {}
        for answer in await stream.answers(len(calls)):
            for row in range(answer.rows):
                error = answer.error.code
                rows[answer.call_id, answer.first_row + row] = error or floats(answer.outputs)[row]
        assert rows == {
            (call, row): "INVALID_ARGUMENT" if value == BAD else truth("churn", [[value]])[0]
            for call, given in values.items()
            for row, value in enumerate(given)
        }
        assert await stream.close() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "fault",
    ["short", "wrong_shape", "wrong_datatype", "missing_output", "foreign_id", "error", "error:code=INTERNAL", "nan"],
)
async def test_what_one_replica_gets_wrong_another_one_is_asked_for(fault: str) -> None:
    async with serving(mock_of(fault), mock_of(), model={"allow_nan": False}) as stack:
        for _ in range(3):
            assert_only_the_bad_row_failed(await predict(stack, 1, 2, 3), "")
        sick, well = stack.mocks
        assert (sick.arrived > 0, well.arrived) == (True, 3)


@pytest.mark.parametrize("fault", ["short", "wrong_shape", "wrong_datatype", "missing_output", "foreign_id"])
async def test_an_answer_that_every_replica_gets_wrong_fails_its_rows_and_its_stream_is_replaced(fault: str) -> None:
    async with serving(mock_of(f"{fault}:value=666"), mock_of(f"{fault}:value=666")) as stack:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stack.stub.Predict(agents_of(1, BAD))
            assert failed.value.code() is grpc.StatusCode.UNKNOWN
            assert_only_the_bad_row_failed(await predict(stack, 1, 2), "")
        assert max(mock.open_calls for mock in stack.mocks) <= 1


async def test_rows_with_nan_fail_alone_where_it_is_forbidden_and_are_answers_where_it_is_not() -> None:
    async with serving(mock_of("nan"), mock_of("nan"), model={"allow_nan": False}) as stack:
        stream = Stream(stack.stub)
        await stream.send(pb.Call(call_id=1, blocks=[block("churn", [[1], [2], [3]])]))
        bad, good = await stream.answers(1)
        assert (bad.first_row, bad.rows, bad.error.code) == (0, 1, "UNKNOWN")
        assert (good.first_row, floats(good.outputs)) == (1, truth("churn", [[2], [3]]))
    async with serving(mock_of("nan")) as stack:
        assert list((await predict(stack, 1))["1"].output) != truth("churn", [[1]])


async def test_answers_that_come_twice_or_too_late_reach_nobody() -> None:
    async with serving(mock_of("duplicate:every=2", "out_of_order:every=3")) as stack:
        for number in range(20):
            assert_only_the_bad_row_failed(await predict(stack, number, 100 + number), "")


async def test_a_row_that_ends_its_streams_does_so_three_times_and_its_neighbours_survive() -> None:
    async with serving(mock_of("drop:value=666"), mock_of("drop:value=666")) as stack:
        assert_only_the_bad_row_failed(await predict(stack, *range(7), BAD), "UNAVAILABLE")
        assert sum(batch.fault == "drop" for mock in stack.mocks for batch in mock.batches) == 3


async def test_a_caller_that_leaves_while_bad_rows_are_looked_for_leaves_nothing_behind() -> None:
    async with serving(mock_of("poison"), max_in_flight=1) as stack:
        calls = [asyncio.ensure_future(stack.stub.Predict(agents_of(*range(20), BAD))) for _ in range(5)]
        await stack.mock.wait_for_arrivals(3)
        for call in calls[1:]:
            call.cancel()
        assert_only_the_bad_row_failed((await calls[0]).results, "UNKNOWN")
        await stack.until_gauge("router_open_calls", 0)
        assert stack.count("router_queued_rows") == 0
