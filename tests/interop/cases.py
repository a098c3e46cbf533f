"""What every client of others must be able to do, told once: a module per client runs it (`class TestInfer(Cases)`)."""

import asyncio
import re
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from mock_nn.models import expected
from mock_nn.sentiment import score
from tests.interop.asking import Answer, Ask, Asked, Given
from tests.interop.model_server import BAD_NUMBER, BAD_ROW
from tests.interop.values import DATATYPES, Array, are_equal, sample, vectors


def rows_for(model: str, rows: Array, **options: object) -> Asked:
    """Rows for a model of the mock."""
    return Asked(model, {"vector": Given("FP32", rows)}, ("output",), options)


def right(model: str, rows: Array, agent_type: str = "") -> Array:
    """What the mock answers."""
    return expected(model, agent_type, rows)


def echo(datatype: str, rows: Array, **options: object) -> Asked:
    """Rows that come back as they are."""
    return Asked(f"echo_{datatype}", {"x": Given(datatype, rows)}, ("y",), options)


def doubled(rows: Array) -> Asked:
    """Rows for the model that refuses some."""
    return Asked("picky", {"x": Given("FP32", rows)}, ("y",))


async def error_of(ask: Ask, asked: Asked) -> InferenceServerException:
    """What the client raises."""
    with pytest.raises(InferenceServerException) as raised:
        await ask.infer(asked)
    return raised.value


class InferCases:
    """Answers."""

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("datatype", DATATYPES)
    async def test_every_datatype_comes_back_bit_by_bit(self, ask: Ask, datatype: str, rows: int) -> None:
        values = sample(datatype, rows)
        answer = await ask.infer(echo(datatype, values))
        got = answer.outputs["y"]
        assert are_equal(_as_bytes(got) if datatype == "BYTES" else got, values)

    @pytest.mark.parametrize("rows", [1, 64, 65, 200])
    async def test_a_request_of_any_number_of_rows_is_one_answer(self, ask: Ask, rows: int) -> None:
        given = vectors(rows)
        answer = await ask.infer(rows_for("churn", given))
        assert are_equal(answer.outputs["output"], right("churn", given))

    async def test_all_outputs_come_where_none_is_asked_for(self, ask: Ask) -> None:
        answer = await ask.infer(combined())
        assert answer.outputs.keys() == {"sum", "product", "label"}
        check_combined(answer)

    @pytest.mark.parametrize("outputs", [("label", "sum"), ("sum", "label"), ("product",)])
    async def test_outputs_that_are_asked_for_come_in_that_order(self, ask: Ask, outputs: tuple[str, ...]) -> None:
        answer = await ask.infer(combined(*outputs))
        assert tuple(answer.outputs) == outputs
        check_combined(answer)

    async def test_texts_are_judged_each_for_itself(self, ask: Ask) -> None:
        texts = ["I love it", "I hate it", "", "so so ☃"]
        given = {"text": Given("BYTES", np.array([text.encode() for text in texts], np.object_))}
        answer = await ask.infer(Asked("sentiment", given, ("sentiment", "confidence")))
        labels = _as_bytes(answer.outputs["sentiment"]).tolist()
        assert [label.decode() for label in labels] == [score(text)[0] for text in texts]
        assert answer.outputs["confidence"].tolist() == [np.float32(score(text)[1]) for text in texts]

    async def test_the_id_of_a_request_stands_in_its_answer(self, ask: Ask) -> None:
        assert (await ask.infer(rows_for("churn", vectors(1), request_id="mine ☃"))).request_id == "mine ☃"

    async def test_the_agent_type_is_a_parameter_that_changes_the_answer(self, ask: Ask) -> None:
        given = vectors(2)
        answer = await ask.infer(rows_for("churn", given, parameters={"agent_type": "buyer"}))
        assert are_equal(answer.outputs["output"], right("churn", given, "buyer"))

    @pytest.mark.parametrize("priority", [1, 2, 7])
    async def test_every_priority_is_answered(self, ask: Ask, priority: int) -> None:
        given = vectors(2)
        answer = await ask.infer(rows_for("churn", given, priority=priority))
        assert are_equal(answer.outputs["output"], right("churn", given))

    async def test_a_version_may_be_asked_for(self, ask: Ask) -> None:
        given = vectors(2)
        answer = await ask.infer(rows_for("churn", given, model_version="1"))
        assert are_equal(answer.outputs["output"], right("churn", given))

    async def test_requests_at_the_same_time_get_their_own_answers(self, ask: Ask) -> None:
        given = [vectors(1 + number % 5, seed=number) for number in range(20)]
        answers = await asyncio.gather(*(ask.infer(rows_for("churn", rows)) for rows in given))
        assert all(
            are_equal(answer.outputs["output"], right("churn", rows))
            for answer, rows in zip(answers, given, strict=True)
        )

    async def test_a_backend_that_is_asked_call_by_call_answers_as_well(self, ask: Ask) -> None:
        values = sample("FP32", 70)
        answer = await ask.infer(echo("FP32", values, parameters={"agent_type": "unary"}))
        assert are_equal(answer.outputs["y"], values)

    async def test_a_model_without_batches_gets_the_request_as_it_stands(self, ask: Ask) -> None:
        answer = await ask.infer(Asked("whole", {"x": Given("FP32", np.ones((5, 3), np.float32))}, ("total",)))
        assert (answer.outputs["total"].shape, answer.outputs["total"].tolist()) == ((1,), [15.0])


