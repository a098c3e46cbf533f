"""What a job does with the router's answers: its end, or another try later."""

import asyncio
import json
from collections.abc import Sequence
from uuid import UUID

import numpy as np
import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.jobs.records import Claimed, JobError, Kind
from rest_gateway.jobs.tasks import INTERNAL_MESSAGE, End, Later, Tasks
from rest_gateway.routes.answers import end_of_job
from rest_gateway.schemas.jobs import encode_agents, encode_text
from rest_gateway.schemas.predict import Limits, PredictCall, TextCall, parse_predict
from router_client import Tensor, bytes_tensor, read_bytes
from tests.unit.rest_gateway.fake_router import FakeRouter, Script, failing, sum_answers, tensor_failure

pytestmark = pytest.mark.anyio

TEXT = encode_text(TextCall("This product is amazing!", None))


def job(kind: Kind = "text", data: bytes = TEXT, expires_in_s: float = 60.0) -> Claimed:
    return Claimed(id=UUID(int=7), kind=kind, tenant="acme", attempt=1, input=data, expires_in_s=expires_in_s)


def agents_job(body: str, expires_in_s: float = 60.0) -> Claimed:
    call = parse_predict(body.encode(), Limits(10, 10, 20))
    assert isinstance(call, PredictCall)
    return job("agents", encode_agents(call), expires_in_s)


async def run(router: FakeRouter, claimed: Claimed) -> End | Later:
    return await Tasks(router, end_of_job).run(claimed)


# Texts


async def test_a_text_becomes_a_bytes_row_of_class_batch() -> None:
    router = FakeRouter()
    answer = await run(router, job())
    assert answer == End(b'{"sentiment":"positive","confidence":0.75}')
    ((model_name, inputs, options),) = router.tensor_calls
    assert (model_name, [tensor.name for tensor in inputs]) == ("sentiment", ["text"])
    assert (inputs[0].datatype, inputs[0].shape) == ("BYTES", (1,))
    assert read_bytes(inputs[0]) == [b"This product is amazing!"]
    assert options == {
        "outputs": ("sentiment", "confidence"),
        "timeout_s": 59.75,
        "priority_class": pb.PRIORITY_CLASS_BATCH,
        "tenant": "acme",
        "request_id": str(UUID(int=7)),
    }


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
async def test_back_pressure_and_an_absent_router_are_not_the_end(code: str) -> None:
    assert await run(FakeRouter(tensors=tensor_failure(code, "not now", 1500)), job()) == Later(1.5, f"{code}: not now")


@pytest.mark.parametrize("code", ["UNKNOWN", "NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED"])
async def test_a_models_own_failure_is_the_end_with_its_reason(code: str) -> None:
    router = FakeRouter(tensors=tensor_failure(code, "the model raised ValueError"))
    assert await run(router, job()) == End(None, JobError(code, "the model raised ValueError"))


async def test_the_text_of_an_internal_error_is_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    answer = await run(FakeRouter(tensors=tensor_failure("INTERNAL", "secret")), job())
    assert answer == End(None, JobError("INTERNAL", INTERNAL_MESSAGE))
    assert f"internal error: secret job={UUID(int=7)}" in caplog.text


def outputs(sentiments: Sequence[bytes], *confidences: float) -> list[Tensor]:
    data = np.array(confidences, "<f4").tobytes()
    return [Tensor("confidence", "FP32", (len(confidences),), data), bytes_tensor("sentiment", sentiments)]


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        (outputs([b"positive"], 0.8)[:1], "without sentiment"),
        ([], "without confidence and sentiment"),
        (outputs([b"neutral"], 0.8), "the sentiment 'neutral'"),
        (outputs([b"\xff"], 0.8), "the sentiment '\ufffd'"),
        (outputs([b"positive", b"negative"], 0.8), "2 sentiments and 1 confidences"),
        (outputs([b"positive"], float("nan")), "the confidence nan"),
        (outputs([b"positive"], 1.5), "the confidence 1.5"),
        ([Tensor("confidence", "FP32", (1,), b"123"), bytes_tensor("sentiment", [b"positive"])], "buffer size"),
        ([*outputs([b"positive"], 0.8)[:1], Tensor("sentiment", "BYTES", (1,), b"\x09\0\0\0x")], "cut off"),
    ],
)
async def test_an_answer_that_is_none_is_the_models_failure(answer: list[Tensor], fragment: str) -> None:
    end = await run(FakeRouter(tensors=lambda *_: answer), job())
    assert isinstance(end, End)
    assert end.error is not None
    assert end.error.code == "UNKNOWN"
    assert fragment in end.error.message


