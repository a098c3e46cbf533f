"""InferRequest: one request of the Open Inference Protocol from its message to its response, whichever way it came.

A request is one block of rows. They share batches with all rows of their key, whoever sent them and by which protocol;
a request larger than a batch is put together again. The protocol knows no errors of single rows: the first that fails
fails its request, and the rows of it that still wait leave their queue.

A request for a model that the router has not met yet waits until its backend has told of it, and begins then as if it
had just arrived, with the deadline it had.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.core.types import BatchAnswer, Part, Tensor
from router.dataplane import Call
from router.errors import Cancelled, DeadlineExceeded, InternalError, RouterError, Unavailable
from router.models import Unlearned
from router.servicers import convert, parameters, responses, tensors
from router.servicers.access import OK
from router.servicers.heads import Heads
from router.servicers.responses import Responses
from router.servicers.status import status_of
from router.servicers.stream import Surroundings

logger = logging.getLogger(__name__)

# Of an error in the access log: it may name a name of megabytes, to say that it is too long.
MAX_DETAIL_CHARACTERS = 1000


class Front:
    """What all requests of a router share; keep none of it but `around`."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.heads = Heads(around.settings, around.models)
        self.responses = Responses()

    def apply(self, settings: Settings) -> None:
        """Read new requests by other settings, and by what is known of models now."""
        self.heads = Heads(settings, self.around.models)


@dataclass(slots=True)
class Arrival:
    """How a request came. `at`: monotonic seconds on the loop; `rpc_s`: what is left of its RPC's deadline, if it has
    one; `tenant`: what the RPC tells."""

    at: float
    rpc_s: float | None
    tenant: str


