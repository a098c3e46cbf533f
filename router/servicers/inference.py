"""The native API: `Predict` for one request, `PredictStream` for a client with many.

The only file, with stream.py, that meets client RPCs; rows go to the data plane, and what becomes of them comes back
through a `Reply`.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np

from protos.inference_router.v1 import inference_router_pb2 as pb
from router.core.types import BatchAnswer, Block, Part
from router.dataplane import Call
from router.errors import Cancelled, DeadlineExceeded, InternalError, InvalidArgument, RouterError
from router.models import Unlearned
from router.servicers import convert
from router.servicers.access import OK, PARTIAL
from router.servicers.status import status_of, to_proto
from router.servicers.stream import Context as StreamContext
from router.servicers.stream import StreamSession, Surroundings
from router.servicers.unary import Rpcs, Unreadable, abort, reader, request_id

logger = logging.getLogger(__name__)

METHOD = "Predict"
SERVICE = pb.DESCRIPTOR.services_by_name["InferenceRouterService"].full_name

UnaryContext = grpc.aio.ServicerContext[pb.PredictRequest, pb.PredictResponse]


class InferenceServicer:
    """InferenceRouterService of the router."""

    def __init__(self, around: Surroundings, rpcs: Rpcs) -> None:
        self._around = around
        self._rpcs = rpcs
        # State: the streams that are open; whether streams have been told that the router leaves, or to end.
        self._sessions: set[StreamSession] = set()
        self._is_draining = False
        self._is_ending = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register both methods. Not by the generated function: what cannot be read shall be its sender's fault."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Predict": grpc.unary_unary_rpc_method_handler(
                self.Predict,
                request_deserializer=reader(pb.PredictRequest),
                response_serializer=pb.PredictResponse.SerializeToString,
            ),
            "PredictStream": grpc.stream_stream_rpc_method_handler(
                self.PredictStream,
                request_deserializer=pb.PredictStreamRequest.FromString,
                response_serializer=pb.PredictStreamResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def announce_draining(self) -> None:
        """Tell every stream, and each new one first of all, that the router will stop."""
        self._is_draining = True
        for session in self._sessions:
            session.say_draining()

    def end_streams(self) -> None:
        """End every stream as soon as its calls are answered; new streams end at once."""
        self._is_ending = True
        for session in self._sessions:
            session.end()

    async def PredictStream(self, _: object, context: StreamContext) -> None:  # noqa: N802
        """One client's stream; see StreamSession."""
        self._rpcs.watch(context)
        session = StreamSession(self._around, context, is_draining=self._is_draining)
        self._sessions.add(session)
        if self._is_ending:
            session.end()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def Predict(  # noqa: N802
        self, request: "pb.PredictRequest | Unreadable", context: UnaryContext
    ) -> pb.PredictResponse:
        """Answer when every agent is answered; abort when the request is bad or all agents failed with one code."""
        if isinstance(request, Unreadable):
            return await abort(context, to_proto(InvalidArgument("the request cannot be read as a PredictRequest")))
        self._rpcs.watch(context)
        reply = _UnaryReply(request, context, self._around.outputs)
        try:
            await self._infer(request, context, reply)
            response = reply.response()
        except RouterError as error:
            return await self._fail(reply, error, context)
        except asyncio.CancelledError:
            self._record(reply, status_of(Cancelled("")).name, "cancelled by the client")
            raise
        except Exception:
            logger.exception("request %s failed inside the router; this is a bug", reply.request_id)
            return await self._fail(reply, InternalError(), context)
        self._record_answered(reply)
        common = _common_error(response) if reply.errors else None
        return await abort(context, common) if common else response

    async def _infer(self, request: pb.PredictRequest, context: UnaryContext, reply: "_UnaryReply") -> None:
        """Queue the request's rows and wait for all of them. Raises RouterError for a fault of the whole request."""
        settings = self._around.settings
        _check_request(request, settings.limits.max_agents, settings.limits.max_name_length)
        asked_s = request.timeout_s if request.HasField("timeout_s") else None
        now = asyncio.get_running_loop().time()
        tenants = self._around.tenants
        terms = convert.Terms(
            now,
            convert.timeout_s(asked_s, context.time_remaining(), settings),
            tenants.of_call(request.tenant, tenants.of_rpc(context)),
            request.priority_class == pb.PRIORITY_CLASS_BATCH,
        )
        if terms.timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        blocks, errors = convert.from_agents(request.agents, self._around.routes, settings.limits.max_name_length)
        reply.errors.update(errors)
        if blocks:
            await self._queue(blocks, terms, reply)

    async def _queue(self, blocks: Sequence[convert.NamedBlock], terms: convert.Terms, reply: "_UnaryReply") -> None:
        plane = self._around.plane
        call = plane.open(reply, sum(len(block.names) for block in blocks), terms.timeout_s)
        reply.blocks = blocks
        try:
            known = [(index, block) for index, block in enumerate(blocks) if block.route]
            plane.infer(call, [one for index, block in known for one in _good_rows(index, block, terms, call)])
            for index, block in enumerate(blocks):
                if block.route is None and not call.is_closed:
                    self._hold(index, block, terms, call)
            await reply.completion
        finally:
            call.cancel()

    def _hold(self, index: int, block: convert.NamedBlock, terms: convert.Terms, call: Call) -> None:
        """Let a block wait until its model is known."""
        waiting = convert.to_waiting(block.raw, index, terms, call)
        resume = functools.partial(self._resume, index, block, terms, call)
        self._around.hold(call, waiting, resume)

    def _resume(self, index: int, block: convert.NamedBlock, terms: convert.Terms, call: Call, _: Block) -> None:
        try:
            raw = block.raw
            block.route = self._around.routes.find(raw.agent_type, raw.model_name, raw.dim)
            self._around.plane.infer(call, _good_rows(index, block, terms, call))
        except Unlearned:
            self._hold(index, block, terms, call)
        except RouterError as error:
            call.fail_rows(index, 0, block.raw.rows, error)

    async def _fail(self, reply: "_UnaryReply", error: RouterError, context: UnaryContext) -> pb.PredictResponse:
        self._record(reply, status_of(error).name, error.message)
        return await abort(context, to_proto(error))

    def _record_answered(self, reply: "_UnaryReply") -> None:
        error = reply.first_error
        if error is None:
            self._record(reply, OK)
        else:
            self._record(reply, PARTIAL if reply.outputs else status_of(error).name, error.message)

    def _record(self, reply: "_UnaryReply", code: str, detail: str = "") -> None:
        access = self._around.access
        if code == OK and not access.logs_answered:
            access.record_answered(METHOD, 1)
            return
        access.record(
            METHOD,
            code,
            request_id=reply.request_id,
            rows=len(reply.request.agents),
            started=reply.started,
            detail=detail,
        )


