"""One request's way to the router and back, whatever the form of its answer."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TypedDict

from starlette.types import Scope

from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.convert import PRIORITY_CLASSES, OpenCall, Outcome
from rest_gateway.errors import Fault
from rest_gateway.metrics import Metrics
from rest_gateway.router import Router
from rest_gateway.routes import problems
from rest_gateway.routes.record import record_of
from rest_gateway.schemas.predict import PredictCall

Settled = list[tuple[str, Outcome]]


class CallOptions(TypedDict):
    """What travels beside the blocks; the keywords of `Router.infer` and `Router.stream`."""

    timeout_s: float | None
    priority_class: pb.PriorityClass.ValueType
    tenant: str
    explain: bool
    request_id: str


class Prediction:
    """A call that stands, and the router that answers it. Every name is settled exactly once, and counted then."""

    def __init__(self, router: Router, metrics: Metrics, scope: Scope, call: PredictCall, tenant: str) -> None:
        self.names = call.names
        self._router = router
        self._metrics = metrics
        self._scope = scope
        self._faults = call.faults
        self._open_call = OpenCall(call.rows)
        record = record_of(scope)
        record.agents = len(call.names)
        self._options = CallOptions(
            timeout_s=call.timeout_s,
            priority_class=PRIORITY_CLASSES[call.priority_class],
            tenant=tenant,
            explain=call.explain,
            request_id=record.request_id,
        )

    async def infer(self) -> dict[str, Outcome]:
        """Waits for everyone's outcome. The router is not asked when no agent can travel."""
        settled: Settled = list(self._faults.items())
        if self._open_call.blocks:
            for answer in await self._router.infer(self._open_call.blocks, **self._options):
                settled += self._open_call.take(answer)
        return dict(self._count(settled) + self.fail_rest(_NO_ANSWER))

    async def stream(self) -> AsyncGenerator[Settled, None]:
        """Yields outcomes as they come, the gateway's own first. To be closed, which cancels the call."""
        if self._faults:
            yield self._count(list(self._faults.items()))
        if self._open_call.blocks:
            async with aclosing(self._router.stream(self._open_call.blocks, **self._options)) as answers:
                async for answer in answers:
                    yield self._count(self._open_call.take(answer))
        yield self.fail_rest(_NO_ANSWER)

    def fail_rest(self, fault: Fault) -> Settled:
        """Settles everyone who still waits for the router."""
        return self._count(self._open_call.fail_rest(fault))

    def _count(self, settled: Settled) -> Settled:
        faults = [outcome for _, outcome in settled if isinstance(outcome, Fault)]
        self._metrics.count_agents("OK", len(settled) - len(faults))
        if faults:
            self._note_faults(faults)
        return settled

    def _note_faults(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self._metrics.count_agents(problems.known_code(fault.code), 1)
            record_of(self._scope).failed_agents += 1
        problems.log_internal(self._scope, faults)


_NO_ANSWER = Fault("INTERNAL", "the call ended without an answer for this agent")
