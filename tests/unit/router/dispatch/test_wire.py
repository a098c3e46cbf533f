"""Messages to and from a backend, and what its statuses mean."""

import grpc
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.core.batch import rows_of
from router.core.contents import MAX_TYPED, MAX_TYPED_TEXTS
from router.core.elements import scan
from router.core.types import Batch, BatchKey, TensorSpec
from router.core.variable import VariableBlock
from router.dispatch.wire import to_answer, to_outputs, to_request, translate_message, translate_status
from router.errors import BackendError, BackendExhausted, Blame, Malformed, Refused, StreamLost
from tests.builders import Listener, decode_texts, encode_texts, make_batch, make_block, make_key

OutputTensor = pb.ModelInferResponse.InferOutputTensor


def typed(datatype: str, shape: list[int], **contents: object) -> OutputTensor:
    return OutputTensor(
        name="y",
        datatype=datatype,
        shape=shape,
        contents=pb.InferTensorContents(**contents),  # type: ignore[arg-type]
    )


def test_a_batch_is_one_raw_request_with_its_rows_in_front() -> None:
    request = to_request(make_batch(make_block(1, 2, key=make_key(dim=3)).whole()))
    assert (request.model_name, request.id, request.parameters["agent_type"].string_param) == ("m", "b-1", "a")
    assert [(one.name, one.datatype, list(one.shape)) for one in request.inputs] == [("vector", "FP32", [2, 3])]
    assert np.frombuffer(request.raw_input_contents[0], "<f4").tolist() == [1, 1, 1, 2, 2, 2]


def test_a_batch_asks_for_the_outputs_that_its_rows_want_and_else_for_none() -> None:
    wishing, other = make_block(1), make_block(2)
    assert not to_request(make_batch(wishing.whole(), other.whole())).outputs
    wishing.outputs, other.outputs = ("y", "x"), ("z", "x")
    request = to_request(make_batch(wishing.whole(), other.whole()))
    assert [output.name for output in request.outputs] == ["x", "y", "z"]


UNBATCHED = BatchKey(
    "m",
    "",
    "",
    (TensorSpec("x", "FP32", (2, 3)), TensorSpec("s", "INT64", ()), TensorSpec("t", "BYTES", (2,))),
    is_batched=False,
)


def unbatched() -> Batch:
    raw = bytes(24), bytes(8), encode_texts("a", "bc")
    offsets = None, None, scan(raw[2], 1, 2)
    block = VariableBlock(UNBATCHED, 0, 0, 1, raw, UNBATCHED.row_bytes, 0.0, 1.0, Listener(), offsets=offsets)
    return make_batch(block.whole())


def test_a_request_to_a_model_without_batches_goes_as_it_stands() -> None:
    request = to_request(unbatched())
    assert [list(one.shape) for one in request.inputs] == [[2, 3], [], [2]]
    assert list(request.raw_input_contents) == [bytes(24), bytes(8), encode_texts("a", "bc")]


def test_a_model_without_batches_may_answer_in_any_shape() -> None:
    tensors = [("scalar", "FP32", [], bytes(4)), ("none", "FP32", [0], b""), ("wide", "INT16", [3, 2], bytes(12))]
    tensors += [("texts", "BYTES", [2], encode_texts("x", "")), ("text", "BYTES", [], encode_texts("y"))]
    tensors += [("no texts", "BYTES", [2, 0], b"")]
    response = pb.ModelInferResponse(raw_output_contents=[raw for _, _, _, raw in tensors])
    for name, datatype, shape, _ in tensors:
        response.outputs.add(name=name, datatype=datatype, shape=shape)
    answer = to_answer(unbatched(), response, "r:1", 0.0, 1.0)
    assert [output.shape for output in answer.outputs] == [(1,), (1, 0), (1, 3, 2), (1, 2), (1,), (1, 2, 0)]
    assert [rows_of(output, 0, 1).data for output in answer.outputs] == [raw for _, _, _, raw in tensors]


@pytest.mark.parametrize(("shape", "raw"), [([], bytes(8)), ([2], bytes(4)), ([0], bytes(4)), ([-1], b"")])
def test_without_batches_bytes_must_fit_the_shape_all_the_same(shape: list[int], raw: bytes) -> None:
    response = pb.ModelInferResponse(raw_output_contents=[raw])
    response.outputs.add(name="y", datatype="FP32", shape=shape)
    with pytest.raises(Malformed):
        to_answer(unbatched(), response, "r:1", 0.0, 1.0)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_come_raw(datatype: str) -> None:
    response = pb.ModelInferResponse(raw_output_contents=[bytes(8), bytes(4)])
    response.outputs.add(name="wide", datatype=datatype, shape=[2, 2])
    response.outputs.add(name="narrow", datatype=datatype, shape=[2])
    answer = to_answer(make_batch(make_block(1, 2).whole()), response, "r:1", 0.0, 1.0)
    assert [(output.datatype, output.shape) for output in answer.outputs] == [(datatype, (2, 2)), (datatype, (2,))]


