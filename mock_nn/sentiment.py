"""The text model: what a lexicon says of a text (vaderSentiment). Pure, but for the lexicon that is loaded once.

Input `text` BYTES [n] of UTF-8; outputs for each text, from VADER's compound score between -1 and 1:

    sentiment    BYTES [n]   b"negative" below zero, else b"positive"
    confidence   FP32 [n]    (1 + |compound|) / 2, from 0.5 to 1

This module reads requests as data. It must not know the loop, the clock, gRPC, faults or settings.
"""

import math
import struct
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from mock_nn.models import BadInputError, FloatArray
from protos.open_inference import open_inference_pb2 as pb

INPUT_NAME = "text"
SENTIMENT, CONFIDENCE = "sentiment", "confidence"
OUTPUT_NAMES = (SENTIMENT, CONFIDENCE)

_LENGTH = struct.Struct("<I")


def score(text: str) -> tuple[str, float]:
    """The sentiment of a text, and how sure that is; 10,000 characters take up to some tenths of a second."""
    compound = _compound()(text)
    return "negative" if compound < 0 else "positive", (1 + abs(compound)) / 2


@cache
def _compound() -> Callable[[str], float]:
    """Loaded by the first text (50 ms): who never asks for one, does not wait for it."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 -- see above

    class LinearAnalyzer(SentimentIntensityAnalyzer):  # type: ignore[misc]  # untyped
        """The same, without a copy of all words for each of them: 10,000 emoji took a minute.

        Both checks look at the words next to word i only, so they are given no others.
        """

        @staticmethod
        def _negation_check(valence: float, words: Sequence[str], start_i: int, i: int) -> float:
            near = words[i - start_i - 1 : i]
            return float(SentimentIntensityAnalyzer._negation_check(valence, near, start_i, start_i + 1))  # noqa: SLF001

        @staticmethod
        def _special_idioms_check(valence: float, words: Sequence[str], i: int) -> float:
            near = words[i - 3 : i + 3]
            return float(SentimentIntensityAnalyzer._special_idioms_check(valence, near, 3))  # noqa: SLF001

    analyzer = LinearAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def read_texts(request: pb.ModelInferRequest) -> list[str]:
    """The request's texts, at least one.

    Raises BadInputError for everything else than one input `text` BYTES [n] of UTF-8, raw or typed, and outputs other
    than the model's.
    """
    tensor = _only_input(request)
    for output in request.outputs:
        if output.name not in OUTPUT_NAMES:
            raise BadInputError(f"unexpected inference output '{output.name}' for model '{request.model_name}'")
    elements = _read_elements(request, tensor)
    return [_decode(number, element) for number, element in enumerate(elements)]


def first_numbers(texts: Sequence[str]) -> FloatArray:
    """(rows, 1) float32: the number that a text is ("666"), NaN for words; what the `value=` of faults looks at."""
    with np.errstate(over="ignore"):
        return np.array([[_number(text)] for text in texts]).astype(np.float32)


def answer(request: pb.ModelInferRequest, texts: Sequence[str]) -> pb.ModelStreamInferResponse:
    """The response to a request: the outputs that it asks for, by default both; raw contents always."""
    scores = [score(text) for text in texts]
    raw = {
        SENTIMENT: ("BYTES", b"".join(_LENGTH.pack(len(label)) + label.encode() for label, _ in scores)),
        CONFIDENCE: ("FP32", np.array([confidence for _, confidence in scores], dtype="<f4").tobytes()),
    }
    message = pb.ModelStreamInferResponse()
    response = message.infer_response
    response.model_name = request.model_name
    response.model_version = request.model_version or "1"
    response.id = request.id
    for name in [output.name for output in request.outputs] or OUTPUT_NAMES:
        datatype, contents = raw[name]
        response.outputs.add(name=name, datatype=datatype, shape=(len(texts),))
        response.raw_output_contents.append(contents)
    return message


def metadata(model_name: str) -> pb.ModelMetadataResponse:
    """What the model takes and gives; -1 is any size."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model_name,
        versions=["1"],
        platform="mock_nn",
        inputs=[tensor(name=INPUT_NAME, datatype="BYTES", shape=(-1,))],
        outputs=[
            tensor(name=SENTIMENT, datatype="BYTES", shape=(-1,)),
            tensor(name=CONFIDENCE, datatype="FP32", shape=(-1,)),
        ],
    )


def _only_input(request: pb.ModelInferRequest) -> pb.ModelInferRequest.InferInputTensor:
    if len(request.inputs) != 1:
        raise BadInputError(f"expected 1 input but got {len(request.inputs)} inputs for model '{request.model_name}'")
    tensor = request.inputs[0]
    if tensor.name != INPUT_NAME:
        raise BadInputError(f"unexpected inference input '{tensor.name}' for model '{request.model_name}'")
    if tensor.datatype != "BYTES":
        raise BadInputError(f"input '{tensor.name}' has datatype '{tensor.datatype}', must be BYTES")
    if len(tensor.shape) != 1 or tensor.shape[0] < 1:
        raise BadInputError(f"input '{tensor.name}' has shape {list(tensor.shape)}, must be [rows] with at least 1")
    return tensor


def _read_elements(request: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor) -> list[bytes]:
    rows = tensor.shape[0]
    if not request.raw_input_contents:
        elements = list(tensor.contents.bytes_contents)
    elif len(request.raw_input_contents) != 1:
        raise BadInputError(f"expected 1 entry of raw_input_contents but got {len(request.raw_input_contents)}")
    elif tensor.HasField("contents"):
        raise BadInputError(f"input '{tensor.name}' has both raw_input_contents and contents")
    else:
        elements = _split(request.raw_input_contents[0], tensor.name)
    if len(elements) != rows:
        raise BadInputError(f"input '{tensor.name}': shape [{rows}] takes {rows} texts, got {len(elements)}")
    return elements


def _split(raw: bytes, name: str) -> list[bytes]:
    """Take raw contents apart: a 4-byte little-endian length and the bytes of each element."""
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        begin = position + _LENGTH.size
        if begin > len(raw):
            raise BadInputError(f"input '{name}': the length of text {len(elements)} is cut off")
        position = begin + _LENGTH.unpack_from(raw, position)[0]
        if position > len(raw):
            text = f"text {len(elements)} of {position - begin} bytes is cut off after {len(raw) - begin}"
            raise BadInputError(f"input '{name}': {text}")
        elements.append(raw[begin:position])
    return elements


def _decode(number: int, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise BadInputError(f"input '{INPUT_NAME}': text {number} is no UTF-8") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
