"""Backends: the pool of each backend by name, and their changes.

Addresses and slots change in a pool that stays. Whatever else changes for a backend makes a new pool in place of the
old one. A pool that is replaced, or whose backend is gone, is closed when nobody uses it any more: what waits there, or
is in flight, is answered from there.
"""

import asyncio
import logging
from collections.abc import Callable

from router.config import BackendSettings, Settings
from router.dispatch.pool import ReplicaPool
from router.metrics import Metrics

logger = logging.getLogger(__name__)

# How often it is asked whether a pool that leaves is still in use.
LOOK_S = 0.5


class Backends:
    """The pools of a router. `make_pool`: of a backend's settings, not started."""

    def __init__(
        self, settings: Settings, make_pool: Callable[[Settings, BackendSettings], ReplicaPool], metrics: Metrics
    ) -> None:
        self._settings = settings
        self._make_pool = make_pool
        self._metrics = metrics
        # State: the pools; those that leave, by the task that waits for their end.
        self.pools: dict[str, ReplicaPool] = {}
        self._leaving: dict[asyncio.Task[None], ReplicaPool] = {}
        for name, backend in settings.backends.items():
            self._add(name, make_pool(settings, backend))

    def __repr__(self) -> str:
        return f"<Backends {', '.join(self.pools)}; {len(self._leaving)} pools leave>"

    def start(self) -> None:
        """Connect all."""
        for pool in self.pools.values():
            pool.start()

    def apply(self, settings: Settings, is_used: Callable[[ReplicaPool], bool]) -> None:
        """Add, change and take away pools. `is_used`: whether rows wait or fly in one that leaves."""
        before, self._settings = self._settings, settings
        for name in before.backends.keys() - settings.backends.keys():
            for gauge in (self._metrics.ready_replicas, self._metrics.ejected_replicas):
                gauge.remove(name)
            self._let_leave(name, self.pools.pop(name), is_used)
        for name, backend in settings.backends.items():
            if name not in before.backends:
                self._start(name, backend)
            elif _lasting(before, name) != _lasting(settings, name):
                self._let_leave(name, self.pools[name], is_used)
                self._start(name, backend)
            else:
                self._change(self.pools[name], before.backends[name], backend)

    async def aclose(self) -> None:
        """Let go of every replica."""
        leaving = list(self._leaving.items())
        for task, _ in leaving:
            task.cancel()
        await asyncio.gather(*(task for task, _ in leaving), return_exceptions=True)
        await asyncio.gather(*(pool.aclose() for pool in [*self.pools.values(), *(pool for _, pool in leaving)]))

    def _add(self, name: str, pool: ReplicaPool) -> None:
        self.pools[name] = pool
        self._metrics.ready_replicas.labels(name).set_function(pool.count_ready)
        self._metrics.ejected_replicas.labels(name).set_function(pool.count_ejected)

    def _start(self, name: str, backend: BackendSettings) -> None:
        pool = self._make_pool(self._settings, backend)
        self._add(name, pool)
        pool.start()

    def _change(self, pool: ReplicaPool, before: BackendSettings, backend: BackendSettings) -> None:
        if backend.addresses != before.addresses:
            pool.set_addresses(backend.addresses)
        if backend.max_in_flight != before.max_in_flight:
            pool.set_max_in_flight(backend.max_in_flight)

    def _let_leave(self, name: str, pool: ReplicaPool, is_used: Callable[[ReplicaPool], bool]) -> None:
        task = asyncio.create_task(self._close_unused(name, pool, is_used), name=f"close backend {name}")
        self._leaving[task] = pool
        task.add_done_callback(lambda done: self._leaving.pop(done, None))

    async def _close_unused(self, name: str, pool: ReplicaPool, is_used: Callable[[ReplicaPool], bool]) -> None:
        while is_used(pool):  # noqa: ASYNC110 (no batcher knows that it is the last)
            await asyncio.sleep(LOOK_S)
        await pool.aclose()
        logger.info("backend %s: the replicas it had before are closed", name)


def _lasting(settings: Settings, name: str) -> tuple[object, ...]:
    """What cannot change within a pool."""
    backend = settings.backends[name].model_copy(update={"addresses": [], "max_in_flight": 0, "model_interval_s": 0.0})
    return backend, settings.batch_timeout_s, settings.limits.max_backend_message_bytes
