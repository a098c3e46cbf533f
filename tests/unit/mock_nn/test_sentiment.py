"""The text model as a function, and the reading of its requests."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from mock_nn.models import BadInputError
from mock_nn.sentiment import answer, first_numbers, metadata, read_texts, score
from protos.open_inference import open_inference_pb2 as pb
from tests.builders import decode_texts, encode_texts

TEXTS = ("This product is amazing!", "I hate it.", "")


def request_of(
    raw: tuple[bytes, ...] = (encode_texts(*TEXTS),),
    shape: tuple[int, ...] = (3,),
    name: str = "text",
    datatype: str = "BYTES",
    contents: pb.InferTensorContents | None = None,
    outputs: tuple[str, ...] = (),
) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=contents)
    requested = [pb.ModelInferRequest.InferRequestedOutputTensor(name=output) for output in outputs]
    return pb.ModelInferRequest(
        model_name="sentiment", id="7", inputs=[tensor], outputs=requested, raw_input_contents=raw
    )


@pytest.mark.parametrize(
    ("text", "label", "compound"),
    [
        ("This product is amazing!", "positive", 0.6239),
        ("I hate it.", "negative", -0.5719),
        ("", "positive", 0.0),
        ("The table has four legs.", "positive", 0.0),
        ("I ❤ 名前", "positive", 0.6369),
    ],
)
def test_confidence_is_half_of_one_and_the_compounds_size(text: str, label: str, compound: float) -> None:
    told, confidence = score(text)
    assert told == label
    assert confidence == pytest.approx((1 + abs(compound)) / 2)


WORDS = ("good", "bad", "not", "never", "so", "this", "but", "kind", "of", "the", "shit", "yeah", "right", "bomb", "x")


PLAIN = SentimentIntensityAnalyzer()


@settings(deadline=None)  # the first text loads the lexicon
@given(st.lists(st.sampled_from((*WORDS, "no", "without", "doubt", "LEAST", "❤", "😀", "very!")), max_size=30))
def test_what_makes_it_fast_changes_no_score(words: list[str]) -> None:
    text = " ".join(words)
    compound = PLAIN.polarity_scores(text)["compound"]
    assert score(text) == ("negative" if compound < 0 else "positive", (1 + abs(compound)) / 2)


def test_ten_thousand_emoji_take_no_minute() -> None:
    """VADER copied all words for each of them: this took 52 s."""
    assert score("😀" * 10_000)[0] == "positive"


def test_both_outputs_come_raw_and_by_default() -> None:
    response = answer(request_of(), TEXTS).infer_response
    assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
        ("sentiment", "BYTES", [3]),
        ("confidence", "FP32", [3]),
    ]
    assert decode_texts(response.raw_output_contents[0]) == ["positive", "negative", "positive"]
    numbers = np.frombuffer(response.raw_output_contents[1], "<f4")
    assert numbers.tolist() == pytest.approx([0.81195, 0.78595, 0.5])
    assert (response.id, response.model_name, response.model_version) == ("7", "sentiment", "1")


def test_a_text_is_answered_alike_whatever_stands_around_it() -> None:
    alone, among = answer(request_of(), TEXTS[:1]), answer(request_of(), TEXTS)
    one = alone.infer_response.raw_output_contents[1]
    assert among.infer_response.raw_output_contents[1][:4] == one


@pytest.mark.parametrize("names", [("confidence",), ("confidence", "sentiment")])
def test_outputs_that_are_asked_for_come_in_their_order(names: tuple[str, ...]) -> None:
    response = answer(request_of(outputs=names), TEXTS).infer_response
    assert tuple(output.name for output in response.outputs) == names
    assert len(response.raw_output_contents) == len(names)


def test_texts_are_read_raw_and_typed() -> None:
    assert read_texts(request_of()) == list(TEXTS)
    typed = pb.InferTensorContents(bytes_contents=[text.encode() for text in TEXTS])
    assert read_texts(request_of(raw=(), contents=typed)) == list(TEXTS)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.ModelInferRequest(model_name="sentiment"), "expected 1 input but got 0 inputs for model 'sentiment'"),
        (request_of(name="vector"), "unexpected inference input 'vector' for model 'sentiment'"),
        (request_of(datatype="FP32"), "input 'text' has datatype 'FP32', must be BYTES"),
        (request_of(shape=(3, 1)), r"input 'text' has shape \[3, 1\], must be \[rows\] with at least 1"),
        (request_of(shape=(0,)), r"must be \[rows\] with at least 1"),
        (request_of(shape=(-1,)), r"must be \[rows\] with at least 1"),
        (request_of(shape=(2,)), r"shape \[2\] takes 2 texts, got 3"),
        (request_of(shape=(4,)), r"shape \[4\] takes 4 texts, got 3"),
        (request_of(raw=()), r"shape \[3\] takes 3 texts, got 0"),
        (request_of(raw=(b"", b"")), "expected 1 entry of raw_input_contents but got 2"),
        (request_of(contents=pb.InferTensorContents()), "has both raw_input_contents and contents"),
        (request_of(raw=(encode_texts("abc") + b"\1\0",)), "the length of text 1 is cut off"),
        (request_of(raw=(struct.pack("<I", 9) + b"abc",)), "text 0 of 9 bytes is cut off after 3"),
        (request_of(raw=(struct.pack("<I2sI1s", 2, b"ok", 1, b"\xff"),), shape=(2,)), "text 1 is no UTF-8"),
        (request_of(outputs=("output",)), "unexpected inference output 'output' for model 'sentiment'"),
    ],
)
def test_what_is_no_text_is_told(request_: pb.ModelInferRequest, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read_texts(request_)


def test_a_text_that_is_a_number_can_be_a_faults_value() -> None:
    numbers = first_numbers(["666", " -1.5 ", "words", "", "1e39"])
    assert numbers.shape == (5, 1)
    assert numbers[[0, 1, 4], 0].tolist() == [666, -1.5, math.inf]
    assert np.isnan(numbers[2:4]).all()


def test_the_metadata_tells_both_outputs() -> None:
    told = metadata("sentiment")
    assert [(one.name, one.datatype, list(one.shape)) for one in told.inputs] == [("text", "BYTES", [-1])]
    assert [one.name for one in told.outputs] == ["sentiment", "confidence"]
