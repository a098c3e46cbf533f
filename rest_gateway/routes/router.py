"""The seam to the router: what the routes need of `router_client.RouterClient`, and what tests fake."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.open_inference import open_inference_pb2 as oip


class Router(Protocol):
    """Never raises for a failed call: a whole call's failure is an answer without rows, with an error and `done`.

    Cancelling the task, or closing the iterator, cancels the call at the router.
    """

    @property
    def is_connected(self) -> bool:
        """Whether a stream to the router is open."""
        ...

    async def infer(
        self,
        blocks: Sequence[pb.Block],
        *,
        timeout_s: float | None = None,
        priority_class: pb.PriorityClass.ValueType = ...,
        tenant: str = "",
        explain: bool = False,
        request_id: str = "",
    ) -> list[pb.Answer]:
        """All answers of a call."""
        ...

    def stream(
        self,
        blocks: Sequence[pb.Block],
        *,
        timeout_s: float | None = None,
        priority_class: pb.PriorityClass.ValueType = ...,
        tenant: str = "",
        explain: bool = False,
        request_id: str = "",
    ) -> AsyncGenerator[pb.Answer, None]:
        """Each answer as it arrives; ends after the one that is done."""
        ...


class OpenInferenceRouter(Protocol):
    """The router's side of /v2. Everything raises `router_client.InferError`; cancelling the task cancels the RPC."""

    @property
    def is_connected(self) -> bool:
        """Whether a stream to the router is open."""
        ...

    async def model_infer(
        self, request: oip.ModelInferRequest, *, timeout_s: float | None = None, tenant: str = "", request_id: str = ""
    ) -> oip.ModelInferResponse:
        """The answer to a request, raw for every output."""
        ...

    async def server_ready(self, *, timeout_s: float | None = None) -> bool:
        """The router's own word."""
        ...

    async def server_metadata(self, *, timeout_s: float | None = None) -> oip.ServerMetadataResponse:
        """Name, version and extensions."""
        ...

    async def model_ready(self, name: str, version: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether a model can be asked now."""
        ...

    async def model_metadata(
        self, name: str, version: str = "", *, timeout_s: float | None = None
    ) -> oip.ModelMetadataResponse:
        """Versions, inputs and outputs."""
        ...

    async def model_config(self, name: str, version: str = "", *, timeout_s: float | None = None) -> oip.ModelConfig:
        """What Triton would call its configuration."""
        ...

    async def repository_index(
        self, *, is_ready: bool = False, timeout_s: float | None = None
    ) -> oip.RepositoryIndexResponse:
        """The models that the router knows of."""
        ...
