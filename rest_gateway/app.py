"""The gateway's composition root and lifecycle: build the application, serve it, drain it, stop.

Drain: the first SIGTERM or SIGINT makes /readyz say 503, for load balancers to look elsewhere; requests are accepted
for `drain_delay_s` more. Then the listening socket closes, in steps that lose no connection (see listener.py), and what
was accepted is answered. What is still open after `drain_timeout_s` gets 503. Jobs that run have as long, then they are
given back. The router client outlives all of it. A second signal leaves at once.
"""

import asyncio
import contextlib
import gc
import logging
import os
import re
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from math import ceil
from types import FrameType
from typing import Any, TypeAlias
from typing import Protocol as Interface

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from fastapi_offline import FastAPIOffline
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp
from uvicorn.loops.auto import auto_loop_factory
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rest_gateway.config import Settings
from rest_gateway.jobs.housekeeping import Housekeeping
from rest_gateway.jobs.loops import Loops
from rest_gateway.jobs.records import JobStore, SchemaError, StoreError, StoreSettings, StoreUnavailable
from rest_gateway.jobs.service import Jobs
from rest_gateway.jobs.store import SqlJobStore
from rest_gateway.jobs.tasks import Models, Tasks
from rest_gateway.jobs.watch import Watch
from rest_gateway.jobs.worker import Worker
from rest_gateway.listener import has_waiting, refuse_new, url_of
from rest_gateway.metrics import Metrics, metrics_of
from rest_gateway.router import OpenInferenceRouter, Router
from rest_gateway.routes import answers, problems
from rest_gateway.routes.access import ASSETS, AccessMiddleware
from rest_gateway.routes.health import HealthRoutes
from rest_gateway.routes.jobs import JobRoutes
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.open_inference import OpenInferenceRoutes
from rest_gateway.routes.predict import PredictRoute
from rest_gateway.routes.submission import Submission
from rest_gateway.schemas.openapi import PREDICT_BODY, component_schemas
from rest_gateway.schemas.openapi_jobs import JOB_OPERATIONS, SCHEMAS, predict_responses
from rest_gateway.schemas.openapi_open_inference import OPERATIONS
from rest_gateway.schemas.openapi_open_inference import SCHEMAS as OPEN_INFERENCE_SCHEMAS
from router_client import RouterClient

logger = logging.getLogger(__name__)

# FastAPI's own OpenTelemetry; the gateway has metrics, and looking for it costs 5 to 10 µs a request.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Longer than the 60 s for which load balancers keep idle connections (AWS's), so that they close first.
KEEP_ALIVE_S = 75
# A connection that neither reads nor writes is cut this long after its request was answered with 503.
LINGER_S = 2
# When no handshake may begin any more: how long those that have begun may take.
HANDSHAKE_S = 0.1
# The listener is closed after this even if the backlog never gets empty, as it may where new ones cannot be refused.
EMPTYING_S = 1
# What was accepted just before the listener closed has so long to send its first request.
FIRST_REQUEST_S = 0.5
# nginx allows 4 x 8 KiB, Apache 100 x 8 KiB.
MAX_HEAD_BYTES = 64 * 1024
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class GatewayRouter(Router, OpenInferenceRouter, Models, Interface):
    """What waiting requests and jobs need of `router_client.RouterClient`."""


@dataclass(frozen=True)
class Parts:
    """What one process shares among all requests; the router and the store stay their owner's."""

    router: GatewayRouter
    jobs: Jobs
    metrics: Metrics
    open_requests: OpenRequests


def make_parts(router: GatewayRouter, store: JobStore, settings: Settings) -> Parts:
    """Puts together what works; nothing is started."""
    metrics, open_requests = metrics_of(settings.workers), OpenRequests()
    watch, loops = Watch(store), Loops()
    tasks, concurrency = Tasks(router, answers.end_of_job), settings.job_concurrency
    worker = Worker(store, tasks, loops, metrics, concurrency=concurrency, on_change=watch.changed)
    housekeeping = Housekeeping(
        store,
        loops,
        metrics,
        retention_s=settings.job_retention_s,
        on_change=watch.changed,
        on_arrival=worker.note_arrival,
    )
    jobs = Jobs(store, worker, housekeeping, loops, watch, metrics)
    open_requests.when_draining(jobs.start_drain)
    return Parts(router, jobs, metrics, open_requests)


