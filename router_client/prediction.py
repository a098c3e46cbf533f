"""Agents over the native stream, asked again where the router pushes back. Must not know the wire but for its blocks.

Only agents that were pushed back are sent again (RESOURCE_EXHAUSTED, with a time), in a call of their own; their
neighbours' answers stand. UNAVAILABLE is not, whatever time it names: `RouterClient` has waited for a router already,
and rows that were lost with their model server may have been executed; how often they may be, the router knows.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypedDict

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client.blocks import Agent, AgentResult, Roster, decode, encode
from router_client.jobs import Priority
from router_client.results import Results, longest_s
from router_client.retry import RetryPolicy, left_s

PRIORITY_CLASSES: dict[Priority, pb.PriorityClass.ValueType] = {
    "interactive": pb.PRIORITY_CLASS_INTERACTIVE,
    "batch": pb.PRIORITY_CLASS_BATCH,
}
_PUSHED_BACK = "RESOURCE_EXHAUSTED"


class Router(Protocol):
    """What is used of RouterClient."""

    async def predict(
        self,
        agents: Mapping[str, Agent],
        *,
        timeout_s: float | None,
        priority_class: pb.PriorityClass.ValueType,
        tenant: str,
        explain: bool,
        request_id: str,
    ) -> dict[str, AgentResult]:
        """Send agents as one call and return their results; never raises for those that fail."""

    def stream(
        self,
        blocks: Sequence[pb.Block],
        *,
        timeout_s: float | None,
        priority_class: pb.PriorityClass.ValueType,
        tenant: str,
        explain: bool,
        request_id: str,
    ) -> AsyncGenerator[pb.Answer, None]:
        """Send blocks as one call and yield its answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What a caller says of a request, as in `AsyncClient.predict`."""

    timeout_s: float | None = None
    priority: Priority = "interactive"
    tenant: str = ""
    explain: bool = False
    request_id: str = ""


class _Arguments(TypedDict):
    timeout_s: float | None
    priority_class: pb.PriorityClass.ValueType
    tenant: str
    explain: bool
    request_id: str


class Rounds:
    """The agents of one request over all of its sendings: which are to be sent next, and when."""

    def __init__(self, agents: Mapping[str, Agent], policy: RetryPolicy) -> None:
        self.agents = dict(agents)  # of the present sending
        self._policy = policy
        self._sent = 0
        self._pushed_back: dict[str, AgentResult] = {}

    def take(self, name: str, result: AgentResult) -> bool:
        """Note a result; return whether it is final. One that is not is kept until `next_delay_s`."""
        error = result.error
        if error is None or error.code != _PUSHED_BACK or error.retry_pushback_ms is None:
            return True
        self._pushed_back[name] = result
        return False

    def next_delay_s(self, left_s: float, chance: float) -> float | None:
        """Begin the next sending: return the seconds until it, None when there is none. Then see `given_up`."""
        self._sent += 1
        if not self._pushed_back:
            return None
        errors = [result.error for result in self._pushed_back.values() if result.error is not None]
        delay_s = self._policy.delay_s(self._sent, longest_s(errors), left_s, chance)
        if delay_s is not None:
            self.agents = {name: self.agents[name] for name in self._pushed_back}
            self._pushed_back = {}
        return delay_s

    def given_up(self) -> dict[str, AgentResult]:
        """Return the results of those that were pushed back and are not sent again."""
        return self._pushed_back


class Predictor:
    """Sends agents over a `Router`, as often as its policy allows. ``chance`` returns a random number below 1."""

    def __init__(self, router: Router, policy: RetryPolicy, *, chance: Callable[[], float] = random.random) -> None:
        self._router = router
        self._policy = policy
        self._chance = chance

    async def predict(self, agents: Mapping[str, Agent], options: CallOptions) -> Results:
        """Return every agent's result. Arguments and errors as in `AsyncClient.predict`."""
        final: dict[str, AgentResult] = {}
        rounds = Rounds(agents, self._policy)
        deadline = _deadline(options)
        while True:
            results = await self._router.predict(rounds.agents, **_arguments(options, deadline))
            final |= {name: it for name, it in results.items() if rounds.take(name, it)}
            if not await self._waits(rounds, deadline):
                break
        final |= rounds.given_up()
        return Results({name: final[name] for name in agents}).raise_for_failure()

    async def stream(
        self, agents: Mapping[str, Agent], options: CallOptions
    ) -> AsyncGenerator[tuple[str, AgentResult], None]:
        """Yield each agent's name and result as it arrives, each agent once."""
        rounds = Rounds(agents, self._policy)
        deadline = _deadline(options)
        is_first = True
        while is_first or await self._waits(rounds, deadline):
            is_first = False
            async with aclosing(self._send(rounds.agents, options, deadline)) as outcomes:
                async for name, result in outcomes:
                    if rounds.take(name, result):
                        yield name, result
        for item in rounds.given_up().items():
            yield item

    async def _send(
        self, agents: Mapping[str, Agent], options: CallOptions, deadline: float | None
    ) -> AsyncGenerator[tuple[str, AgentResult], None]:
        blocks, names, refused = encode(agents)
        for item in refused.items():
            yield item
        if not blocks:
            return
        roster = Roster(names)
        async with aclosing(self._router.stream(blocks, **_arguments(options, deadline))) as answers:
            async for answer in answers:
                for name, outcome, why in roster.take(answer):
                    yield name, decode(outcome, why)

    async def _waits(self, rounds: Rounds, deadline: float | None) -> bool:
        """Wait for the next sending; False when there is none."""
        delay_s = rounds.next_delay_s(left_s(deadline, _now()), self._chance())
        if delay_s is None:
            return False
        await asyncio.sleep(delay_s)
        return True


def _arguments(options: CallOptions, deadline: float | None) -> _Arguments:
    return {
        "timeout_s": None if deadline is None else deadline - _now(),
        "priority_class": PRIORITY_CLASSES[options.priority],
        "tenant": options.tenant,
        "explain": options.explain,
        "request_id": options.request_id,
    }


def _deadline(options: CallOptions) -> float | None:
    return None if options.timeout_s is None else _now() + options.timeout_s


def _now() -> float:
    return asyncio.get_running_loop().time()
