"""Questions: what one server is asked beside batches: whether it lives, what models it has, what they are.

Foreign servers know some of these questions and not others; one that a server does not know, or fails at, is answered
with "nobody tells". Only silence is a loss.
"""

from collections.abc import Awaitable
from typing import TypeVar

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router.core.model_info import IndexEntry, ModelInfo, ModelReport, ModelState, TensorInfo
from router.core.pulse import Sign
from router.dispatch.wire import LOST
from router.errors import StreamLost

# About a model; the silence of a server that computes is the prober's business.
ANSWER_S = 3.0

A = TypeVar("A")


class Questions:
    """Asks one server."""

    def __init__(self, stub: "pb_grpc.GRPCInferenceServiceAsyncStub", address: str) -> None:
        self._stub = stub
        self._address = address

    async def probe(self) -> Sign:
        """See member.Backend. It lives if it says so."""
        try:
            live = await self._hear(self._stub.ServerLive(pb.ServerLiveRequest()))
            if live is not None and not live.live:
                return Sign.NONE
            ready = await self._hear(self._stub.ServerReady(pb.ServerReadyRequest()))
        except StreamLost:
            return Sign.NONE
        return Sign.READY if ready is None or ready.ready else Sign.UNREADY

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        """See member.Backend."""
        try:
            return await self._describe(*model)
        except _Absent:
            return ModelReport(ModelState.ABSENT)

    async def _describe(self, name: str, version: str) -> ModelReport:
        """Of a model that is not ready, servers may refuse everything else; Triton says UNAVAILABLE then."""
        question = pb.ModelReadyRequest(name=name, version=version)
        ready = await self._hear(self._stub.ModelReady(question, timeout=ANSWER_S), is_of_model=True)
        state = ModelState.UNREADY if ready is not None and not ready.ready else ModelState.READY
        try:
            return ModelReport(state, await self._info(name, version))
        except StreamLost:
            if state is ModelState.READY:
                raise
            return ModelReport(state)

    async def _info(self, name: str, version: str) -> ModelInfo | None:
        question = pb.ModelMetadataRequest(name=name, version=version)
        metadata = await self._hear(self._stub.ModelMetadata(question, timeout=ANSWER_S), is_of_model=True)
        if metadata is None:
            return None
        config = await self._hear(
            self._stub.ModelConfig(pb.ModelConfigRequest(name=name, version=version), timeout=ANSWER_S)
        )
        return to_info(metadata, config.config if config is not None else None)

    async def index(self) -> tuple[IndexEntry, ...]:
        """See member.Backend."""
        answer = await self._hear(self._stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=ANSWER_S))
        return tuple(map(_entry, answer.models if answer is not None else ()))

    async def _hear(self, answer: Awaitable[A], *, is_of_model: bool = False) -> A | None:
        """An answer; None where the server does not know the question, or fails at it.

        Raises StreamLost; and _Absent if it `is_of_model`, and the server knows no such model.
        """
        try:
            return await answer
        except grpc.aio.AioRpcError as error:
            if error.code() in LOST:
                raise StreamLost(f"{self._address}: {error.details()}") from error
            if is_of_model and error.code() is grpc.StatusCode.NOT_FOUND:
                raise _Absent from error
            return None


class _Absent(Exception):
    """The server knows no such model."""


def to_info(metadata: pb.ModelMetadataResponse, config: pb.ModelConfig | None) -> ModelInfo:
    """A model's metadata, with what only Triton's configuration tells."""
    optional = {tensor.name for tensor in config.input if tensor.optional} if config else set()
    return ModelInfo(
        metadata.name,
        metadata.platform,
        tuple(metadata.versions),
        tuple(_tensor(tensor, is_optional=tensor.name in optional) for tensor in metadata.inputs),
        tuple(_tensor(tensor, is_optional=False) for tensor in metadata.outputs),
        max_batch_size=config.max_batch_size if config else None,
        is_decoupled=bool(config and config.model_transaction_policy.decoupled),
        is_sequence=bool(config and config.HasField("sequence_batching")),
    )


def _entry(model: pb.RepositoryIndexResponse.ModelIndex) -> IndexEntry:
    """MLServer says `State.READY` where Triton says `READY`."""
    return IndexEntry(model.name, model.version, model.state.removeprefix("State."), model.reason)


def _tensor(tensor: pb.ModelMetadataResponse.TensorMetadata, *, is_optional: bool) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.datatype, tuple(tensor.shape), is_optional)