def create_app(parts: Parts, settings: Settings) -> FastAPI:
    """The application."""
    # FastAPI whose /docs brings its own script and style, so that the page also works where the internet does not.
    app = FastAPIOffline(
        title="Inference router",
        version="0.1.0",
        redirect_slashes=False,
        redoc_url=None,
        static_url=ASSETS,
        telemetry=_NO_TELEMETRY,
    )
    metrics, open_requests = parts.metrics, parts.open_requests
    problems.add_handlers(app)
    predict = PredictRoute(parts.router, settings, metrics, open_requests, Submission(parts.jobs, settings))
    predict.add_to(app)
    open_inference = OpenInferenceRoutes(parts.router, settings, open_requests)
    build_fastapis_layers = app.build_middleware_stack

    def build_layers() -> ASGIApp:
        """The way in: the access layer, then errors become problems, then FastAPI where it is not passed by."""
        routes = predict.pass_by(open_inference.pass_by(build_fastapis_layers()))
        inner = ExceptionMiddleware(routes, handlers=app.exception_handlers)
        return AccessMiddleware(inner, settings=settings, metrics=metrics, open_requests=open_requests)

    app.build_middleware_stack = build_layers  # type: ignore[method-assign]  # Starlette calls it at the first request
    JobRoutes(parts.jobs, settings, open_requests).add_to(app)
    HealthRoutes(parts.router, parts.jobs, metrics, open_requests).add_to(app)
    _document(app, predict.document(), *open_inference.document())
    return app


def _document(app: FastAPI, *documented: APIRoute) -> None:
    """Puts into the API document the routes and schemas of which FastAPI knows nothing."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=[*documented, *app.routes])
            document.setdefault("components", {}).setdefault("schemas", {}).update(
                component_schemas(*SCHEMAS, *OPEN_INFERENCE_SCHEMAS)
            )
            # As they stand: FastAPI drops every null, also those of the examples.
            paths = document["paths"]
            paths["/predict"]["post"] |= {"requestBody": PREDICT_BODY, "responses": predict_responses()}
            for (method, path), operation in (*JOB_OPERATIONS.items(), *OPERATIONS.items()):
                responses = {str(status): answer for status, answer in sorted(operation.responses.items())}
                paths[path][method.lower()]["responses"] = responses
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def run(settings: Settings, listener: socket.socket, make_server: "MakeServer | None" = None) -> None:
    """Serves on `listener`, which it closes, until a signal has drained it; takes the whole process for it."""
    _calm_garbage_collector()
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(serve(settings, listener, make_server or Server))


def _calm_garbage_collector() -> None:
    """Leaves out what was imported and looks less often: 10 to 20 % less CPU per request of 16 agents, measured.

    A parsed request alone makes hundreds of objects, where the default threshold is 700; none is in a cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def serve(settings: Settings, listener: socket.socket, make_server: "MakeServer") -> None:
    """Serves on `listener`, which it closes, until a signal has drained it."""
    async with (
        RouterClient(settings.router, router_wait_s=settings.router_wait_s) as router,
        open_store(settings) as store,
    ):
        parts = make_parts(router, store, settings)
        server = make_server(create_app(parts, settings), settings, parts.open_requests)
        parts.jobs.start()
        try:
            await server.serve(sockets=[listener])
        finally:
            await parts.jobs.drain(server.drain_left_s)
    logger.info("stopped")


class CannotStart(Exception):
    """The database is there, but not for this process; the text tells why."""


@contextlib.asynccontextmanager
async def open_store(settings: Settings) -> AsyncGenerator[SqlJobStore, None]:
    """The store of this process. Raises CannotStart; a database that is away is no reason not to."""
    try:
        store = SqlJobStore(_store_settings(settings))
    except ValueError as exc:
        raise _bad_url(exc) from exc
    try:
        await _begin(store)
        yield store
    finally:
        await store.aclose()


def _bad_url(exc: ValueError) -> CannotStart:
    return CannotStart(f"DATABASE_URL: {exc}")


async def _begin(store: JobStore) -> None:
    try:
        await store.open()
        await store.prepare()
    except ValueError as exc:
        raise _bad_url(exc) from exc
    except SchemaError as exc:
        raise CannotStart(str(exc)) from exc
    except StoreUnavailable as exc:
        logger.warning("the database is away, the gateway starts without it: %s", exc)
    except StoreError as exc:
        raise CannotStart(str(exc)) from exc


def _store_settings(settings: Settings) -> StoreSettings:
    return StoreSettings(
        url=settings.database_url, should_migrate=settings.migrate, max_waiting=settings.job_max_waiting
    )


