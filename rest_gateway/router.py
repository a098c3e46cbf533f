"""The seam to the router: what routes and jobs need of `router_client.RouterClient`, and what tests fake."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.open_inference import open_inference_pb2 as oip


class Connected(Protocol):
    """Cancelling the task, or closing the iterator, of whatever is asked cancels it at the router."""

    @property
    def is_connected(self) -> bool:
        """Whether a stream to the router is open."""
        ...


class Infers(Connected, Protocol):
    """Never raises for a failed call: a whole call's failure is an answer without rows, with an error and `done`."""

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


class Router(Infers, Protocol):
    """What agents that are waited for need."""

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


class OpenInferenceRouter(Connected, Protocol):
    """What /v2 needs. Everything raises `router_client.InferError`."""

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