async def test_a_cancelled_run_cancels_its_call() -> None:
    router = FakeRouter()
    router.close_gate()
    task = asyncio.create_task(run(router, job()))
    await router.entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert router.cancelled.is_set()


# Agents

TWO = '{"agents": {"b": {"vector": [1, 2], "model_name": "m"}, "a": {"vector": [], "model_name": "m"}}}'
THREE = '{"agents": {"a": {"vector": [1], "model_name": "x"}, "b": {"vector": [2], "model_name": "y"}}}'


async def test_agents_are_answered_as_the_waiting_request_is() -> None:
    router = FakeRouter()
    answer = await run(router, agents_job(TWO[:-1] + ', "priority_class": "batch", "explain": true}'))
    assert isinstance(answer, End)
    assert answer.error is None
    assert json.loads(answer.result or b"") == {
        "results": {"b": {"output": [3.0]}},
        "errors": {
            "a": {"status": 422, "code": "INVALID_ARGUMENT", "detail": "vector is empty", "retry_after_s": None}
        },
    }
    ((_, options),) = router.calls
    assert options == {
        "timeout_s": 59.75,
        "priority_class": pb.PRIORITY_CLASS_BATCH,
        "tenant": "acme",
        "explain": True,
        "request_id": str(UUID(int=7)),
    }


async def test_agents_that_all_fail_fail_the_job_and_tell_why_each() -> None:
    end = await run(FakeRouter(failing("UNKNOWN", "boom")), agents_job(THREE))
    assert isinstance(end, End)
    assert end.error == JobError("UNKNOWN", "boom")
    assert set(json.loads(end.result or b"")["errors"]) == {"a", "b"}


async def test_the_internal_errors_of_agents_have_a_fixed_text(caplog: pytest.LogCaptureFixture) -> None:
    end = await run(FakeRouter(failing("INTERNAL", "secret")), agents_job(THREE))
    assert isinstance(end, End)
    assert end.error == JobError("INTERNAL", INTERNAL_MESSAGE)
    assert b"secret" not in (end.result or b"")
    assert f"internal error: secret job={UUID(int=7)}" in caplog.text


async def test_agents_that_are_all_refused_wait() -> None:
    later = await run(FakeRouter(failing("RESOURCE_EXHAUSTED", "full", 700)), agents_job(THREE))
    assert later == Later(0.7, "RESOURCE_EXHAUSTED: full")


def refusing(*times: int) -> Script:
    """Model y is full for the first so many calls."""
    calls = iter(range(1000))

    def script(blocks: Sequence[pb.Block]) -> list[pb.Answer]:
        answers, number = sum_answers(blocks), next(calls)
        for answer, block in zip(answers, blocks, strict=True):
            if block.model_name == "y" and number < times[0]:
                answer.outputs = b""
                answer.error.CopyFrom(pb.Error(code="RESOURCE_EXHAUSTED", message="full", retry_pushback_ms=2000))
        return answers

    return script


async def test_who_was_refused_is_asked_again_alone_while_others_are_settled() -> None:
    router = FakeRouter(refusing(1))
    end = await run(router, agents_job(THREE))
    assert isinstance(end, End)
    assert list(json.loads(end.result or b"")["results"]) == ["a", "b"]
    assert [[block.model_name for block in blocks] for blocks, _ in router.calls] == [["x", "y"], ["y"]]
    assert asyncio.get_running_loop().time() == 2.0  # the router's push-back


async def test_who_is_refused_again_and_again_lets_the_job_wait_with_what_stands() -> None:
    router = FakeRouter(refusing(1000))
    later = await run(router, agents_job(THREE))
    assert isinstance(later, Later)
    assert (later.after_s, later.reason) == (2.0, "RESOURCE_EXHAUSTED: full")
    assert later.otherwise is not None
    document = json.loads(later.otherwise.result or b"")
    assert (list(document["results"]), list(document["errors"])) == (["a"], ["b"])
    assert len(router.calls) == 2


async def test_without_time_for_another_round_there_is_none() -> None:
    router = FakeRouter(refusing(1))
    later = await run(router, agents_job(THREE, expires_in_s=2.0))
    assert isinstance(later, Later)
    assert later.otherwise is not None
    assert len(router.calls) == 1


def test_a_tensor_of_bytes_comes_back() -> None:
    values = [b"", b"a", "ä\0".encode()]
    assert read_bytes(bytes_tensor("x", values)) == values
    with pytest.raises(ValueError, match="cut off"):
        read_bytes(Tensor("x", "BYTES", (1,), b"\x01\0"))
