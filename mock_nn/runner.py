"""Runs batches: queue for an instance, take the time, answer or misbehave, keep a record.

It must not know gRPC: a failure is the name of a status and a text, which `server.py` puts on the wire. How an answer
is computed, when a fault strikes and how latencies are distributed is asked of `models.py`, `sentiment.py`,
`faults.py`, `latency.py`.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import NoReturn, TypeAlias
from weakref import WeakValueDictionary

from mock_nn import models, sentiment
from mock_nn.config import SENTIMENT_MODEL, Fault, FaultKind, MockConfig
from mock_nn.faults import FaultPlan, Message, disturb, name_rows
from mock_nn.latency import Latencies
from protos.open_inference import open_inference_pb2 as pb

log = logging.getLogger("mock_nn")

CRASH_EXIT_CODE = 70

# The record is for tests and must not grow in a process that runs for weeks.
_RECORDED_BATCHES = 10_000
# A status whose text does not fit into a header is lost; the router keeps as many characters of a model's error.
_MESSAGE_CHARACTERS = 1000

Sleep: TypeAlias = Callable[[float], Awaitable[None]]
Crash: TypeAlias = Callable[[int], NoReturn]


@dataclass(frozen=True, slots=True)
class Batch:
    """One valid batch that the mock is done with: answered, failed, or left by its caller."""

    model: str
    agent_type: str
    rows: int
    dim: int  # numbers of a row; a text is one
    batch_id: str
    started_s: float  # time.monotonic(), when an instance took it
    seconds: float  # from there to its answer
    fault: str  # the kind of fault that struck, or ""


@dataclass(frozen=True, slots=True)
class _Task:
    """A request as read: its rows' numbers as (rows, dim) float32, and what computes its answer."""

    matrix: models.FloatArray
    agent_type: str
    compute: Callable[[], Awaitable[Message]]


class BatchError(Exception):
    """A batch gets no answer; a stream hears of it by an error message, or ends with the code if `ends_stream`."""

    def __init__(self, code: str, message: str, *, ends_stream: bool = False) -> None:
        super().__init__(message[:_MESSAGE_CHARACTERS])
        self.code = code
        self.ends_stream = ends_stream


class DroppedError(Exception):
    """The stream ends without an answer and without an error."""


