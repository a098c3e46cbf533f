"""Rows to the wire's blocks, and the router's outcomes to what JSON says of an agent. Pure: no loop, no HTTP."""

from collections.abc import Iterable

import numpy as np

from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.errors import Fault
from rest_gateway.schemas.predict import PriorityClass, Row
from router_client import Roster, group

PRIORITY_CLASSES: dict[PriorityClass, pb.PriorityClass.ValueType] = {
    "interactive": pb.PRIORITY_CLASS_INTERACTIVE,
    "batch": pb.PRIORITY_CLASS_BATCH,
}

_FLOAT32 = np.dtype("<f4")

# An agent's result, ready for `json_text.dump` ({"output": (width,) float32, "explanation": {…}}), or its fault.
Outcome = dict[str, object] | Fault


class OpenCall:
    """The blocks of one call, and the agents that wait for an outcome; each gets exactly one."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.blocks, names = group(rows)
        self._roster = Roster(names)

    def take(self, answer: pb.Answer) -> list[tuple[str, Outcome]]:
        """The agents that this answer settles, with their outcomes."""
        rows = self._roster.take(answer)
        outputs = [output for _, output, why in rows if type(output) is bytes and why is None]
        if len(outputs) < len(rows) or not rows:
            return [(name, _outcome(output, why)) for name, output, why in rows]
        # The usual case: rows of one matrix, each of which is a view of it; an array of its own would cost three times.
        matrix = np.frombuffer(b"".join(outputs), _FLOAT32).reshape(len(rows), -1)
        return [(name, {"output": output}) for (name, _, _), output in zip(rows, matrix, strict=True)]

    def fail_rest(self, fault: Fault) -> list[tuple[str, Outcome]]:
        """Settles everyone who still waits."""
        if not self._roster.agents_left:
            return []
        return [(name, fault) for name, *_ in self._roster.fail_rest(pb.Error(code=fault.code))]


def _outcome(output: bytes | pb.Error, explanation: pb.Explanation | None) -> Outcome:
    if isinstance(output, pb.Error):
        return _fault(output)
    result: dict[str, object] = {"output": np.frombuffer(output, _FLOAT32)}
    if explanation is not None:
        result["explanation"] = _explanation(explanation)
    return result


def _fault(error: pb.Error) -> Fault:
    retry_after_s = error.retry_pushback_ms / 1000 if error.HasField("retry_pushback_ms") else None
    return Fault(error.code, error.message, retry_after_s)


def _explanation(explanation: pb.Explanation) -> dict[str, object]:
    return {
        "queued_s": explanation.queued_s,
        "backend_s": explanation.backend_s,
        "batch_id": explanation.batch_id,
        "batch_rows": explanation.batch_rows,
        "replica": explanation.replica,
        "attempts": explanation.attempts,
    }
