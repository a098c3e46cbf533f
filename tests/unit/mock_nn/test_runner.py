"""Batches on the loop: instances, latencies, the record, cancellation. No socket and no time: sleeps are gates."""

import asyncio
import logging
from typing import NoReturn

import numpy as np
import pytest

from mock_nn.config import MockConfig, parse_config
from mock_nn.models import expected
from mock_nn.runner import CRASH_EXIT_CODE, BatchError, DroppedError, Runner
from protos.open_inference import open_inference_pb2 as pb
from router.core.batch import check
from router.core.types import Tensor
from router.errors import Malformed
from tests.builders import decode_texts, encode_texts

pytestmark = pytest.mark.anyio

ROWS = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Gate:
    """A sleep that ends when the test says so."""

    def __init__(self) -> None:
        self.sleepers: list[tuple[float, asyncio.Future[None]]] = []

    async def __call__(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self.sleepers.append((seconds, woken))
        await woken

    def open_next(self) -> None:
        self.sleepers.pop(0)[1].set_result(None)


class CrashedError(Exception):
    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def crash(exit_code: int) -> NoReturn:
    raise CrashedError(exit_code)


def runner_with(flags: str, gate: Gate | None = None) -> Runner:
    return Runner(parse_config(flags.split()), gate or Gate(), crash)


def batch_request(batch_id: str, model_name: str = "m", agent_type: str = "") -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROWS.shape)
    request = pb.ModelInferRequest(
        model_name=model_name, id=batch_id, inputs=[tensor], raw_input_contents=[ROWS.tobytes()]
    )
    if agent_type:
        request.parameters["agent_type"].string_param = agent_type
    return request


def text_request(*texts: str) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[len(texts)])
    return pb.ModelInferRequest(
        model_name="sentiment", id="t", inputs=[tensor], raw_input_contents=[encode_texts(*texts)]
    )


async def start(runner: Runner, request: pb.ModelInferRequest) -> asyncio.Task[list[pb.ModelStreamInferResponse]]:
    """Run a batch up to the point where it waits for something."""
    task = asyncio.create_task(runner.infer(request))
    await asyncio.sleep(0)
    return task


async def test_a_batch_is_answered_and_recorded() -> None:
    runner = runner_with("--latency 0")
    (message,) = await runner.infer(batch_request("b1", agent_type="cat"))
    assert message.infer_response.raw_output_contents[0] == expected("m", "cat", ROWS).tobytes()
    (batch,) = runner.record
    assert (batch.model, batch.agent_type, batch.rows, batch.dim, batch.batch_id) == ("m", "cat", 2, 3, "b1")
    assert batch.fault == ""


async def test_no_latency_is_no_sleep() -> None:
    gate = Gate()
    await runner_with("--latency 0", gate).infer(batch_request("b1"))
    assert gate.sleepers == []


async def test_a_batch_takes_the_latency_of_its_model() -> None:
    gate = Gate()
    runner = runner_with("--latency 4 --latency fast=2", gate)
    tasks = [await start(runner, batch_request(name, model_name=name)) for name in ("slow", "fast")]
    assert [seconds for seconds, _ in gate.sleepers] == [4, 2]
    gate.open_next()
    gate.open_next()
    await asyncio.gather(*tasks)


async def test_two_instances_run_two_batches_of_a_model_and_the_third_waits_its_turn() -> None:
    gate = Gate()
    runner = runner_with("--latency 1 --instances 2", gate)
    tasks = [await start(runner, batch_request(f"b{number}")) for number in range(4)]
    assert (len(gate.sleepers), runner.arrived) == (2, 4)
    gate.open_next()
    await tasks[0]
    await asyncio.sleep(0)
    assert len(gate.sleepers) == 2
    for task in tasks[1:]:
        gate.open_next()
        await task
        await asyncio.sleep(0)
    assert [batch.batch_id for batch in runner.record] == ["b0", "b1", "b2", "b3"]


async def test_instances_are_counted_per_model() -> None:
    gate = Gate()
    runner = runner_with("--latency 1 --instances 1", gate)
    tasks = [await start(runner, batch_request(name, model_name=name)) for name in ("a", "b", "a")]
    assert len(gate.sleepers) == 2
    for task in tasks:
        gate.open_next()
        await task
        await asyncio.sleep(0)


