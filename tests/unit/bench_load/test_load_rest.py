"""The REST load: its bodies stand at the gateway, and it notices an answer that is not whole."""

import ast
import json
import random

import pytest

from bench.load_rest import KINDS, MODELS, Kind, draw_agents, draw_kind, find_fault
from rest_gateway.config import Settings
from rest_gateway.schemas.predict import Limits, PredictCall, parse_predict
from tools.run import ROOT

JSON, _, NDJSON, SSE = KINDS
NAMES = ["agent-0", "agent-1"]
WHOLE = {name: {"output": [0.5]} for name in NAMES}
EVENTS: list[dict[str, object]] = [{"agent": name, "output": [0.5]} for name in NAMES]
DONE: dict[str, object] = {"done": True}
FAILED: dict[str, object] = {"agent": "agent-1", "error": {"code": "UNAVAILABLE"}}


def as_json(results: dict[str, object], errors: dict[str, object] | None = None) -> bytes:
    return json.dumps({"results": results, "errors": errors or {}}).encode()


def as_ndjson(events: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def as_sse(events: list[dict[str, object]]) -> bytes:
    return b"".join(b"event: any\ndata: " + json.dumps(event).encode() + b"\n\n" for event in events)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_the_gateway_finds_no_fault_in_a_body(kind: Kind) -> None:
    defaults = Settings.model_construct()
    limits = Limits(defaults.max_agents, defaults.max_vector_length, defaults.max_name_length)
    body = json.dumps({"agents": draw_agents(kind.agents, random.Random(1))}).encode()
    call = parse_predict(body, limits)
    assert isinstance(call, PredictCall)
    assert (len(call.rows), call.faults) == (kind.agents, {})


def test_sixteen_agents_ask_every_model_and_one_agent_asks_any() -> None:
    rng = random.Random(1)
    assert {agent["model_name"] for agent in draw_agents(16, rng).values()} == set(MODELS)
    assert {draw_agents(1, rng)["agent-0"]["model_name"] for _ in range(100)} == set(MODELS)


def test_every_kind_is_drawn() -> None:
    rng = random.Random(1)
    assert {draw_kind(rng) for _ in range(200)} == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "body"),
    [(JSON, as_json({**WHOLE})), (NDJSON, as_ndjson([*EVENTS, DONE])), (SSE, as_sse([*reversed(EVENTS), DONE]))],
)
def test_a_whole_answer_has_no_fault(kind: Kind, body: bytes) -> None:
    assert find_fault(kind, 200, body, NAMES) is None


@pytest.mark.parametrize(
    ("kind", "status", "body", "fault"),
    [
        (JSON, 503, b"", "status 503"),
        (JSON, 200, b"<html>", "cannot be read: JSONDecodeError"),
        (JSON, 200, b"{}", "cannot be read: KeyError"),
        (JSON, 200, as_json({"agent-0": {"output": [1]}}), "1 answers to 2 agents, or other names"),
        (JSON, 200, as_json({**WHOLE, "agent-1": {"output": []}}), "an agent without output"),
        (JSON, 200, as_json({"agent-0": {"output": [1]}}, {"agent-1": {"code": "X"}}), "agent failed: X"),
        (NDJSON, 200, as_ndjson(EVENTS), "cannot be read: ValueError"),
        (NDJSON, 200, as_ndjson([EVENTS[0], EVENTS[0], DONE]), "2 answers to 2 agents, or other names"),
        (NDJSON, 200, b"", "cannot be read: ValueError"),
        (SSE, 200, as_sse([EVENTS[0], FAILED, DONE]), "agent failed: UNAVAILABLE"),
        (SSE, 200, as_sse([*EVENTS, DONE])[:-10], "cannot be read: ValueError"),
        (SSE, 200, as_ndjson([*EVENTS, DONE]), "cannot be read: ValueError"),
    ],
)
def test_each_kind_of_fault_is_told(kind: Kind, status: int, body: bytes, fault: str) -> None:
    assert find_fault(kind, status, body, NAMES) == fault


def test_the_locustfile_names_only_what_is_there() -> None:
    """locust is not in .venv, so nothing else looks at it here."""
    tree = ast.parse((ROOT / "bench/locustfile.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "locust"]
    assert [node.module for node in imported] == ["bench.load_rest"]
    assert {alias.name for alias in imported[0].names} == {"draw_agents", "draw_kind", "find_fault"}