def _as_bytes(texts: Array) -> Array:
    """Out of JSON tritonclient makes texts."""
    flat = [text.encode() if isinstance(text, str) else text for text in texts.flat]
    return np.array(flat, np.object_).reshape(texts.shape)


def combined(*outputs: str) -> Asked:
    """Three inputs of three datatypes."""
    return Asked(
        "combine",
        {
            "a": Given("FP32", np.array([[1, 2], [3, 4]], np.float32)),
            "b": Given("INT64", np.array([[10], [20]], np.int64)),
            "name": Given("BYTES", np.array([b"ann", b"bob"], np.object_)),
        },
        outputs,
    )


def check_combined(answer: Answer) -> None:
    """Whichever outputs came are right."""
    outputs: dict[str, Any] = answer.outputs
    wanted = {"sum": [[11, 12], [23, 24]], "product": [[10, 20], [60, 80]], "label": [b"ANN", b"BOB"]}
    for name, values in outputs.items():
        assert (_as_bytes(values) if name == "label" else values).tolist() == wanted[name]


# What is asked, the code of the answer, and what its text tells.
FAULTS = {
    "an unknown model": (rows_for("nobody", vectors(1)), "NOT_FOUND", "nobody"),
    "another row shape": (echo("FP32", vectors(2, dim=4)), "INVALID_ARGUMENT", r"'x'.*4"),
    "another datatype": (
        Asked("echo_FP32", {"x": Given("INT32", np.ones((1, 3), np.int32))}),
        "INVALID_ARGUMENT",
        "'x'.*INT32.*FP32",
    ),
    "an unknown input": (
        Asked("echo_FP32", {"z": Given("FP32", vectors(1, dim=3))}),
        "INVALID_ARGUMENT",
        "'[zx]'",
    ),
    "a missing input": (Asked("combine", dict(list(combined().inputs.items())[:2])), "INVALID_ARGUMENT", "'name'"),
    "an unknown output": (
        Asked("echo_FP32", {"x": Given("FP32", vectors(1, dim=3))}, ("q",)),
        "INVALID_ARGUMENT",
        "'q'",
    ),
    "inputs of different rows": (
        Asked("combine", {**combined().inputs, "b": Given("INT64", np.ones((3, 1), np.int64))}),
        "INVALID_ARGUMENT",
        "'b' has 3 rows",
    ),
    "a sequence": (
        rows_for("churn", vectors(1), sequence_id=7, sequence_start=True),
        "INVALID_ARGUMENT",
        "sequence_",
    ),
    "a timeout": (rows_for("slow", vectors(1), timeout=200_000), "DEADLINE_EXCEEDED", ""),
    "a bad row": (doubled(np.full((1, 3), BAD_NUMBER, np.float32)), "UNKNOWN", BAD_ROW),
    "a bad row among others": (
        doubled(np.array([[1, 1, 1], [BAD_NUMBER, 1, 1], [2, 2, 2]], np.float32)),
        "UNKNOWN",
        BAD_ROW,
    ),
    "a decoupled model": (Asked("decoupled", {"x": Given("FP32", vectors(1, dim=3))}), "UNIMPLEMENTED", "decoupled"),
    "outputs without batches": (
        Asked("headless", {"x": Given("FP32", vectors(1, dim=3))}),
        "UNIMPLEMENTED",
        "'y'.*batching: off",
    ),
}


