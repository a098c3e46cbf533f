"""The input of a job: the request that stands behind it as canonical JSON, and back. Pure.

Two bodies that mean the same have one input: white space, ignored members and the spelling of numbers are gone (a
vector's values are float32, written in their shortest decimal form). Agents that were at fault keep their fault in
place of their row, so that a job answers exactly what the waiting request would have been answered.

    {"text": "…", "timeout_s": 30.0}
    {"agents": {"alice": {"vector": […], "model_name": "…", "agent_type": "…"}, "bob": {"fault": "vector is empty"}},
     "timeout_s": null, "explain": false, "priority_class": "interactive"}
"""

import hashlib
import json
from typing import Any

import numpy as np
import orjson

from rest_gateway.errors import Fault
from rest_gateway.schemas import json_text
from rest_gateway.schemas.predict import PredictCall, Row, TextCall

_FLOAT32 = np.dtype("<f4")
_AT_FAULT = "INVALID_ARGUMENT"  # the only code that a request's own faults have


def encode_text(call: TextCall) -> bytes:
    """The input of a job of kind `text`."""
    return json_text.dump({"text": call.text, "timeout_s": call.timeout_s})


def decode_text(data: bytes) -> TextCall:
    """What `encode_text` was given."""
    document = _load(data)
    return TextCall(document["text"], document["timeout_s"])


def encode_agents(call: PredictCall) -> bytes:
    """The input of a job of kind `agents`."""
    rows = {row[0]: row for row in call.rows}
    agents = {name: _agent(rows[name]) if name in rows else {"fault": call.faults[name].detail} for name in call.names}
    document = {
        "agents": agents,
        "timeout_s": call.timeout_s,
        "explain": call.explain,
        "priority_class": call.priority_class,
    }
    return json_text.dump(document)


def _agent(row: Row) -> dict[str, object]:
    _, agent_type, model_name, vector = row
    return {"vector": np.frombuffer(vector, _FLOAT32), "model_name": model_name, "agent_type": agent_type}


def decode_agents(data: bytes) -> PredictCall:
    """What `encode_agents` was given."""
    document = _load(data)
    agents: dict[str, dict[str, Any]] = document["agents"]
    return PredictCall(
        names=list(agents),
        rows=[_row(name, agent) for name, agent in agents.items() if "fault" not in agent],
        faults={name: Fault(_AT_FAULT, agent["fault"]) for name, agent in agents.items() if "fault" in agent},
        timeout_s=document["timeout_s"],
        explain=document["explain"],
        priority_class=document["priority_class"],
    )


def _row(name: str, agent: dict[str, Any]) -> Row:
    return name, agent["agent_type"], agent["model_name"], np.array(agent["vector"], _FLOAT32).tobytes()


def fingerprint(kind: str, data: bytes) -> bytes:
    """SHA-256 of a job's kind and input, whatever the order of its members."""
    return hashlib.sha256(kind.encode() + b"\0" + _sorted(data)).digest()


def _sorted(data: bytes) -> bytes:
    try:
        return orjson.dumps(orjson.loads(data), option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # a lone surrogate
        return json.dumps(json.loads(data), sort_keys=True).encode()


def _load(data: bytes) -> Any:  # noqa: ANN401 -- JSON that this module wrote
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:  # a lone surrogate in an agent's name
        return json.loads(data)
