"""Agents sent again where they were pushed back, with a router that does what the test says."""

import asyncio
import struct
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence

import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client import Agent, AgentError, AgentResult, InvalidArgument, ResourceExhausted, Unavailable
from router_client.prediction import CallOptions, Predictor
from router_client.retry import RetryPolicy

pytestmark = pytest.mark.anyio

FULL = AgentResult([], AgentError("RESOURCE_EXHAUSTED", "full", 1000))
DONE = AgentResult([1.0])
ANN, BOB = Agent("m", [1.0]), Agent("m", [2.0])


class ScriptedRouter:
    """Answers each call with the next of `script`; keeps when it was asked, for whom, and with which time left."""

    def __init__(self, *script: Mapping[str, AgentResult]) -> None:
        self._script = deque(script)
        self.calls: list[tuple[float, list[str], float | None]] = []

    async def predict(
        self, agents: Mapping[str, Agent], *, timeout_s: float | None, **_: object
    ) -> dict[str, AgentResult]:
        self.calls.append((asyncio.get_running_loop().time(), list(agents), timeout_s))
        return {name: result for name, result in self._script.popleft().items() if name in agents}

    async def stream(
        self, blocks: Sequence[pb.Block], *, timeout_s: float | None, **_: object
    ) -> AsyncGenerator[pb.Answer, None]:
        """One answer for each row, which is told by its value: 1 is ann's, 2 is bob's."""
        values = struct.unpack(f"<{blocks[0].rows}f", blocks[0].vectors)
        names = [{1.0: "ann", 2.0: "bob"}[value] for value in values]
        self.calls.append((asyncio.get_running_loop().time(), names, timeout_s))
        results = self._script.popleft()
        for at, name in enumerate(names):
            yield wire(results[name], at, is_last=at == len(names) - 1)


def wire(result: AgentResult, at: int, *, is_last: bool) -> pb.Answer:
    answer = pb.Answer(first_row=at, rows=1, done=is_last)
    if result.error is None:
        answer.outputs = struct.pack("<f", result.output[0])
    else:
        pushback_ms = result.error.retry_pushback_ms
        error = pb.Error(code=result.error.code, message=result.error.message, retry_pushback_ms=pushback_ms)
        answer.error.CopyFrom(error)
    return answer


def predictor(router: ScriptedRouter, retries: int = 2) -> Predictor:
    return Predictor(router, RetryPolicy(retries), chance=lambda: 0.0)


async def test_agents_that_are_answered_are_sent_once() -> None:
    router = ScriptedRouter({"ann": DONE, "bob": DONE})
    results = await predictor(router).predict({"bob": BOB, "ann": ANN}, CallOptions())
    assert list(results) == ["bob", "ann"]
    assert router.calls == [(0.0, ["bob", "ann"], None)]


async def test_only_who_was_pushed_back_is_sent_again_after_that_time() -> None:
    router = ScriptedRouter({"ann": FULL, "bob": DONE}, {"ann": DONE})
    results = await predictor(router).predict({"ann": ANN, "bob": BOB}, CallOptions(timeout_s=5.0))
    assert results.errors == {}
    assert list(results) == ["ann", "bob"]
    assert router.calls == [(0.0, ["ann", "bob"], 5.0), (1.0, ["ann"], 4.0)]


async def test_after_the_last_retry_the_refusal_stands() -> None:
    router = ScriptedRouter(*[{"ann": FULL}] * 3)
    with pytest.raises(ResourceExhausted) as caught:
        await predictor(router).predict({"ann": ANN}, CallOptions())
    assert caught.value.retry_after_s == 1.0
    assert [at for at, *_ in router.calls] == [0.0, 1.0, 2.0]


async def test_who_cannot_wait_so_long_is_told_at_once() -> None:
    router = ScriptedRouter({"ann": FULL, "bob": DONE})
    results = await predictor(router).predict({"ann": ANN, "bob": BOB}, CallOptions(timeout_s=1.0))
    assert results["ann"] == FULL
    assert asyncio.get_running_loop().time() == 0.0


async def test_an_error_without_a_time_is_final() -> None:
    full = AgentResult([], AgentError("RESOURCE_EXHAUSTED", "never"))
    router = ScriptedRouter({"ann": full, "bob": DONE})
    assert (await predictor(router).predict({"ann": ANN, "bob": BOB}, CallOptions()))["ann"] == full


async def test_what_may_have_been_executed_is_not_sent_again() -> None:
    """Rows of a model with `retries: 0`, lost with its server, were executed three times; the router names a time."""
    lost = AgentResult([], AgentError("UNAVAILABLE", "the replica was lost", 1000))
    router = ScriptedRouter({"ann": lost}, {"ann": lost})
    with pytest.raises(Unavailable, match="was lost"):
        await predictor(router).predict({"ann": ANN}, CallOptions())
    assert [item async for item in predictor(router).stream({"ann": ANN}, CallOptions())] == [("ann", lost)]
    assert len(router.calls) == 2


async def test_no_agents_are_no_failure() -> None:
    assert dict(await predictor(ScriptedRouter({})).predict({}, CallOptions())) == {}


async def test_a_stream_yields_each_agent_once_and_who_was_pushed_back_later() -> None:
    router = ScriptedRouter({"ann": FULL, "bob": DONE}, {"ann": DONE})
    agents = {"ann": ANN, "bob": BOB}
    arrived = [
        (asyncio.get_running_loop().time(), name, result)
        async for name, result in predictor(router).stream(agents, CallOptions(timeout_s=5.0))
    ]
    assert arrived == [(0.0, "bob", DONE), (1.0, "ann", DONE)]
    assert router.calls[1] == (1.0, ["ann"], 4.0)


async def test_a_stream_tells_refusals_in_the_end_and_does_not_raise() -> None:
    router = ScriptedRouter({"ann": FULL})
    arrived = [item async for item in predictor(router, retries=0).stream({"ann": ANN}, CallOptions())]
    assert arrived == [("ann", FULL)]


async def test_an_agent_that_cannot_be_sent_is_told_first() -> None:
    router = ScriptedRouter({"ann": DONE})
    bad = Agent("m", ["x"])  # type: ignore[list-item]
    arrived = [item async for item in predictor(router).stream({"ann": ANN, "bad": bad}, CallOptions())]
    assert [name for name, _ in arrived] == ["bad", "ann"]
    with pytest.raises(InvalidArgument):
        await predictor(ScriptedRouter({"bad": arrived[0][1]})).predict({"bad": bad}, CallOptions())