class FaultCases:
    """Errors, as the client tells them."""

    @pytest.mark.parametrize("fault", FAULTS)
    async def test_a_fault_is_told_by_its_code_and_in_words(self, ask: Ask, fault: str) -> None:
        asked, code, words = FAULTS[fault]
        error = await error_of(ask, asked)
        assert (error.status(), bool(re.search(words, error.message()))) == (ask.status(code), True), error

    async def test_a_bad_row_is_only_its_own_request_s(self, ask: Ask) -> None:
        good = [vectors(2, dim=3, seed=number) for number in range(8)]
        bad = asyncio.ensure_future(error_of(ask, doubled(np.full((1, 3), BAD_NUMBER, np.float32))))
        answers = await asyncio.gather(*(ask.infer(doubled(rows)) for rows in good))
        assert all(are_equal(answer.outputs["y"], 2 * rows) for answer, rows in zip(answers, good, strict=True))
        assert BAD_ROW in (await bad).message()


class ServerCases:
    """What a client can ask about the server and its models; JSON as tritonclient gives it."""

    async def test_the_server_lives_and_is_ready(self, ask: Ask) -> None:
        assert await ask.call("is_server_live") is True
        assert await ask.call("is_server_ready") is True

    async def test_the_server_tells_its_name_and_version(self, ask: Ask) -> None:
        told = await ask.call("get_server_metadata")
        assert told["name"] == "inference-router"
        assert told["version"]

    @pytest.mark.parametrize(
        ("model", "is_ready"), [("churn", True), ("combine", True), ("resting", False), ("nobody", False)]
    )
    async def test_a_model_is_ready_if_its_backend_says_so(self, ask: Ask, model: str, is_ready: bool) -> None:
        assert await ask.call("is_model_ready", model) is is_ready

    async def test_a_model_s_metadata_are_those_of_its_backend(self, ask: Ask) -> None:
        told = await ask.call("get_model_metadata", "combine")
        assert told["name"] == "combine"
        assert {
            tensor["name"]: (tensor["datatype"], [int(size) for size in tensor["shape"]]) for tensor in told["inputs"]
        } == {
            "a": ("FP32", [-1, 2]),
            "b": ("INT64", [-1, 1]),
            "name": ("BYTES", [-1]),
        }
        assert [tensor["name"] for tensor in told["outputs"]] == ["sum", "product", "label"]

    async def test_metadata_of_an_unknown_model_are_not_found(self, ask: Ask) -> None:
        with pytest.raises(InferenceServerException) as raised:
            await ask.call("get_model_metadata", "nobody")
        assert (raised.value.status(), "nobody" in raised.value.message()) == (ask.status("NOT_FOUND"), True)

    async def test_the_index_lists_models_of_every_backend(self, ask: Ask) -> None:
        told = await ask.call("get_model_repository_index")
        states = {entry["name"]: entry["state"] for entry in (told if isinstance(told, list) else told["models"])}
        assert states.keys() >= {"churn", "sentiment", "combine", "echo_BF16", "resting"}
        assert (states["churn"], states["combine"], states["resting"]) == ("READY", "READY", "UNAVAILABLE")

    async def test_a_model_s_configuration_tells_the_rows_of_a_batch(self, ask: Ask) -> None:
        told = await ask.call("get_model_config", "combine")
        assert (told.get("config", told))["max_batch_size"] == 64
