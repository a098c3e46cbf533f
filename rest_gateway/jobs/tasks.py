"""What a job does: asks the router, and says whether the answer is the job's end.

Must not know the store, leases or HTTP. What a failure means:

    RESOURCE_EXHAUSTED    back-pressure: later
    UNAVAILABLE           no router, or no model server: later
    DEADLINE_EXCEEDED     the router's longest timeout is shorter than the job's: later
    CANCELLED             the router gave the call up, not we: later
    every other           the job's end

"Later" is no failure: the worker puts the job back until its own deadline. Where some agents were answered and others
must wait, the answer as it stands is the end when that deadline allows no other try.

Rows are executed at least once: what a run had answered is asked again when the job runs again.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol, TypeAlias
from uuid import UUID

import numpy as np

from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.convert import PRIORITY_CLASSES, OpenCall, Outcome
from rest_gateway.errors import Fault
from rest_gateway.jobs.records import Claimed, JobError
from rest_gateway.router import Infers
from rest_gateway.schemas import json_text
from rest_gateway.schemas.jobs import decode_agents, decode_text
from rest_gateway.schemas.predict import PredictCall, Row
from router_client import InferError, Tensor, bytes_tensor, read_bytes

logger = logging.getLogger(__name__)

LATER = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
SENTIMENT_MODEL = "sentiment"
SENTIMENTS = frozenset({"positive", "negative"})
INTERNAL_MESSAGE = "internal error; the log tells more under this job's id"
# So long before its own deadline a job's calls end, for the answer to be written in time.
MARGIN_S = 0.25
# Between two tries of the agents that were refused while others were answered; longer where the router says so.
AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class End:
    """The job is over: completed, or failed where there is an `error`. `result` is JSON."""

    result: bytes | None
    error: JobError | None = None


@dataclass(frozen=True, slots=True)
class Later:
    """Another try may succeed, not before `after_s` seconds.

    `otherwise`: what to end with when there is no time for one; without it a job just waits until its deadline.
    """

    after_s: float
    reason: str
    otherwise: End | None = None


class Models(Infers, Protocol):
    """What a job needs of `router_client.RouterClient`."""

    async def infer_tensors(
        self,
        model_name: str,
        inputs: Sequence[Tensor],
        *,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        priority_class: pb.PriorityClass.ValueType = ...,
        tenant: str = "",
        request_id: str = "",
    ) -> list[Tensor]:
        """The outputs of a model. Raises InferError."""
        ...


# The end that the outcomes of an `agents` job are, by the job's id and the names in the order of the request.
Render: TypeAlias = Callable[[UUID, Sequence[str], Mapping[str, Outcome]], End]


class Tasks:
    """Runs one attempt of a job."""

    def __init__(self, models: Models, render: Render) -> None:
        self._models = models
        self._render = render

    @property
    def is_ready(self) -> bool:
        """Whether a job would find a router now."""
        return self._models.is_connected

    async def run(self, job: Claimed) -> End | Later:
        """One attempt. Cancelling it cancels its calls."""
        return await (self._run_text(job) if job.kind == "text" else self._run_agents(job))

    async def _run_text(self, job: Claimed) -> End | Later:
        text = decode_text(job.input).text
        try:
            outputs = await self._models.infer_tensors(
                SENTIMENT_MODEL,
                [bytes_tensor("text", [text.encode()])],
                outputs=("sentiment", "confidence"),
                timeout_s=_time_for(job.expires_in_s),
                priority_class=pb.PRIORITY_CLASS_BATCH,
                tenant=job.tenant,
                request_id=str(job.id),
            )
            return End(json_text.dump(_read_sentiment(outputs)))
        except InferError as exc:
            return _judge(job, exc)
        except ValueError as exc:
            return End(None, JobError("UNKNOWN", f"the model {SENTIMENT_MODEL} answered nonsense: {exc}"))

    async def _run_agents(self, job: Claimed) -> End | Later:
        """Asks again for those who were refused as long as each round settles someone."""
        call = decode_agents(job.input)
        expires_s = _now_s() + job.expires_in_s
        outcomes: dict[str, Outcome] = dict(call.faults)
        rows, refused = call.rows, dict[str, Fault]()
        while rows:
            outcomes |= await self._infer(job, call, rows, expires_s - _now_s())
            refused = {row[0]: fault for row in rows if (fault := _reason_for_later(outcomes[row[0]])) is not None}
            pause_s = max(AGAIN_S, _longest_s(refused.values()))
            if len(refused) in (0, len(rows)) or _now_s() + pause_s + MARGIN_S >= expires_s:
                break
            rows = [row for row in rows if row[0] in refused]
            await asyncio.sleep(pause_s)
        end = self._render(job.id, call.names, outcomes)
        if not refused:
            return end
        fault = next(iter(refused.values()))
        return Later(_longest_s(refused.values()), f"{fault.code}: {fault.detail}", None if end.error else end)

    async def _infer(self, job: Claimed, call: PredictCall, rows: Sequence[Row], left_s: float) -> dict[str, Outcome]:
        open_call = OpenCall(rows)
        answers = await self._models.infer(
            open_call.blocks,
            timeout_s=_time_for(left_s),
            priority_class=PRIORITY_CLASSES[call.priority_class],
            tenant=job.tenant,
            explain=call.explain,
            request_id=str(job.id),
        )
        settled = [outcome for answer in answers for outcome in open_call.take(answer)]
        return dict(settled + open_call.fail_rest(Fault("INTERNAL", "the call ended without an answer for this agent")))


def _reason_for_later(outcome: Outcome) -> Fault | None:
    return outcome if isinstance(outcome, Fault) and outcome.code in LATER else None


def _longest_s(faults: Iterable[Fault]) -> float:
    return max((fault.retry_after_s or 0.0 for fault in faults), default=0.0)


def _judge(job: Claimed, exc: InferError) -> End | Later:
    if exc.code == "INTERNAL":
        logger.error("internal error: %s job=%s", exc.message, job.id)
        return End(None, JobError("INTERNAL", INTERNAL_MESSAGE))
    if exc.code not in LATER:
        return End(None, JobError(exc.code, exc.message))
    return Later((exc.retry_pushback_ms or 0) / 1000, f"{exc.code}: {exc.message}")


def _read_sentiment(outputs: Sequence[Tensor]) -> dict[str, object]:
    """`{"sentiment": "positive", "confidence": 0.8129}`. Raises ValueError for any other answer."""
    by_name = {tensor.name: tensor for tensor in outputs}
    if missing := {"sentiment", "confidence"} - by_name.keys():
        raise ValueError(f"without {' and '.join(sorted(missing))}")
    sentiments, confidences = read_bytes(by_name["sentiment"]), np.frombuffer(by_name["confidence"].data, "<f4")
    if len(sentiments) != 1 or len(confidences) != 1:
        raise ValueError(f"{len(sentiments)} sentiments and {len(confidences)} confidences for one text")
    sentiment, (confidence,) = sentiments[0].decode(errors="replace"), confidences
    if sentiment not in SENTIMENTS:
        raise ValueError(f"the sentiment {sentiment[:100]!r}")
    if not isfinite(confidence) or not 0 <= confidence <= 1:
        raise ValueError(f"the confidence {confidence}")
    return {"sentiment": sentiment, "confidence": confidence}  # float32, in its shortest decimal form


def _time_for(left_s: float) -> float:
    """What a call may take when the job has `left_s` seconds."""
    return max(left_s - MARGIN_S, MARGIN_S)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
