"""The Open Inference Protocol's front: `ModelInfer`. Its other methods answer UNIMPLEMENTED.

A request is one block of rows. They share batches with all rows of their key, whoever sent them and by which protocol;
a request larger than a batch is put together again. The protocol knows no errors of single rows: the first that fails
fails its request, and the rows of it that still wait leave their queue.
"""

import asyncio
import logging
import time
from typing import Any

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.core.batch import rows_of
from router.core.types import BatchAnswer, Part, Tensor
from router.dataplane import Call
from router.errors import Cancelled, DeadlineExceeded, InternalError, InvalidArgument, RouterError, Unavailable
from router.models import Unlearned
from router.servicers import convert, tensors
from router.servicers.access import OK
from router.servicers.status import status_of, to_proto
from router.servicers.stream import Surroundings
from router.servicers.unary import Rpcs, Unreadable, abort, reader, request_id

logger = logging.getLogger(__name__)

METHOD = "ModelInfer"
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
# Trailing metadata of a request that was refused because the router leaves: it was not begun, and may go elsewhere.
REFUSED_KEY = "inference-router-refused"
# Of an error in the access log: it may name a name of megabytes, to say that it is too long.
MAX_DETAIL_CHARACTERS = 1000

Context = grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse]


class OpenInferenceServicer:
    """GRPCInferenceService of the router."""

    def __init__(self, around: Surroundings, rpcs: Rpcs) -> None:
        self._around = around
        self._rpcs = rpcs
        self._targets = tensors.Targets(around.settings, around.models)

    def apply(self, settings: Settings) -> None:
        """Find models by other settings."""
        self._targets = tensors.Targets(settings, self._around.models)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register what is there; see InferenceServicer."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            METHOD: grpc.unary_unary_rpc_method_handler(
                self.ModelInfer,
                request_deserializer=reader(pb.ModelInferRequest),
                response_serializer=pb.ModelInferResponse.SerializeToString,
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest | Unreadable, context: Context
    ) -> pb.ModelInferResponse:
        """Answer when every row is answered; abort when the request is bad or one of its rows failed."""
        if isinstance(request, Unreadable):
            error = InvalidArgument("the request cannot be read as a ModelInferRequest")
            return await abort(context, to_proto(error))
        self._rpcs.watch(context)
        reply = _Reply(request, request_id(context, request.id[: self._around.settings.limits.max_name_length]))
        try:
            response = await self._infer(request, context, reply)
        except RouterError as error:
            return await self._fail(reply, error, context)
        except asyncio.CancelledError:
            self._record(reply, status_of(Cancelled("")).name, "cancelled by the client")
            raise
        except Exception:
            logger.exception("request %s failed inside the router; this is a bug", reply.request_id)
            return await self._fail(reply, InternalError(), context)
        self._record(reply, OK)
        return response

    async def _infer(self, request: pb.ModelInferRequest, context: Context, reply: "_Reply") -> pb.ModelInferResponse:
        """Queue the request's rows and wait for all of them. Raises RouterError."""
        settings = self._around.settings
        is_batch_class = tensors.is_batch_class(request.parameters)
        now = asyncio.get_running_loop().time()
        asked_s = tensors.timeout_s(request.parameters)
        tenants = self._around.tenants
        terms = convert.Terms(
            now,
            convert.timeout_s(asked_s, context.time_remaining(), settings),
            tenants.of_call("", tenants.of_rpc(context)),
            is_batch_class,
        )
        rows = await self._read(request, terms)
        reply.rows = rows.rows
        if terms.timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        await self._queue(rows, terms, reply)
        return tensors.to_response(request, reply.outputs())

    async def _read(self, request: pb.ModelInferRequest, terms: convert.Terms) -> tensors.Rows:
        """The request's rows, as soon as its model is known. Raises RouterError."""
        while True:
            try:
                return tensors.read(request, self._targets, self._around.settings.limits)
            except Unlearned as unlearned:
                rows, nbytes = 1, request.ByteSize()
                deadline, tenant = terms.deadline, terms.tenant
                await self._around.models.learn(
                    *unlearned.model, rows=rows, nbytes=nbytes, deadline=deadline, tenant=tenant
                )

    async def _queue(self, rows: tensors.Rows, terms: convert.Terms, reply: "_Reply") -> None:
        plane = self._around.plane
        try:
            call = reply.call = plane.open(reply, rows.rows, terms.timeout_s)
        except Unavailable:
            reply.is_refused = True
            raise
        try:
            plane.infer(call, [rows.to_block(terms, call)])
            await reply.is_complete.wait()
        finally:
            call.cancel()
            reply.call = None  # each knows the other: together they would stay until the garbage is collected

    async def _fail(self, reply: "_Reply", error: RouterError, context: Context) -> pb.ModelInferResponse:
        self._record(reply, status_of(error).name, error.message)
        more_metadata = ((REFUSED_KEY, "1"),) if reply.is_refused else ()
        return await abort(context, to_proto(error), *more_metadata)

    def _record(self, reply: "_Reply", code: str, detail: str = "") -> None:
        self._around.access.record(
            METHOD,
            code,
            request_id=reply.request_id,
            rows=reply.rows,
            started=reply.started,
            detail=detail[:MAX_DETAIL_CHARACTERS],
        )


class _Reply:
    """Gathers a request's answers by row."""

    def __init__(self, request: pb.ModelInferRequest, request_id: str) -> None:
        self.request_id = request_id
        self.started = time.monotonic()
        self._wanted = [output.name for output in request.outputs]
        # State: the request's rows once they are known, and its call; whether the router took no call at all; outputs
        # by the first of their rows, or the first error; set when nothing more is to come.
        self.rows = 0
        self.call: Call | None = None
        self.is_refused = False
        self._pieces: dict[int, list[Tensor]] = {}
        self._error: RouterError | None = None
        self.is_complete = asyncio.Event()

    def outputs(self) -> list[Tensor]:
        """Those of all rows, once `is_complete`. Raises RouterError when a row failed."""
        if self._error is not None:
            raise self._error
        return tensors.join(self._pieces)

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        """See Reply."""
        try:
            chosen = tensors.choose(answer.outputs, self._wanted)
        except RouterError as error:
            self._end(error)
            return
        self._pieces[part.first] = [rows_of(tensor, offset, part.rows) for tensor in chosen]
        if is_last:
            self.is_complete.set()

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

    def _end(self, error: RouterError) -> None:
        """The first row that fails speaks for all; those that still wait go at once, before a slot takes them."""
        self._error = self._error or error
        if self.call is not None:
            self.call.cancel()
        self.is_complete.set()