def _check_request(request: pb.PredictRequest, max_agents: int, longest_name: int) -> None:
    convert.check_class(request.priority_class)
    convert.check_name("tenant", request.tenant, longest_name)
    if not request.agents:
        raise InvalidArgument("agents is empty")
    if len(request.agents) > max_agents:
        raise InvalidArgument(f"{len(request.agents)} agents, at most {max_agents} are allowed in one request")


def _good_rows(index: int, block: convert.NamedBlock, terms: convert.Terms, call: Call) -> Sequence[Block]:
    """A block's good rows; its bad ones fail at once."""
    route, raw = block.route, block.raw
    assert route is not None, "rows for a model that is not known: this is a bug"
    try:
        vectors, runs = convert.read_rows(route, raw.vectors, raw.rows, raw.dim)
    except RouterError as error:
        call.fail_rows(index, 0, raw.rows, error)
        return ()
    for run in runs:
        if run.error is not None:
            call.fail_rows(index, run.first, run.rows, run.error)
    return list(convert.to_blocks(route, index, vectors, runs, terms, call))


class _UnaryReply:
    """Gathers a request's answers by agent name."""

    def __init__(self, request: pb.PredictRequest, context: UnaryContext, outputs: convert.VectorOutputs) -> None:
        self.request = request
        self._context = context
        self._outputs = outputs
        self.started = time.monotonic()
        # State: the blocks that were queued; per agent its result or its error; done when no row is open.
        self.blocks: Sequence[convert.NamedBlock] = ()
        self.outputs: dict[str, tuple[list[float], pb.Explanation | None]] = {}
        self.errors: dict[str, RouterError] = {}
        self.completion: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @functools.cached_property
    def request_id(self) -> str:
        """The caller's, else a new one; looked for only when somebody asks, which is not for each call."""
        return request_id(self._context)

    @property
    def first_error(self) -> RouterError | None:
        return next(iter(self.errors.values()), None)

    def response(self) -> pb.PredictResponse:
        """A result for every agent of the request."""
        response = pb.PredictResponse()
        results = response.results
        for name, (output, explanation) in self.outputs.items():
            if name in self.errors:
                continue
            result = results[name]  # filled where it stands: a finished message would be copied
            result.output.extend(output)
            if explanation is not None:
                result.explanation.CopyFrom(explanation)
        for name, error in self.errors.items():
            results[name].error.CopyFrom(to_proto(error))
        return response

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        """See Reply."""
        block = self.blocks[part.block.index]
        first = part.block.first_row + part.first
        assert block.route is not None, "an answer for a block that was not sent: this is a bug"
        try:
            data = self._outputs.rows(answer, block.route.output, offset, part.rows)
        except RouterError as error:
            self.failed(part.block.index, first, part.rows, error, is_last=is_last)
            return
        explanation = convert.explain(part, answer) if self.request.explain else None
        rows = np.frombuffer(data, convert.FLOAT32).reshape(part.rows, -1).tolist()
        for name, row in zip(block.names[first:], rows, strict=False):
            self.outputs[name] = row, explanation
        self._finish(is_last=is_last)

    def failed(self, index: int, first_row: int, rows: int, error: RouterError, *, is_last: bool) -> None:
        """See Reply."""
        for name in self.blocks[index].names[first_row : first_row + rows]:
            self.errors[name] = error
        self._finish(is_last=is_last)

    def closed(self, error: RouterError) -> None:
        """See Reply."""
        for name in self.request.agents:
            if name not in self.outputs and name not in self.errors:
                self.errors[name] = error
        self._finish(is_last=True)

    def _finish(self, *, is_last: bool) -> None:
        if is_last and not self.completion.done():  # done: the RPC is being cancelled
            self.completion.set_result(None)


def _common_error(response: pb.PredictResponse) -> pb.Error | None:
    """The first agent's error when all agents failed with the same code."""
    results = list(response.results.values())
    if not all(result.HasField("error") for result in results):
        return None
    return results[0].error if len({result.error.code for result in results}) == 1 else None
