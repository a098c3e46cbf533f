"""The Open Inference Protocol's methods as a client calls them, beside its streams. Must not know how streams are kept.

Each is one RPC over the connection of a stream: what becomes of it when the router leaves or its connection is lost is
told in unary.py.
"""

import asyncio
from collections.abc import Sequence
from math import inf, isnan
from operator import attrgetter
from typing import Any

from protos.inference_router.v1 import inference_router_pb2 as native_pb
from protos.open_inference import open_inference_pb2 as pb
from router_client.stream import Metadata, Method, Request, Response
from router_client.tensors import InferError, Tensor, from_response, to_request
from router_client.unary import StreamFinder, UnaryRequest

TENANT_KEY = "x-tenant"
REQUEST_ID_KEY = "x-request-id"
TIMEOUT_PARAMETER = "timeout"
MICROSECONDS = 1_000_000

_MODEL_INFER: Method[pb.ModelInferRequest, pb.ModelInferResponse] = attrgetter("ModelInfer")
_SERVER_READY: Method[pb.ServerReadyRequest, pb.ServerReadyResponse] = attrgetter("ServerReady")
_SERVER_METADATA: Method[pb.ServerMetadataRequest, pb.ServerMetadataResponse] = attrgetter("ServerMetadata")
_MODEL_READY: Method[pb.ModelReadyRequest, pb.ModelReadyResponse] = attrgetter("ModelReady")
_MODEL_METADATA: Method[pb.ModelMetadataRequest, pb.ModelMetadataResponse] = attrgetter("ModelMetadata")
_MODEL_CONFIG: Method[pb.ModelConfigRequest, pb.ModelConfigResponse] = attrgetter("ModelConfig")
_REPOSITORY_INDEX: Method[pb.RepositoryIndexRequest, pb.RepositoryIndexResponse] = attrgetter("RepositoryIndex")


class InferRequest(UnaryRequest[pb.ModelInferRequest, pb.ModelInferResponse]):
    """A `ModelInfer`, which tells the model server behind the router, too, how much time is left."""

    def _stamp(self, left_s: float) -> None:
        self._request.parameters[TIMEOUT_PARAMETER].int64_param = max(int(left_s * MICROSECONDS), 1)


