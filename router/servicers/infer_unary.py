"""ModelInfer: one request, one answer; the RPC's status tells when there is none."""

import asyncio
import functools
import logging

import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router.errors import InternalError, InvalidArgument, RouterError
from router.servicers.infer_request import Arrival, Front, InferRequest, record, record_cancelled
from router.servicers.status import to_proto
from router.servicers.unary import Unreadable, abort, request_id, seconds_left

logger = logging.getLogger(__name__)

METHOD = "ModelInfer"
# Trailing metadata of a request that was refused because the router leaves: it was not begun, and may go elsewhere.
REFUSED_KEY = "inference-router-refused"

Context = grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse]


async def infer(front: Front, message: pb.ModelInferRequest | Unreadable, context: Context) -> pb.ModelInferResponse:
    """Answer when every row is answered; abort when the request is bad or one of its rows failed."""
    if isinstance(message, Unreadable):
        error = InvalidArgument("the request cannot be read as a ModelInferRequest")
        return await abort(context, to_proto(error))
    around, loop = front.around, asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end(_: InferRequest) -> None:
        if not ended.done():  # done: the RPC is being cancelled
            ended.set_result(None)

    request = InferRequest(front, message, end)
    find_id = functools.partial(_find_id, context, request)
    try:
        request.begin(Arrival(loop.time(), seconds_left(context), around.tenants.of_rpc(context)))
        await ended
    except asyncio.CancelledError:
        request.cancel()
        record_cancelled(around, METHOD, request, find_id())
        raise
    record(around, METHOD, request, find_id)
    if request.response is not None:
        return request.response
    return await _fail(request, request.error or InternalError(), context)


async def _fail(request: InferRequest, error: RouterError, context: Context) -> pb.ModelInferResponse:
    more_metadata = ((REFUSED_KEY, "1"),) if request.is_refused else ()
    return await abort(context, to_proto(error), *more_metadata)


def _find_id(context: Context, request: InferRequest) -> str:
    return request_id(context, request.id)