class InferRequest:
    """One request; `begin` it, and `on_end` is called once, with `response` or `error` set. It is never after `cancel`.

    `on_end` may be called before `begin` returns.
    """

    __slots__ = (
        "_around",
        "_arrival",
        "_call",
        "_front",
        "_learning",
        "_message",
        "_on_end",
        "_pieces",
        "_rows",
        "error",
        "is_refused",
        "response",
        "started",
    )

    def __init__(self, front: Front, message: pb.ModelInferRequest, on_end: Callable[["InferRequest"], None]) -> None:
        self._front = front
        self._around = front.around
        self._message = tensors.Message(message)
        self.started = time.monotonic()
        # State: who hears of the end, nobody after it; how it came; its rows once they are known, and its call; the
        # task that waits for the backend to tell of the model; whether the router took no call at all; outputs by the
        # first of their rows, but for the last; what became of it.
        self._on_end: Callable[[InferRequest], None] | None = on_end
        self._arrival: Arrival | None = None
        self._rows: tensors.Rows | None = None
        self._call: Call | None = None
        self._learning: asyncio.Task[None] | None = None
        self.is_refused = False
        self._pieces: dict[int, list[Tensor]] = {}
        self.response: pb.ModelInferResponse | None = None
        self.error: RouterError | None = None

    @property
    def id(self) -> str:
        """As the client calls it, as far as that may be long."""
        return self._message.id[: self._around.settings.limits.max_name_length]

    @property
    def rows(self) -> int:
        """0 until they are known."""
        return self._rows.head.rows if self._rows is not None else 0

    def begin(self, arrival: Arrival) -> None:
        """Queue the rows, now or once the model is known."""
        self._arrival = arrival
        try:
            self._queue()
        except RouterError as error:
            self._end(error)
        except Exception:
            logger.exception("request %r failed inside the router; this is a bug", self.id)
            self._end(InternalError())

    def cancel(self) -> None:
        """Nobody waits any more: rows that wait leave their queue, and nobody is told."""
        self._on_end = None
        self._let_go()

    def refuse(self, error: RouterError) -> None:
        """End it before it has begun."""
        self._end(error)

    def _queue(self) -> None:
        around, arrival = self._around, self._arrival
        assert arrival is not None, "a request is queued that has not arrived: this is a bug"
        try:
            rows = tensors.read(self._message, self._front.heads, around.settings.limits.max_name_length)
        except Unlearned as unlearned:
            self._wait_for(unlearned.model, arrival)
            return
        self._rows, head = rows, rows.head
        self._message.let_go()
        terms = self._terms(arrival, head.timeout_s, is_batch_class=head.is_batch_class)
        call = self._open(head.rows, terms)
        around.plane.infer(call, [rows.to_block(terms, call)])

    def _terms(self, arrival: Arrival, asked_s: float | None, *, is_batch_class: bool) -> convert.Terms:
        around = self._around
        timeout_s = convert.timeout_s(asked_s, arrival.rpc_s, around.settings)
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        return convert.Terms(arrival.at, timeout_s, around.tenants.of_call("", arrival.tenant), is_batch_class)

    def _open(self, rows: int, terms: convert.Terms) -> Call:
        """The call, which is open already if the model had to be learned. Raises Unavailable."""
        if self._call is not None:
            self._call.expect(rows)
            return self._call
        try:
            self._call = self._around.plane.open(self, rows, terms.timeout_s)
        except Unavailable:
            self.is_refused = True
            raise
        return self._call

    def _wait_for(self, model: tuple[str, str, str], arrival: Arrival) -> None:
        """A router that leaves waits for this as for other calls."""
        asked = self._message.rest.parameters
        terms = self._terms(arrival, parameters.timeout_s(asked), is_batch_class=parameters.is_batch_class(asked))
        self._open(1, terms)
        self._learning = asyncio.create_task(self._learn(model, terms), name=f"learn {model[0]}")

    async def _learn(self, model: tuple[str, str, str], terms: convert.Terms) -> None:
        nbytes, deadline, tenant = self._message.nbytes, terms.deadline, terms.tenant
        try:
            await self._around.models.learn(*model, rows=1, nbytes=nbytes, deadline=deadline, tenant=tenant)
        except RouterError as error:
            self._learning = None
            self._around.plane.count_refusal(error, 1)
            is_late = isinstance(error, DeadlineExceeded)  # of what was left of its time when it began to wait
            self._end(DeadlineExceeded(f"no answer within {terms.timeout_s:g} s") if is_late else error)
            return
        self._learning = None
        if self._arrival is not None:
            self.begin(self._arrival)

    # -- dataplane.Reply ---------------------------------------------------------------------------------------------

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        """See Reply."""
        try:
            self._take(part, answer, offset, is_last=is_last)
        except RouterError as error:
            self._end(error)

    def _take(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        rows = self._rows
        assert rows is not None, "an answer to a request that was never queued: this is a bug"
        if is_last and not self._pieces:
            self.response = self._front.responses.of_batch(rows.head, self._message.id, answer, offset)
            self._end(None)
            return
        self._pieces[part.first] = responses.cut(answer, rows.head, offset, part.rows)
        if is_last:
            outputs = responses.join(self._pieces)
            self.response = responses.of_tensors(rows.head, self._message.id, outputs, answer.model_version)
            self._end(None)

    def failed(
        self,
        index: int,  # noqa: ARG002 (Reply's signature, as are the next)
        first_row: int,  # noqa: ARG002
        rows: int,  # noqa: ARG002
        error: RouterError,
        *,
        is_last: bool,  # noqa: ARG002
    ) -> None:
        """See Reply."""
        self._end(error)

    def closed(self, error: RouterError) -> None:
        """See Reply."""
        self._end(error)

    def _end(self, error: RouterError | None) -> None:
        """The first row that fails speaks for all; those that still wait go at once, before a slot takes them."""
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        self.error = error
        self._let_go()
        on_end(self)

    def _let_go(self) -> None:
        """Call and request know each other: together they would stay until the garbage is collected."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._learning is not None:
            self._learning.cancel()
            self._learning = None
        self._arrival = None
        self._pieces.clear()


def record(around: Surroundings, method: str, request: InferRequest, request_id: Callable[[], str]) -> None:
    """Count a request that has ended, and write its line. `request_id` is asked only when somebody reads it."""
    error, access = request.error, around.access
    if error is None and not access.logs_answered:
        access.record_answered(method, 1)
        return
    code = OK if error is None else status_of(error).name
    _record(around, method, request, request_id(), code, "" if error is None else error.message)


def record_cancelled(around: Surroundings, method: str, request: InferRequest, request_id: str) -> None:
    """Count a request whose client is gone."""
    _record(around, method, request, request_id, status_of(Cancelled("")).name, "cancelled by the client")


def _record(around: Surroundings, method: str, request: InferRequest, request_id: str, code: str, detail: str) -> None:
    detail = detail[:MAX_DETAIL_CHARACTERS]
    rows, started = request.rows, request.started
    around.access.record(method, code, request_id=request_id, rows=rows, started=started, detail=detail)