class OpenInferenceMethods(StreamFinder):
    """What `RouterClient` has of the protocol; it finds the streams.

    Every method raises InferError when it has no answer. ``timeout_s`` is seconds from now. A cancelled caller leaves
    no request behind: its RPC is cancelled.
    """

    def __init__(self, router_wait_s: float) -> None:
        self._router_wait_s = router_wait_s
        # State: what is under way beside the streams, of any method.
        self._requests: set[UnaryRequest[Any, Any]] = set()

    async def model_infer(
        self, request: pb.ModelInferRequest, *, timeout_s: float | None = None, tenant: str = "", request_id: str = ""
    ) -> pb.ModelInferResponse:
        """Send a request as it stands and return the answer, which is raw for every output.

        Args:
            request: less than 16 MiB. Where there is a ``timeout_s``, its parameter ``timeout`` is overwritten.
            timeout_s: seconds from now; None: what the request's parameters say, or the router's default.
            tenant: on whose account the rows count; printable ASCII.
            request_id: for the router's logs, instead of the request's own id; printable ASCII.

        Raises:
            InferError: there is no answer for all rows. One failed row fails its request.
        """
        metadata = _metadata(tenant, request_id)
        deadline = _deadline(timeout_s)
        return await self._await(
            InferRequest(
                self, _MODEL_INFER, request, metadata=metadata, deadline=deadline, router_wait_s=self._router_wait_s
            )
        )

    async def infer_tensors(
        self,
        model_name: str,
        inputs: Sequence[Tensor],
        *,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        priority_class: native_pb.PriorityClass.ValueType = native_pb.PRIORITY_CLASS_UNSPECIFIED,
        tenant: str = "",
        request_id: str = "",
        agent_type: str = "",
    ) -> list[Tensor]:
        """Send rows of any tensors to a model, as one `ModelInfer` beside the stream, and return its outputs.

        Args:
            model_name: the model.
            inputs: the same number of rows in each, along its first dimension; together less than 16 MiB.
            outputs: the names of those to return, in this order; all when empty.
            timeout_s: seconds from now; the router's default when None.
            priority_class: how urgent the rows are.
            tenant: on whose account they count; printable ASCII.
            request_id: for the router's logs.
            agent_type: rows of different types never share a batch.

        A cancelled caller leaves no request behind: its RPC is cancelled.

        Raises:
            InferError: there is no answer for all rows. One failed row fails its request.
        """
        try:
            message = to_request(model_name, inputs, outputs, priority_class, request_id, agent_type)
        except ValueError as exc:
            raise InferError("INVALID_ARGUMENT", str(exc)) from exc
        return from_response(await self.model_infer(message, timeout_s=timeout_s, tenant=tenant))

    async def server_ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the router says that it is ready for requests."""
        return (await self._ask(_SERVER_READY, pb.ServerReadyRequest(), timeout_s)).ready

    async def server_metadata(self, *, timeout_s: float | None = None) -> pb.ServerMetadataResponse:
        """Return the router's name, version and extensions of the protocol."""
        return await self._ask(_SERVER_METADATA, pb.ServerMetadataRequest(), timeout_s)

    async def model_ready(self, name: str, version: str = "", *, timeout_s: float | None = None) -> bool:
        """Return whether a model can be asked now."""
        return (await self._ask(_MODEL_READY, pb.ModelReadyRequest(name=name, version=version), timeout_s)).ready

    async def model_metadata(
        self, name: str, version: str = "", *, timeout_s: float | None = None
    ) -> pb.ModelMetadataResponse:
        """Return a model's versions, inputs and outputs."""
        return await self._ask(_MODEL_METADATA, pb.ModelMetadataRequest(name=name, version=version), timeout_s)

    async def model_config(self, name: str, version: str = "", *, timeout_s: float | None = None) -> pb.ModelConfig:
        """Return what Triton would call the model's configuration, as far as the router knows it."""
        return (await self._ask(_MODEL_CONFIG, pb.ModelConfigRequest(name=name, version=version), timeout_s)).config

    async def repository_index(
        self, *, is_ready: bool = False, timeout_s: float | None = None
    ) -> pb.RepositoryIndexResponse:
        """Return the models that the router knows of; only those that are ready where ``is_ready``."""
        return await self._ask(_REPOSITORY_INDEX, pb.RepositoryIndexRequest(ready=is_ready), timeout_s)

    async def _ask(self, method: Method[Request, Response], question: Request, timeout_s: float | None) -> Response:
        deadline = _deadline(timeout_s)
        return await self._await(
            UnaryRequest(self, method, question, deadline=deadline, router_wait_s=self._router_wait_s)
        )

    async def _await(self, request: UnaryRequest[Request, Response]) -> Response:
        self._requests.add(request)
        try:
            return await request.send()
        finally:
            self._requests.discard(request)


def _deadline(timeout_s: float | None) -> float:
    """Return the loop's time that is ``timeout_s`` seconds from now; never, when it is None."""
    if timeout_s is None:
        return inf
    if isnan(timeout_s):
        raise InferError("INVALID_ARGUMENT", "timeout_s is not a number")
    return asyncio.get_running_loop().time() + timeout_s


def _metadata(tenant: str, request_id: str) -> Metadata:
    told = ((TENANT_KEY, "tenant", tenant), (REQUEST_ID_KEY, "request_id", request_id))
    for _, name, text in told:
        if not (text.isascii() and text.isprintable()):
            raise InferError("INVALID_ARGUMENT", f"{name} is not printable ASCII")
    return tuple((key, text) for key, _, text in told if text)
