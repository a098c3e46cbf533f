"""A router for the gateway's tests: sums vectors, and fails, hangs or crashes where a test says so."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.open_inference import open_inference_pb2 as oip
from router_client import InferError, Tensor, bytes_tensor

Script = Callable[[Sequence[pb.Block]], list[pb.Answer]]
TensorScript = Callable[[str, Sequence[Tensor]], list[Tensor]]
InferScript = Callable[[oip.ModelInferRequest], oip.ModelInferResponse]


def sum_answers(blocks: Sequence[pb.Block]) -> list[pb.Answer]:
    """One answer per block; each row's output is the sum of its vector."""
    last = len(blocks) - 1
    return [
        pb.Answer(block=index, rows=block.rows, outputs=_sums(block), done=index == last)
        for index, block in enumerate(blocks)
    ]


def _sums(block: pb.Block) -> bytes:
    rows = np.frombuffer(block.vectors, "<f4").reshape(block.rows, block.dim)
    return bytes(rows.sum(axis=1, dtype="<f4").tobytes())


def failing(code: str, message: str = "no", retry_pushback_ms: int | None = None) -> Script:
    """A script that fails the whole call."""
    error = pb.Error(code=code, message=message, retry_pushback_ms=retry_pushback_ms)
    return lambda _: [pb.Answer(error=error, done=True)]


def failing_by_model(**codes: str) -> Script:
    """A script that fails the blocks of some models (`model_a` for model-a) and sums the others."""

    def script(blocks: Sequence[pb.Block]) -> list[pb.Answer]:
        answers = sum_answers(blocks)
        for answer, block in zip(answers, blocks, strict=True):
            code = codes.get(block.model_name.replace("-", "_"))
            if code is not None:
                answer.outputs = b""
                answer.error.CopyFrom(pb.Error(code=code, message=f"{block.model_name} failed"))
        return answers

    return script


def all_positive(_model_name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every text is positive, with 0.75."""
    (texts,) = inputs
    confidences = np.full(texts.shape, 0.75, "<f4")
    sentiment = bytes_tensor("sentiment", [b"positive"] * texts.shape[0])
    return [sentiment, Tensor("confidence", "FP32", texts.shape, confidences.tobytes())]


def tensor_failure(code: str, message: str = "no", retry_pushback_ms: int | None = None) -> TensorScript:
    """A script that fails each call with tensors."""

    def script(_model_name: str, _inputs: Sequence[Tensor]) -> list[Tensor]:
        raise InferError(code, message, retry_pushback_ms)

    return script


def echo(request: oip.ModelInferRequest) -> oip.ModelInferResponse:
    """The inputs are the outputs; only those that are asked for, in that order."""
    response = oip.ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
    inputs = {
        tensor.name: (tensor, raw) for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }
    for name in [output.name for output in request.outputs] or list(inputs):
        tensor, raw = inputs[name]
        response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(raw)
    return response


def infer_failure(code: str, message: str = "no", retry_pushback_ms: int | None = None) -> InferScript:
    """A script that fails each request of the Open Inference Protocol."""

    def script(_request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        raise InferError(code, message, retry_pushback_ms)

    return script


@dataclass
class FakeRouter:
    """`gate` closed: calls hang, in `stream` before each answer, until `release` is called."""

    script: Script = sum_answers
    is_connected: bool = True
    error: Exception | None = None
    calls: list[tuple[list[pb.Block], dict[str, object]]] = field(default_factory=list)
    tensors: TensorScript = all_positive
    tensor_calls: list[tuple[str, list[Tensor], dict[str, object]]] = field(default_factory=list)
    open_inference: InferScript = echo
    infer_calls: list[tuple[oip.ModelInferRequest, dict[str, object]]] = field(default_factory=list)
    # What is asked of models, in order; what is answered (an InferError is raised).
    questions: list[tuple[str, ...]] = field(default_factory=list)
    answers: dict[str, object] = field(default_factory=dict)
    gate: asyncio.Semaphore | None = None
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def close_gate(self) -> None:
        self.gate = asyncio.Semaphore(0)

    def release(self) -> None:
        """Lets one waiting `infer`, or one answer of a `stream`, pass."""
        assert self.gate is not None
        self.gate.release()

    async def infer(self, blocks: Sequence[pb.Block], **options: object) -> list[pb.Answer]:
        self.calls.append((list(blocks), options))
        await self._pass_gate()
        return self.script(blocks)

    async def infer_tensors(self, model_name: str, inputs: Sequence[Tensor], **options: object) -> list[Tensor]:
        self.tensor_calls.append((model_name, list(inputs), options))
        await self._pass_gate()
        return self.tensors(model_name, inputs)

    async def model_infer(self, request: oip.ModelInferRequest, **options: object) -> oip.ModelInferResponse:
        self.infer_calls.append((request, options))
        await self._pass_gate()
        return self.open_inference(request)

    async def server_ready(self, **_: object) -> bool:
        return bool(await self._answer("server_ready", default=True))

    async def server_metadata(self, **_: object) -> oip.ServerMetadataResponse:
        told = oip.ServerMetadataResponse(name="fake", version="7", extensions=["binary_tensor_data"])
        answer = await self._answer("server_metadata", default=told)
        assert isinstance(answer, oip.ServerMetadataResponse)
        return answer

    async def model_ready(self, name: str, version: str = "", **_: object) -> bool:
        return bool(await self._answer("model_ready", name, version, default=True))

    async def model_metadata(self, name: str, version: str = "", **_: object) -> oip.ModelMetadataResponse:
        default = oip.ModelMetadataResponse(name=name, versions=["1"], platform="test")
        answer = await self._answer("model_metadata", name, version, default=default)
        assert isinstance(answer, oip.ModelMetadataResponse)
        return answer

    async def model_config(self, name: str, version: str = "", **_: object) -> oip.ModelConfig:
        answer = await self._answer("model_config", name, version, default=oip.ModelConfig(name=name))
        assert isinstance(answer, oip.ModelConfig)
        return answer

    async def repository_index(self, *, is_ready: bool = False, **_: object) -> oip.RepositoryIndexResponse:
        entry = oip.RepositoryIndexResponse.ModelIndex(name="m", state="READY")
        default = oip.RepositoryIndexResponse(models=[entry])
        answer = await self._answer("repository_index", str(is_ready), default=default)
        assert isinstance(answer, oip.RepositoryIndexResponse)
        return answer

    async def _answer(self, *question: str, default: object) -> object:
        self.questions.append(question)
        await self._pass_gate()
        answer = self.answers.get(question[0], default)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def stream(self, blocks: Sequence[pb.Block], **options: object) -> AsyncGenerator[pb.Answer, None]:
        self.calls.append((list(blocks), options))
        for answer in self.script(blocks):
            await self._pass_gate()
            yield answer

    async def _pass_gate(self) -> None:
        self.entered.set()
        if self.error is not None:
            raise self.error
        try:
            if self.gate is not None:
                await self.gate.acquire()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
