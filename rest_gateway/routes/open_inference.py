"""/v2: the Open Inference Protocol over REST. Health, metadata, and inference in JSON or with binary tensors.

Clients of Triton, KServe and MLServer find here what they know. Two things those servers do not agree on: who is not
ready is 503 (Triton says 400, KServe 503), and faults inside a request's tensors are 422 as everywhere in this gateway
(Triton: 400), a body that cannot be read 400. Errors are problem documents whose member `error` those clients read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from rest_gateway.config import Settings
from rest_gateway.errors import Fault
from rest_gateway.open_inference import (
    Reply,
    config_document,
    index_document,
    metadata_document,
    server_document,
    to_reply,
    to_request,
)
from rest_gateway.router import OpenInferenceRouter
from rest_gateway.routes import problems
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.negotiation import MEDIA_TYPES, decode_content, read_body, tenant_of
from rest_gateway.routes.open_inference_paths import Question, read_path
from rest_gateway.routes.record import record_of
from rest_gateway.schemas import json_text
from rest_gateway.schemas.open_inference import InferCall, parse_index_request, parse_infer
from rest_gateway.schemas.openapi_jobs import Operation
from rest_gateway.schemas.openapi_open_inference import OPERATIONS
from router_client import InferError

BINARY_TYPE = "application/octet-stream"
HEADER_LENGTH = "inference-header-content-length"
# Of a body that is read on the loop; what is larger takes a tenth of a second or more, and others wait meanwhile.
LARGE_BODY_BYTES = 1_048_576
# A question to the router; it may have to ask its model servers first.
QUESTION_TIMEOUT_S = 10.0
T = TypeVar("T")
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class OpenInferenceRoutes:
    """The routes with what they need."""

    def __init__(self, router: OpenInferenceRouter, settings: Settings, open_requests: OpenRequests) -> None:
        self._router = router
        self._settings = settings
        self._open_requests = open_requests
        # Held while a large body is read, in a thread: one at a time, since each may become half a gigabyte of objects.
        self._reads_large = asyncio.Lock()
        self._endpoints: dict[Question, tuple[tuple[str, ...], Endpoint]] = {
            "server_metadata": (("GET", "HEAD"), self.server_metadata),
            "server_live": (("GET", "HEAD"), self.server_live),
            "server_ready": (("GET", "HEAD"), self.server_ready),
            "index": (("POST",), self.index),
            "metadata": (("GET", "HEAD"), self.metadata),
            "ready": (("GET", "HEAD"), self.ready),
            "config": (("GET", "HEAD"), self.config),
            "infer": (("POST",), self.infer),
        }
        # By template; the access layer takes a request's route from among them.
        self._documented = {path: self._document(path, operation) for (_, path), operation in OPERATIONS.items()}

    def pass_by(self, app: ASGIApp) -> ASGIApp:
        """`app`, but for the paths of these routes, which the framework could not tell apart; it is quicker, too."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not problems.is_open_inference(path := problems.raw_path(scope)):
                await app(scope, receive, send)
                return
            response = await self._answer(Request(scope, receive, send), path)
            await response(scope, receive, send)

        return serve

    def document(self) -> list[APIRoute]:
        """The same as FastAPI's routes, for the API document only."""
        return list(self._documented.values())

    def _document(self, path: str, operation: Operation) -> APIRoute:
        asked = read_path(path)
        assert asked is not None, f"{path} leads nowhere; this is a bug"
        methods, endpoint = self._endpoints[asked.question]
        extra: dict[str, object] = {"parameters": operation.parameters}
        if operation.body is not None:
            extra["requestBody"] = operation.body
        return APIRoute(
            path,
            endpoint,
            methods=[methods[0]],
            tags=["open inference protocol"],
            summary=operation.summary,
            response_class=Response,
            openapi_extra=extra,
        )

    async def _answer(self, request: Request, path: str) -> Response:
        scope = request.scope
        asked = read_path(path)
        if asked is None:
            return problems.no_route_problem(scope)
        # As the framework does; the access layer reads them.
        scope.update({"route": self._documented[asked.template], "path_params": asked.names})
        methods, endpoint = self._endpoints[asked.question]
        if scope["method"] not in methods:
            return problems.method_problem(scope, methods)
        try:
            return await endpoint(request)
        except InferError as exc:
            retry_after_s = None if exc.retry_pushback_ms is None else exc.retry_pushback_ms / 1000
            return problems.fault_problem(scope, Fault(exc.code, exc.message, retry_after_s))

    async def infer(self, request: Request) -> Response:
        """One request for one model; its rows share batches with those of all other callers.

        JSON, or JSON with binary tensors behind it, whatever the Content-Type: see the header
        `Inference-Header-Content-Length`. One failed row fails its request.
        """
        limit = self._settings.max_body_bytes
        tenant = tenant_of(request.headers, self._settings)
        name, version = _model_of(request)
        with self._open_requests.open() as lifetime:
            body = decode_content(request.headers, await read_body(request, limit), limit)
            call = await self._read(body, request.headers.get(HEADER_LENGTH))
            message = to_request(call, name, version)
            del body
            lifetime.watch(request.receive)
            response = await self._router.model_infer(
                message, timeout_s=call.timeout_s, tenant=tenant, request_id=record_of(request.scope).request_id
            )
        return _reply(to_reply(response, call))

    async def _read(self, body: bytes, header_length: str | None) -> InferCall:
        if len(body) <= LARGE_BODY_BYTES:
            return parse_infer(body, header_length)
        async with self._reads_large:
            return await asyncio.to_thread(parse_infer, body, header_length)

    async def server_live(self, _request: Request) -> Response:
        """Says that the gateway's event loop turns."""
        return _json({"live": True})

    async def server_ready(self, request: Request) -> Response:
        """Says whether new requests are welcome: not while draining, nor without a router that is ready itself."""
        if self._open_requests.is_draining:
            return problems.problem(request.scope, 503, "the gateway is draining")
        if not self._router.is_connected:
            return problems.problem(request.scope, 503, "no router")
        if not await self._ask(request, self._router.server_ready(timeout_s=QUESTION_TIMEOUT_S)):
            return problems.problem(request.scope, 503, "the router is not ready")
        return _json({"ready": True})

    async def server_metadata(self, request: Request) -> Response:
        """The server's name, version and extensions of the protocol."""
        told = await self._ask(request, self._router.server_metadata(timeout_s=QUESTION_TIMEOUT_S))
        return _json(server_document(told))

    async def ready(self, request: Request) -> Response:
        """Says whether the model can be asked now."""
        name, version = _model_of(request)
        if not await self._ask(request, self._router.model_ready(name, version, timeout_s=QUESTION_TIMEOUT_S)):
            return problems.problem(request.scope, 503, f"the model {name!r} is not ready")
        return _json({"name": name, "ready": True})

    async def metadata(self, request: Request) -> Response:
        """The model's versions, inputs and outputs."""
        told = await self._ask(request, self._router.model_metadata(*_model_of(request), timeout_s=QUESTION_TIMEOUT_S))
        return _json(metadata_document(told))

    async def config(self, request: Request) -> Response:
        """What Triton would call the model's configuration, as far as the router knows it."""
        told = await self._ask(request, self._router.model_config(*_model_of(request), timeout_s=QUESTION_TIMEOUT_S))
        return _json(config_document(told))

    async def index(self, request: Request) -> Response:
        """The models that the router knows of; with `{"ready": true}` those that are ready."""
        is_ready = parse_index_request(await read_body(request, self._settings.max_body_bytes))
        told = await self._ask(request, self._router.repository_index(is_ready=is_ready, timeout_s=QUESTION_TIMEOUT_S))
        return _json(index_document(told))

    async def _ask(self, request: Request, question: Awaitable[T]) -> T:
        """The answer, unless the client leaves or the drain's time is over first."""
        with self._open_requests.open() as lifetime:
            lifetime.watch(request.receive)
            return await question


def _model_of(request: Request) -> tuple[str, str]:
    names = request.path_params
    return names["model_name"], names.get("model_version", "")


def _json(document: object) -> Response:
    return Response(json_text.dump(document), 200, {"Cache-Control": "no-store"}, media_type=MEDIA_TYPES["json"])


def _reply(reply: Reply) -> Response:
    head = json_text.dump(reply.document)
    if not reply.is_binary:
        return Response(head, media_type=MEDIA_TYPES["json"])
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(b"".join([head, *reply.tail]), 200, headers, media_type=BINARY_TYPE)