async def test_a_cancelled_batch_frees_its_instance() -> None:
    gate = Gate()
    runner = runner_with("--latency 1 --instances 1", gate)
    gone, waiting = [await start(runner, batch_request(name)) for name in ("gone", "waiting")]
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await asyncio.sleep(0)
    gate.sleepers.pop(0)
    gate.open_next()
    await waiting
    assert [batch.batch_id for batch in runner.record] == ["gone", "waiting"]


async def test_a_stalled_batch_holds_its_instance_until_its_caller_leaves() -> None:
    runner = runner_with("--latency 0 --instances 1 --fault stall:first=1")
    stalled, waiting = [await start(runner, batch_request(name)) for name in ("stalled", "waiting")]
    assert not waiting.done()
    stalled.cancel()
    await waiting
    assert [batch.fault for batch in runner.record] == ["stall", ""]


async def test_arrivals_can_be_waited_for() -> None:
    runner = runner_with("--latency 0 --fault stall")
    waits = [asyncio.create_task(runner.wait_for_arrivals(count)) for count in (1, 2)]
    await asyncio.sleep(0)
    tasks = [await start(runner, batch_request("b1"))]
    await waits[0]
    assert not waits[1].done()
    tasks.append(await start(runner, batch_request("b2")))
    await waits[1]
    await runner.wait_for_arrivals(2)
    for task in tasks:
        task.cancel()


async def test_a_cancelled_wait_for_arrivals_harms_nobody() -> None:
    runner = runner_with("--latency 0")
    gone = asyncio.create_task(runner.wait_for_arrivals(1))
    await asyncio.sleep(0)
    gone.cancel()
    await runner.infer(batch_request("b1"))
    assert runner.arrived == 1


@pytest.mark.parametrize(
    ("fault", "code", "ends_stream"),
    [
        ("error", "INTERNAL", False),
        ("error:code=UNAVAILABLE", "UNAVAILABLE", True),
        ("poison:value=4", "INVALID_ARGUMENT", False),
        ("poison:value=4,code=INTERNAL", "INTERNAL", True),
    ],
)
async def test_a_failing_model_names_its_status(fault: str, code: str, ends_stream: bool) -> None:
    with pytest.raises(BatchError) as failed:
        await runner_with(f"--latency 0 --fault {fault}").infer(batch_request("b1"))
    assert (failed.value.code, failed.value.ends_stream) == (code, ends_stream)


async def test_a_dropped_batch_is_not_answered() -> None:
    runner = runner_with("--latency 0 --fault drop")
    with pytest.raises(DroppedError):
        await runner.infer(batch_request("b1"))
    assert [batch.fault for batch in runner.record] == ["drop"]


async def test_a_crash_strikes_after_the_latency() -> None:
    gate = Gate()
    task = await start(runner_with("--latency 1 --fault crash:value=4", gate), batch_request("b1"))
    gate.open_next()
    with pytest.raises(CrashedError) as crashed:
        await task
    assert crashed.value.exit_code == CRASH_EXIT_CODE


@pytest.mark.parametrize(
    ("flags", "model_name", "code", "message"),
    [
        ("--models a,b", "x", "NOT_FOUND", "Request for unknown model: 'x' is not found"),
        ("", "", "NOT_FOUND", "Request for unknown model: '' is not found"),
        ("--max-batch-size 1", "m", "INVALID_ARGUMENT", "inference request batch-size must be <= 1 for 'm', got 2"),
    ],
)
async def test_a_refused_batch_does_not_arrive(flags: str, model_name: str, code: str, message: str) -> None:
    runner = runner_with(f"--latency 0 {flags}")
    with pytest.raises(BatchError) as refused:
        await runner.infer(batch_request("b1", model_name))
    assert (refused.value.code, str(refused.value)) == (code, message)
    assert (runner.arrived, len(runner.record)) == (0, 0)


async def test_a_batch_of_the_greatest_size_is_run() -> None:
    await runner_with("--latency 0 --max-batch-size 2").infer(batch_request("b1"))


async def test_a_long_text_is_cut_so_that_it_fits_into_a_status() -> None:
    runner = runner_with("--latency 0")
    request = batch_request("b1")
    request.inputs[0].datatype = "X" * 100_000
    with pytest.raises(BatchError) as refused:
        await runner.infer(request)
    assert len(str(refused.value)) == 1000