class Protocol(HttpToolsProtocol):
    """uvicorn's, with bounded heads, problem documents for what is not HTTP, and no upgrades.

    Java's HttpClient asks each http:// server to upgrade to h2c. llhttp then leaves the body to the new protocol, which
    nobody here speaks, so the wish is made a header without meaning before it is parsed.
    """

    # A parser is at a request's head until its headers are complete; what arrived of it so far, in bytes.
    _is_in_head = True
    _head_bytes = 0
    # No request has begun yet.
    _is_fresh = True

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to a head; past MAX_HEAD_BYTES the connection ends."""
        if self._is_in_head:
            self._head_bytes += len(data)
            if b"pgrade" in data:
                data = _UPGRADE.sub(b"\r\nX-Ignored-Upgrade:", data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request line and headers have more than {MAX_HEAD_BYTES:,} bytes")

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._is_in_head, self._head_bytes, self._is_fresh = False, 0, False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request begins."""
        self._is_in_head = True
        super().on_message_complete()

    def shutdown(self) -> None:
        """The server is about to leave. A request that is on its way, as far as one can see, is given time to arrive.

        uvicorn closes every connection without a request being answered, and resets the clients of those that were
        accepted just now. The answer will tell the client that the connection closes.
        """
        if self._is_fresh or (self.cycle.response_complete and (self._head_bytes or self._has_unread())):
            self.loop.call_later(FIRST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def _has_unread(self) -> bool:
        return not self.transport.is_closing() and has_waiting(self.transport.get_extra_info("socket"))

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP and closes the connection; no request has begun that could have an id."""
        self._refuse(400, msg)

    def _refuse(self, status: int, detail: str) -> None:
        self.transport.write(problems.malformed_http(status, detail))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn with the drain described above. Its own closes the listener at once, and ends with the signal."""

    def __init__(self, app: FastAPI, settings: Settings, open_requests: OpenRequests) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nobody asks for the client's address
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=ceil(settings.drain_timeout_s) + LINGER_S,
            )
        )
        self._settings = settings
        self._open_requests = open_requests
        self._drain_task: asyncio.Task[None] | None = None
        self._drained_at_s = 0.0
        self._has_signal = False

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handles the signals while serving; unlike uvicorn's, does not raise them again, so that a drain exits 0."""
        before = {signal_: signal.signal(signal_, self.handle_exit) for signal_ in SIGNALS}
        try:
            yield
        finally:
            for signal_, handler in before.items():
                signal.signal(signal_, handler)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """First signal: drain. Second: leave now, with the status that shells give a killed process."""
        if self._has_signal:
            os._exit(128 + sig)
        self._has_signal = True
        self._loop.call_soon_threadsafe(self.start_drain)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until drained."""
        self._loop = asyncio.get_running_loop()
        self._listeners = sockets or []
        try:
            await super().serve(sockets)
        finally:
            if self._drain_task is not None:
                self._drain_task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens when the signals are handled already: who reads the line may send one."""
        await super().startup(sockets)
        for listener in sockets or ():
            logger.info("listening on %s, router %s", url_of(listener), self._settings.router)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts what waits to be accepted, each turn of the loop some, before it closes the listeners."""
        give_up_s = self._loop.time() + EMPTYING_S
        while any(map(has_waiting, self._listeners)) and self._loop.time() < give_up_s:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await super().shutdown(sockets)

    @property
    def is_draining(self) -> bool:
        """From the first signal on."""
        return self._drain_task is not None

    @property
    def drain_left_s(self) -> float:
        """What is left of a drain's time; 0 without one."""
        return max(0.0, self._drained_at_s - asyncio.get_running_loop().time())

    def start_drain(self, delay_s: float | None = None) -> None:
        """Begins the drain, with the settings' delay by default; a second call changes nothing."""
        if self._drain_task is None:
            delay_s = self._settings.drain_delay_s if delay_s is None else delay_s
            self._drained_at_s = asyncio.get_running_loop().time() + delay_s + self._settings.drain_timeout_s
            self._drain_task = asyncio.create_task(self._drain(delay_s), name="drain")

    def refuse_new(self) -> None:
        """No further connection may come into the backlog."""
        for listener in self._listeners:
            refuse_new(listener)

    async def _drain(self, delay_s: float) -> None:
        logger.info("draining: not ready, accepting for %g s more", delay_s)
        self._open_requests.start_drain()
        await asyncio.sleep(delay_s)
        self.refuse_new()
        await asyncio.sleep(HANDSHAKE_S)
        self.should_exit = True
        await asyncio.sleep(self._settings.drain_timeout_s)
        logger.warning("drain timeout: %d requests are answered with 503", len(self._open_requests))
        self._open_requests.end_all()


MakeServer: TypeAlias = Callable[[FastAPI, Settings, OpenRequests], Server]