class Runner:
    """One `infer` for both kinds of call."""

    def __init__(self, config: MockConfig, sleep: Sleep, crash: Crash) -> None:
        # State: the record, how many batches arrived and who waits for that, and what is drawn in order of arrival.
        # Faults and latencies have a sequence each: turning a fault on does not change the latencies.
        self.record: deque[Batch] = deque(maxlen=_RECORDED_BATCHES)
        self.arrived = 0
        self._arrival_waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._config = config
        self._tensors = config.vector_input, config.vector_datatype, config.vector_output
        self._latencies = Latencies(config, Random(f"{config.seed}/latency"))  # noqa: S311 -- chance, not secrets
        self._faults = FaultPlan(config.faults, Random(f"{config.seed}/faults"))  # noqa: S311 -- chance, not secrets
        self._instances = _Instances(config.instances)
        self._sleep = sleep
        self._crash = crash

    def has_model(self, model_name: str) -> bool:
        """Whether the model exists: a named one, or any non-empty name when none are named."""
        return model_name in self._config.models if self._config.models else bool(model_name)

    def check_model(self, model_name: str) -> None:
        """Raise BatchError, in Triton's words, for a model that does not exist."""
        if not self.has_model(model_name):
            raise BatchError("NOT_FOUND", f"Request for unknown model: '{model_name[:256]}' is not found")

    async def infer(self, request: pb.ModelInferRequest, previous: Message | None = None) -> list[Message]:
        """Answer one batch: one message, and more or other ones only by a fault.

        `previous` is the stream's last message. Raises BatchError and DroppedError. Cancelled, it frees its instance
        and is recorded as far as it came; a batch that is cancelled in the line for an instance leaves no record.
        """
        task = self._read(request)
        self._note_arrival()
        fault = self._faults.strike(request.model_name, task.matrix)
        async with self._instances.of(request.model_name):
            started_s = time.monotonic()
            try:
                await self._take_time(request.model_name)
                answer = await task.compute()
                return [answer] if fault is None else await self._misbehave(fault, answer, previous, task.matrix)
            finally:
                self._note_end(request, task, started_s, fault)

    async def wait_for_arrivals(self, count: int) -> None:
        """Return once `count` valid batches have arrived since the start."""
        if self.arrived < count:
            arrived = asyncio.get_running_loop().create_future()
            self._arrival_waiters.append((count, arrived))
            await arrived

    def metadata(self, model_name: str) -> pb.ModelMetadataResponse:
        """What a model takes and gives. Raises BatchError for a model that does not exist."""
        self.check_model(model_name)
        if model_name == SENTIMENT_MODEL:
            return sentiment.metadata(model_name)
        return models.metadata(model_name, self._config.output_width, *self._tensors)

    def _read(self, request: pb.ModelInferRequest) -> _Task:
        """Raises BatchError for a request that cannot be run."""
        self.check_model(request.model_name)
        try:
            read = self._read_texts if request.model_name == SENTIMENT_MODEL else self._read_vectors
            task = read(request, models.read_agent_type(request))
        except models.BadInputError as error:
            raise BatchError("INVALID_ARGUMENT", str(error)) from error
        limit = self._config.max_batch_size
        if limit and len(task.matrix) > limit:
            text = f"inference request batch-size must be <= {limit} for '{request.model_name}', got {len(task.matrix)}"
            raise BatchError("INVALID_ARGUMENT", text)
        return task

    def _read_vectors(self, request: pb.ModelInferRequest, agent_type: str) -> _Task:
        matrix = models.read_matrix(request, *self._tensors)

        async def compute() -> Message:
            values = models.expected(request.model_name, agent_type, matrix, self._config.output_width)
            return models.answer(request, values, self._config.vector_output)

        return _Task(matrix, agent_type, compute)

    def _read_texts(self, request: pb.ModelInferRequest, agent_type: str) -> _Task:
        texts = sentiment.read_texts(request)

        async def compute() -> Message:
            """In a thread: long texts would hold everybody's batches up for as long as they take."""
            return await asyncio.to_thread(sentiment.answer, request, texts)

        return _Task(sentiment.first_numbers(texts), agent_type, compute)

    async def _take_time(self, model_name: str) -> None:
        seconds = self._latencies.draw_s(model_name)
        if seconds:
            await self._sleep(seconds)

    async def _misbehave(
        self, fault: Fault, answer: Message, previous: Message | None, matrix: models.FloatArray
    ) -> list[Message]:
        match fault.kind:
            case FaultKind.STALL:
                await asyncio.Event().wait()
            case FaultKind.CRASH:
                self._crash(CRASH_EXIT_CODE)
            case FaultKind.DROP:
                raise DroppedError
            case FaultKind.ERROR | FaultKind.POISON:
                code, text = _FAILURES[fault.kind]
                raise BatchError(fault.code or code, text, ends_stream=bool(fault.code))
            case FaultKind.ROW_ERRORS:
                return [name_rows(fault, answer, matrix)]
        return disturb(fault.kind, answer, previous)

    def _note_arrival(self) -> None:
        self.arrived += 1
        if self._arrival_waiters:
            self._wake_arrival_waiters()

    def _wake_arrival_waiters(self) -> None:
        for count, arrived in self._arrival_waiters:
            if count <= self.arrived and not arrived.done():
                arrived.set_result(None)
        self._arrival_waiters = [waiter for waiter in self._arrival_waiters if not waiter[1].done()]

    def _note_end(
        self,
        request: pb.ModelInferRequest,
        task: _Task,
        started_s: float,
        fault: Fault | None,
    ) -> None:
        rows, dim = task.matrix.shape
        seconds = time.monotonic() - started_s
        kind = fault.kind.value if fault else ""
        batch = Batch(request.model_name, task.agent_type, rows, dim, request.id, started_s, seconds, kind)
        self.record.append(batch)
        if not self._config.is_quiet and log.isEnabledFor(logging.INFO):
            _log_batch(batch)


_FAILURES = {
    FaultKind.ERROR: ("INTERNAL", "the model failed (a fault on demand)"),
    FaultKind.POISON: ("INVALID_ARGUMENT", "the model cannot compute one of the rows (a fault on demand)"),
}


def _log_batch(batch: Batch) -> None:
    fields = asdict(batch)
    del fields["started_s"]
    fields["seconds"] = round(batch.seconds, 6)
    log.info("batch", extra={"fields": fields})


class _Instances:
    """At most `limit` batches of a model at a time, the others in line, like Triton's instance_group; 0: no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Any name may be a model: a semaphore lives as long as a batch runs or waits with it.
        self._semaphores: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, model_name: str) -> contextlib.AbstractAsyncContextManager[None]:
        if not self._limit:
            return _UNLIMITED
        return self._semaphores.setdefault(model_name, asyncio.Semaphore(self._limit))


_UNLIMITED = contextlib.nullcontext()
