"""A model server of the Open Inference Protocol that does what a test says: any models, any metadata, both protocols.

async with OpenInferenceServer({"m": ServedModel(metadata("m", [("x", "FP32", (-1, 4))], []), infer)}) as server:
    ... server.address, server.requests
"""
# ruff: noqa: N802 -- the protocol names its methods

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import grpc
import grpc.aio
import numpy as np

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc

TensorTuple: TypeAlias = tuple[str, str, Sequence[int]]
Infer: TypeAlias = Callable[[pb.ModelInferRequest], pb.ModelInferResponse]
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


def metadata(name: str, inputs: Iterable[TensorTuple], outputs: Iterable[TensorTuple]) -> pb.ModelMetadataResponse:
    """A model's metadata; tensors as (name, datatype, shape)."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=name,
        versions=["1"],
        platform="test",
        inputs=[tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in inputs],
        outputs=[tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in outputs],
    )


def double(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Twice the first input, FP32, whatever its shape, as output `y`, if that is asked for."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    values = 2 * np.frombuffer(request.raw_input_contents[0], "<f4")
    response.outputs.add(name="y", datatype="FP32", shape=request.inputs[0].shape)
    response.raw_output_contents.append(values.astype("<f4").tobytes())
    return response


@dataclass
class ServedModel:
    """One model. `metadata` None: the server does not tell; `config` None: it is no Triton.

    `infer` may raise `Abort`. May be changed while the server runs.
    """

    metadata: pb.ModelMetadataResponse | None = None
    infer: Infer = double
    config: pb.ModelConfig | None = None
    is_ready: bool = True


class Abort(Exception):
    """What `infer` raises to end a call by a status, or a stream's request by an error message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass
class OpenInferenceServer:
    """Serves `models` on a port of its own. `requests`: what was to be inferred, in order; `asked`: other methods.

    `methods`: those it knows beside ModelInfer and ModelStreamInfer; None: all.
    """

    models: Mapping[str, ServedModel]
    credentials: grpc.ServerCredentials | None = None
    methods: frozenset[str] | None = None
    # Methods that are refused with a status.
    refusals: Mapping[str, grpc.StatusCode] = field(default_factory=dict)
    listen: str = "127.0.0.1:0"
    address: str = ""
    requests: list[pb.ModelInferRequest] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    # Of each ModelInfer the seconds left to its deadline; how many batches were given up by the caller.
    left_s: list[float] = field(default_factory=list)
    lost: int = 0
    # Cleared by a test: calls wait until it is set.
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    _server: grpc.aio.Server | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a server that others have made."""
        self.may_answer.set()
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), server)

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.add_to(self._server)
        if self.credentials is None:
            port = self._server.add_insecure_port(self.listen)
        else:
            port = self._server.add_secure_port(self.listen, self.credentials)
        self.address = f"{self.listen.rpartition(':')[0]}:{port}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(0)


class _Servicer(pb_grpc.GRPCInferenceServiceServicer):
    def __init__(self, around: OpenInferenceServer) -> None:
        self._around = around

    async def _know(self, method: str, context: Context) -> None:
        self._around.asked.append(method)
        if self._around.methods is not None and method not in self._around.methods:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no method {method}")
        if method in self._around.refusals:
            await context.abort(self._around.refusals[method], f"{method} is refused")

    async def _find(self, name: str, context: Context) -> ServedModel:
        if name not in self._around.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {name!r}")
        return self._around.models[name]

    async def ServerLive(self, _request: object, context: Context) -> pb.ServerLiveResponse:
        await self._know("ServerLive", context)
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: object, context: Context) -> pb.ServerReadyResponse:
        await self._know("ServerReady", context)
        return pb.ServerReadyResponse(ready=True)

    async def ServerMetadata(self, _request: object, context: Context) -> pb.ServerMetadataResponse:
        await self._know("ServerMetadata", context)
        return pb.ServerMetadataResponse(name="test", version="1")

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        await self._know("ModelReady", context)
        return pb.ModelReadyResponse(ready=(await self._find(request.name, context)).is_ready)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        await self._know("ModelMetadata", context)
        told = (await self._find(request.name, context)).metadata
        if told is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no metadata")
        return told

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        await self._know("ModelConfig", context)
        config = (await self._find(request.name, context)).config
        if config is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no Triton")
        return pb.ModelConfigResponse(config=config)

    async def RepositoryIndex(self, _request: object, context: Context) -> pb.RepositoryIndexResponse:
        await self._know("RepositoryIndex", context)
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                entry(name=name, version="1", state="READY" if model.is_ready else "UNAVAILABLE")
                for name, model in self._around.models.items()
            ]
        )

    async def _infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        self._around.requests.append(request)
        try:
            await self._around.may_answer.wait()
        except asyncio.CancelledError:
            self._around.lost += 1
            raise
        if request.model_name not in self._around.models:
            raise Abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.model_name!r}")
        return self._around.models[request.model_name].infer(request)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        self._around.left_s.append(context.time_remaining())
        try:
            return await self._infer(request)
        except Abort as error:
            await context.abort(error.code, error.message)

    async def ModelStreamInfer(self, _requests: object, context: Context) -> None:  # type: ignore[override]
        while isinstance(request := await context.read(), pb.ModelInferRequest):
            try:
                message = pb.ModelStreamInferResponse(infer_response=await self._infer(request))
            except Abort as error:
                message = pb.ModelStreamInferResponse(error_message=f"[request id: {request.id}] {error.message}")
            await context.write(message)