@pytest.mark.parametrize(
    ("datatype", "contents", "form", "values"),
    [
        ("BOOL", {"bool_contents": [True, False]}, "?", [True, False]),
        ("INT8", {"int_contents": [-128, 127]}, "i1", [-128, 127]),
        ("UINT16", {"uint_contents": [0, 65535]}, "<u2", [0, 65535]),
        ("INT64", {"int64_contents": [-(2**63), 2**63 - 1]}, "<i8", [-(2**63), 2**63 - 1]),
        ("UINT64", {"uint64_contents": [0, 2**64 - 1]}, "<u8", [0, 2**64 - 1]),
        ("FP32", {"fp32_contents": [0.5, -2]}, "<f4", [0.5, -2]),
        ("FP64", {"fp64_contents": [0.1, -2]}, "<f8", [0.1, -2]),
    ],
)
def test_typed_outputs_are_read_as_raw_ones(
    datatype: str, contents: dict[str, object], form: str, values: list[object]
) -> None:
    (output,) = to_outputs(pb.ModelInferResponse(outputs=[typed(datatype, [2], **contents)]))
    assert (output.name, output.datatype, output.shape) == ("y", datatype, (2,))
    assert np.frombuffer(output.data, form).tolist() == values


def test_typed_texts_are_read_and_so_is_an_output_without_elements() -> None:
    response = pb.ModelInferResponse(
        outputs=[typed("BYTES", [2], bytes_contents=[b"", "ü".encode()]), typed("FP32", [2, 0])]
    )
    texts, nothing = to_outputs(response)
    assert decode_texts(texts.data) == ["", "ü"]
    assert (nothing.shape, nothing.data) == ((2, 0), b"")


@pytest.mark.parametrize(
    ("outputs", "raw", "message"),
    [
        ([typed("FP32", [1]), typed("FP32", [1])], [bytes(4)], "2 outputs and 1 raw contents"),
        ([typed("FP16", [1])], [], "'y' has datatype 'FP16' and no raw contents"),
        ([typed("FLOAT", [1])], [], "'y' has datatype 'FLOAT' and no raw contents"),
        ([typed("INT8", [1], int_contents=[128])], [], "'y': 128 is no INT8"),
    ],
)
def test_outputs_that_are_neither_raw_nor_typed_are_malformed(
    outputs: list[OutputTensor], raw: list[bytes], message: str
) -> None:
    with pytest.raises(Malformed) as malformed:
        to_outputs(pb.ModelInferResponse(outputs=outputs, raw_output_contents=raw))
    assert message in malformed.value.message


@pytest.mark.parametrize(
    ("name", "datatype", "element", "most"),
    [("fp32_contents", "FP32", 0.0, MAX_TYPED), ("bytes_contents", "BYTES", b"", MAX_TYPED_TEXTS)],
)
def test_more_typed_elements_than_are_read_in_one_turn_are_less_with_fewer_rows(
    name: str, datatype: str, element: object, most: int
) -> None:
    def answer(count: int) -> pb.ModelInferResponse:
        return pb.ModelInferResponse(outputs=[typed(datatype, [count], **{name: [element] * count})])

    assert len(to_outputs(answer(most))) == 1
    with pytest.raises(Refused) as refused:
        to_outputs(answer(most + 1))
    assert refused.value.blame is Blame.UNCLEAR
    assert f"at most {most} are read" in refused.value.message


@pytest.mark.parametrize(
    ("code", "details", "kind", "blame"),
    [
        ("UNAVAILABLE", "gone", StreamLost, None),
        ("UNAVAILABLE", "[request id: 7] Exceeds maximum queue size", BackendExhausted, None),
        ("CANCELLED", "by the server", StreamLost, None),
        ("DEADLINE_EXCEEDED", "late", StreamLost, None),
        ("RESOURCE_EXHAUSTED", "queue is full", BackendExhausted, None),
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (5 vs. 4)", Refused, Blame.ROWS),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 5000000", Refused, Blame.ROWS),
        ("RESOURCE_EXHAUSTED", "Received message exceeds the maximum configured message size.", Refused, Blame.ROWS),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5 vs. 4)", Refused, Blame.UNCLEAR),
        ("INVALID_ARGUMENT", "bad", Refused, Blame.ROWS),
        ("NOT_FOUND", "which?", Refused, Blame.MODEL),
        ("UNIMPLEMENTED", "what?", Refused, Blame.MODEL),
        ("UNAUTHENTICATED", "who?", Refused, Blame.MODEL),
        ("INTERNAL", "oh", Refused, Blame.UNCLEAR),
        ("UNKNOWN", "", Refused, Blame.UNCLEAR),
        ("OUT_OF_RANGE", "", Refused, Blame.UNCLEAR),
    ],
)
def test_a_status_tells_what_to_do_with_the_batch(
    code: str, details: str, kind: type[BackendError], blame: Blame | None
) -> None:
    error = translate_status(grpc.StatusCode[code], details, "r:1")
    assert type(error) is kind
    assert (error.blame if isinstance(error, Refused) else None) is blame
    assert details or code in error.message


@pytest.mark.parametrize(
    ("text", "kind", "blame"),
    [
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", StreamLost, None),
        ("Request for unknown model: 'm' has no available versions", Refused, Blame.MODEL),
        ("Server not ready", StreamLost, None),
        ("Exceeds maximum queue size", BackendExhausted, None),
        ("Request for unknown model: 'm' version 1 is not at ready state", StreamLost, None),
        ("my model says: Server is stopping", Refused, Blame.UNCLEAR),
    ],
)
def test_on_a_stream_triton_s_words_are_taken_for_the_status_of_a_call(
    text: str, kind: type[BackendError], blame: Blame | None
) -> None:
    error = translate_message(text, "r:1")
    assert type(error) is kind
    assert (error.blame if isinstance(error, Refused) else None) is blame
    assert text in error.message
