"""Questions: what one server is asked beside batches: whether it lives, what models it has, what they are.

Foreign servers know some of these questions and not others; one that a server does not know, or fails at, is answered
with "nobody tells". Only silence is a loss.
"""

import asyncio
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

# About a model. Longer than most batches; one that is lost is the prober's business.
ANSWER_S = 30.0

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
        """All at once: many servers block their loop while they compute, and answer in the gaps between two batches.

        Of a model that is not ready, servers may refuse everything else; Triton says UNAVAILABLE then.
        """
        ask, of = self._stub, {"name": name, "version": version}
        ready, metadata, config = await asyncio.gather(
            self._hear(ask.ModelReady(pb.ModelReadyRequest(**of), timeout=ANSWER_S), is_of_model=True),
            self._hear(ask.ModelMetadata(pb.ModelMetadataRequest(**of), timeout=ANSWER_S), is_of_model=True),
            self._hear(ask.ModelConfig(pb.ModelConfigRequest(**of), timeout=ANSWER_S)),
            return_exceptions=True,
        )
        is_unready = isinstance(ready, pb.ModelReadyResponse) and not ready.ready
        state = ModelState.UNREADY if is_unready else ModelState.READY
        for answer in (ready, metadata, config):
            if isinstance(answer, BaseException) and not (is_unready and isinstance(answer, StreamLost)):
                raise answer
        if not isinstance(metadata, pb.ModelMetadataResponse):
            return ModelReport(state)
        return ModelReport(
            state, to_info(metadata, config.config if isinstance(config, pb.ModelConfigResponse) else None)
        )

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
