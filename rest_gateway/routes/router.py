"""The seam to the router: what the routes need of `router_client.RouterClient`, and what tests fake."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from protos.inference_router.v1 import inference_router_pb2 as pb


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
