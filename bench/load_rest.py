"""What the REST load sends, and whether an answer is whole. For locustfile.py; knows no load tool and no network.

Callers draw from a few kinds of request: one agent or sixteen, answered at once or as a stream of events. Agents are
dealt out over four models and two agent types, so that the router has eight keys to batch.
"""

import json
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

MODELS = ("churn", "fraud", "score", "spam")
AGENT_TYPES = ("buyer", "seller")
DIM = 32

# One answer: the agent's name and what is wrong with its answer, None if nothing is.
Answers: TypeAlias = Iterator[tuple[str, str | None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request; of all requests, `weight` in the sum of all weights are of it."""

    title: str
    agents: int
    accept: str
    weight: int


KINDS = (
    Kind("JSON, 1 agent", 1, "application/json", 4),
    Kind("JSON, 16 agents", 16, "application/json", 4),
    Kind("NDJSON, 16 agents", 16, "application/x-ndjson", 1),
    Kind("SSE, 16 agents", 16, "text/event-stream", 1),
)


def draw_kind(rng: random.Random) -> Kind:
    """One of `KINDS`, by weight."""
    return rng.choices(KINDS, [kind.weight for kind in KINDS])[0]


def draw_agents(count: int, rng: random.Random) -> dict[str, dict[str, object]]:
    """The `agents` of a body: models in turn from one drawn, agent types and values drawn."""
    first = rng.randrange(len(MODELS))
    return {
        f"agent-{number}": {
            "vector": [round(rng.uniform(-1, 1), 4) for _ in range(DIM)],
            "model_name": MODELS[(first + number) % len(MODELS)],
            "agent_type": rng.choice(AGENT_TYPES),
        }
        for number in range(count)
    }


def find_fault(kind: Kind, status: int, body: bytes, names: Collection[str]) -> str | None:
    """What is wrong with the answer to a request for `names`; None: each has its output, once."""
    if status != 200:
        return f"status {status}"
    try:
        answers = list(_READERS[kind.accept](body))
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        return f"cannot be read: {type(exc).__name__}"
    for _, fault in answers:
        if fault:
            return fault
    answered = [name for name, _ in answers]
    if sorted(answered) != sorted(names):
        return f"{len(answered)} answers to {len(names)} agents, or other names"
    return None


def _read_json(body: bytes) -> Answers:
    document = json.loads(body)
    for name, result in document["results"].items():
        yield name, _check_output(result)
    for name, error in document["errors"].items():
        yield name, f"agent failed: {error['code']}"


def _read_ndjson(body: bytes) -> Answers:
    return _read_events([json.loads(line) for line in body.splitlines()])


def _read_sse(body: bytes) -> Answers:
    """The gateway writes two lines an event: `event: …`, `data: …`."""
    return _read_events([json.loads(event.split(b"\ndata: ", 1)[1]) for event in body.split(b"\n\n")[:-1]])


def _read_events(events: list[Any]) -> Answers:
    """An event for each agent, then `{"done": true}`; without that the stream was cut."""
    *answers, last = events
    if last != {"done": True}:
        raise ValueError("no done")
    for answer in answers:
        if "error" in answer:
            yield answer["agent"], f"agent failed: {answer['error']['code']}"
        else:
            yield answer["agent"], _check_output(answer)


def _check_output(result: dict[str, object]) -> str | None:
    return None if result.get("output") else "an agent without output"


_READERS: dict[str, Callable[[bytes], Answers]] = {
    "application/json": _read_json,
    "application/x-ndjson": _read_ndjson,
    "text/event-stream": _read_sse,
}