async def test_the_record_is_bounded() -> None:
    runner = runner_with("--latency 0 --quiet")
    request = batch_request("b1")
    for _ in range(10_001):
        await runner.infer(request)
    assert (len(runner.record), runner.arrived) == (10_000, 10_001)


async def test_each_batch_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mock_nn"):
        await runner_with("--latency 0").infer(batch_request("b1", agent_type="cat"))
    (record,) = caplog.records
    fields: dict[str, object] = vars(record)["fields"]
    assert list(fields) == ["model", "agent_type", "rows", "dim", "batch_id", "seconds", "fault"]
    assert fields["batch_id"] == "b1"


async def test_quiet_logs_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mock_nn"):
        await runner_with("--latency 0 --quiet").infer(batch_request("b1"))
    assert caplog.records == []


async def test_the_same_seed_strikes_the_same_batches() -> None:
    async def struck(config: MockConfig) -> list[str]:
        runner = Runner(config, Gate(), crash)
        for _ in range(50):
            await runner.infer(batch_request("b1"))
        return [batch.fault for batch in runner.record]

    flags = ["--latency", "0", "--fault", "nan:rate=0.5", "--seed"]
    first, again, other = [await struck(parse_config([*flags, seed])) for seed in ("1", "1", "2")]
    assert first == again
    assert first != other


async def test_texts_are_answered_and_recorded() -> None:
    runner = runner_with("--latency 0")
    (message,) = await runner.infer(text_request("good", "bad"))
    assert decode_texts(message.infer_response.raw_output_contents[0]) == ["positive", "negative"]
    (batch,) = runner.record
    assert (batch.model, batch.agent_type, batch.rows, batch.dim) == ("sentiment", "", 2, 1)


async def test_the_text_model_takes_five_seconds_and_is_no_model_of_vectors() -> None:
    gate = Gate()
    runner = runner_with("", gate)
    task = await start(runner, text_request("good"))
    assert [seconds for seconds, _ in gate.sleepers] == [5.0]
    gate.open_next()
    await task
    with pytest.raises(BatchError, match="unexpected inference input 'x' for model 'sentiment'"):
        await runner.infer(batch_request("b1", "sentiment"))


async def test_texts_that_cannot_be_read_are_refused() -> None:
    request = text_request("good")
    request.raw_input_contents[0] = b"\xff"
    with pytest.raises(BatchError) as refused:
        await runner_with("--latency 0").infer(request)
    assert (refused.value.code, str(refused.value)) == (
        "INVALID_ARGUMENT",
        "input 'text': the length of text 0 is cut off",
    )


async def test_named_models_are_the_only_ones() -> None:
    with pytest.raises(BatchError, match="unknown model: 'sentiment'"):
        await runner_with("--latency 0 --models a,b").infer(text_request("good"))
    await runner_with("--latency 0 --models a,sentiment").infer(text_request("good"))


async def test_a_poison_text_is_a_number() -> None:
    runner = runner_with("--latency 0 --fault poison:model=sentiment")
    await runner.infer(text_request("six hundred"))
    await runner.infer(batch_request("b1"))
    with pytest.raises(BatchError, match="cannot compute one of the rows"):
        await runner.infer(text_request("fine", "666"))


@pytest.mark.parametrize("fault", ["short", "wrong_shape", "wrong_datatype", "missing_output"])
async def test_a_bad_answer_to_texts_is_recognised_by_the_router(fault: str) -> None:
    (message,) = await runner_with(f"--latency 0 --fault {fault}").infer(text_request("good", "so so", "bad"))
    response = message.infer_response
    outputs = tuple(
        Tensor(output.name, output.datatype, tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    )
    with pytest.raises(Malformed):
        check(outputs, 3)
    if fault == "short":
        check(outputs, 2)


async def test_nan_strikes_the_confidence_of_the_first_text() -> None:
    (message,) = await runner_with("--latency 0 --fault nan").infer(text_request("good", "bad"))
    response = message.infer_response
    assert np.isnan(np.frombuffer(response.raw_output_contents[1], "<f4")).tolist() == [True, False]
    assert decode_texts(response.raw_output_contents[0]) == ["positive", "negative"]
