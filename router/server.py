"""Composition root and lifecycle: build the parts, serve, drain, stop.

Drain, in order: not ready, and every stream is told; calls are still taken for `drain_delay_s`, so that callers find
another router first; then calls are refused and what was accepted is answered, at most `drain_timeout_s`; then streams
end. The connections close with the process, not before: see `leave`.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable

import grpc.aio
from prometheus_client import start_http_server

from router.backends import Backends
from router.config import BackendSettings, Settings, check_same_process
from router.core.model_info import ModelState
from router.dataplane import DataPlane
from router.dispatch.certificates import Certificates
from router.dispatch.pool import ReplicaPool, Rules
from router.dispatch.replica import Replica
from router.metrics import Metrics
from router.models import Models
from router.servicers.access import Access
from router.servicers.convert import Routes, VectorOutputs
from router.servicers.health import Health
from router.servicers.inference import InferenceServicer
from router.servicers.open_inference import OpenInferenceServicer
from router.servicers.stream import Surroundings
from router.servicers.tenants import Tenants
from router.servicers.unary import Rpcs

logger = logging.getLogger(__name__)

# How long connections may linger once every call is answered.
CLOSE_GRACE_S = 1.0
# What the kernel has of the last answers may take so long to its clients. It drops them with a connection on which a
# client has just sent something that nobody has read.
LINGER_S = 0.25


class StartError(Exception):
    """The router cannot start; the message says why in one line."""


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """Without SO_REUSEPORT, or a second router would bind the same port and split the traffic silently. Clients of ours
    ping every 10 s; gRPC's default of 300 s between pings would cut them off."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _try_address(listen: str) -> None:
    """Bind it once ourselves: gRPC keeps the operating system's reason to itself."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {listen}: {error.strerror}") from error


def make_pool(settings: Settings, backend: BackendSettings) -> ReplicaPool:
    """The replicas of a backend, not connected yet."""
    connect = functools.partial(
        Replica,
        batch_timeout_s=settings.batch_timeout_s,
        max_message_bytes=settings.limits.max_backend_message_bytes,
        max_in_flight=backend.max_in_flight_total,
        protocol=backend.protocol,
        certificates=Certificates(backend.tls) if backend.tls else None,
    )
    rules = Rules(
        max_in_flight=backend.max_in_flight,
        ejection_s=backend.ejection_s,
        probe_interval_s=backend.probe_interval_s,
        batch_timeout_s=settings.batch_timeout_s,
        resolve_interval_s=backend.resolve_interval_s,
    )
    return ReplicaPool(connect, backend.addresses, rules)


class RouterServer:
    """The whole router of a process; `start`, then `stop`, on one loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self._backends = Backends(settings, make_pool, self.metrics)
        self._models = Models(settings, self._backends.pools)
        self._models.on_change = self._refit
        for state in (None, *ModelState):
            self.metrics.models.labels(state.name.lower() if state else "unknown").set_function(
                functools.partial(self._models.count, state)
            )
        self.plane = DataPlane(settings, self._backends.pools, self.metrics, self._models)
        access = Access(self.metrics, settings.log_requests)
        routes = Routes(settings, self._models)
        self._around = Surroundings(
            settings, self.plane, self._models, routes, access, VectorOutputs(), Tenants(settings)
        )
        self._rpcs = Rpcs()
        self._servicer = InferenceServicer(self._around, self._rpcs)
        self._open_inference = OpenInferenceServicer(self._around, self._rpcs)
        self._health = Health(self._models)
        self._server = grpc.aio.server(options=server_options(settings))
        self._close_metrics: Callable[[], None] = lambda: None
        self.address = settings.listen

    def apply(self, settings: Settings) -> None:
        """Go on by other settings; no row is lost. New pools come first, and old ones end when no row is there.

        Raises:
            ConfigError: something is different that holds for as long as the process lives; then nothing was changed.
        """
        check_same_process(self._settings, settings)
        self._settings = settings
        self._backends.apply(settings, self.plane.uses)
        self.plane.apply(settings)
        self._around.apply(settings)
        self._open_inference.apply(settings)

    def _refit(self, model: tuple[str, str]) -> None:
        """A backend tells other things of a model than before: forget what followed from them."""
        self.plane.refit(model)
        self._around.refit()
        self._open_inference.apply(self._settings)

    async def start(self) -> None:
        """Listen and connect. Raises StartError."""
        self._servicer.add_to(self._server)
        self._open_inference.add_to(self._server)
        self._health.add_to(self._server)
        self._bind()
        self._serve_metrics()
        self._backends.start()
        await self._health.serve()
        await self._server.start()
        logger.info("router listens on %s", self.address)

    def _bind(self) -> None:
        listen = self._settings.listen
        _try_address(listen)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {listen}: gRPC could not bind it") from error
        self.address = f"{listen.rpartition(':')[0]}:{port}"

    def _serve_metrics(self) -> None:
        if self._settings.metrics is None:
            return
        host, _, port = self._settings.metrics.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), registry=self.metrics.registry)
        except OSError as error:
            raise StartError(f"cannot serve metrics on {self._settings.metrics}: {error.strerror}") from error
        logger.info("metrics on http://%s:%d/metrics", host, server.server_port)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close_metrics = close

    async def drain(self) -> None:
        """Leave without losing what was accepted; see the module's text."""
        await self._health.leave()
        self._servicer.announce_draining()
        self._open_inference.announce_draining()
        logger.info("draining: new calls are taken for %g s more", self._settings.drain_delay_s)
        await asyncio.sleep(self._settings.drain_delay_s)
        self.plane.refuse_new()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self.plane.wait_until_idle()
                self._end_streams()
                await self._rpcs.wait_until_answered()

    async def leave(self) -> None:
        """Fail what is still open, flush it, and let go of everything but the gRPC server; the process must end now.

        Its end closes the connections, and who has a call under way then gets UNAVAILABLE, which it tries again. gRPC's
        own stop answers CANCELLED, which nobody tries again, to each call that has arrived and that it has not handed
        to us yet: under load there always is one (16 callers that try again at once: 12 for each stop, measured).
        """
        await self.plane.aclose()
        await self._models.aclose()
        self._end_streams()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_GRACE_S):
                await self._rpcs.wait_until_answered()
        await self._let_go()
        await asyncio.sleep(LINGER_S)
        logger.info("router stopped")

    async def stop(self) -> None:
        """Fail what is still open, flush it, and let go of everything."""
        await self.plane.aclose()
        await self._models.aclose()
        self._end_streams()
        await self._server.stop(CLOSE_GRACE_S)
        await self._let_go()
        logger.info("router stopped")

    def _end_streams(self) -> None:
        self._servicer.end_streams()
        self._open_inference.end_streams()

    async def _let_go(self) -> None:
        await self._backends.aclose()
        self._close_metrics()
