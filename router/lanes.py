"""Lanes: the live keys, each with what its blocks are given to, made on demand and forgotten when idle.

A lane is a key's batcher, or the `SingleFlight` before it. When settings change, a lane whose pool is the same goes on
by the new ones, with all that waits and all that was learned. Where the pool is another, or the model is gone, the lane
is retired: it serves what it has on the pool it has, while new rows go elsewhere, and is dropped once it is empty.

No calls, no batching rules, no replicas here.
"""

import asyncio
import functools
import itertools
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from router.batcher import Batcher
from router.config import Settings
from router.core.policy import choose_policy
from router.core.queue import Bounds
from router.core.types import BatchKey, Block, Contract
from router.core.variable_queue import make_queue
from router.dispatch.pool import ReplicaPool
from router.errors import NotFound, ResourceExhausted
from router.metrics import Metrics
from router.models import Model, Models
from router.single_flight import SingleFlight

KEYS_RETRY_AFTER_S = 60.0
# Idle keys, and retired ones that are empty, are not looked for more often.
MIN_SWEEP_S = 1.0


class Lane(Protocol):
    """What a key's blocks are given to."""

    def infer(self, block: Block) -> None:
        """Take a block; its recipient hears of every row. Raises RouterError when it is refused."""

    def discard(self, block: Block) -> None:
        """Nobody waits for a block any more; one that is not here is none of ours."""


@dataclass(slots=True, eq=False)
class _Site:
    """One key's batcher with what stands before it, and the pool it serves from."""

    key: BatchKey
    batcher: Batcher
    pool: ReplicaPool
    single_flight: SingleFlight | None = None

    @property
    def lane(self) -> SingleFlight | Batcher:
        return self.single_flight or self.batcher


class Lanes:
    """The lanes of a router by key. `pools` by backend; the caller may change the map before `apply`."""

    def __init__(self, settings: Settings, pools: Mapping[str, ReplicaPool], metrics: Metrics, models: Models) -> None:
        self._settings = settings
        self._pools = pools
        self._metrics = metrics
        self._models = models
        self._loop = asyncio.get_running_loop()
        ids, prefix = itertools.count(1), secrets.token_hex(4)
        self._next_batch_id = lambda: f"{prefix}-{next(ids)}"
        # State: a lane per live key, and what belongs to it; those that only end what they hold; what all queues hold.
        self.by_key: dict[BatchKey, Lane] = {}
        self._sites: dict[BatchKey, _Site] = {}
        self._retired: list[_Site] = []
        self.budget = models.budget
        self._set_budget()
        self._sweep_timer = self._loop.call_later(settings.limits.key_idle_s, self._sweep)
        self._tidy_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sites)

    def open(self, key: BatchKey) -> Lane:
        """A lane for a key that has none. Raises NotFound or ResourceExhausted."""
        limits = self._settings.limits
        if len(self._sites) >= limits.max_keys:
            message = f"{limits.max_keys} kinds of rows (model, agent type, vector length) are in use, no more may be"
            raise ResourceExhausted(message, reason="keys", retry_after_s=KEYS_RETRY_AFTER_S)
        model = self._models.of_key(key)
        site = self._sites[key] = _Site(key, self._make_batcher(key, model), self._pools[model.settings.backend])
        return self._set_sharing(site, model)

    def apply(self, settings: Settings) -> None:
        """Go on by other settings; `pools` has them already."""
        self._settings = settings
        self._models.apply(settings)
        self._set_budget()
        for site in self._all():
            site.batcher.recount()
        self._models.recount()
        for site in list(self._all()):
            self._refit(site)
        self._sweep_timer.cancel()
        self._sweep()

    def refit(self, model: tuple[str, str]) -> None:
        """Go on by what is known of a model now."""
        for site in [site for site in self._sites.values() if site.key.model == model]:
            self._refit(site)

    def _refit(self, site: _Site) -> None:
        try:
            model = self._models.of_key(site.key)
        except NotFound:
            model = None
        is_retired = self._sites.get(site.key) is not site
        stays = model and site.pool is self._pools[model.settings.backend] and self._models.takes(site.key)
        if model and stays and not is_retired:
            self._configure(site, model)
            return
        if model:  # where it serves from stays as it was; how often its rows may be sent is the model's, wherever
            site.batcher.set_retries(model.settings.retries)
        if not is_retired:
            self._retire(site)

    def _set_budget(self) -> None:
        limits = self._settings.limits
        self.budget.set_bounds(
            limits.max_queued_bytes,
            max_rows=limits.max_process_rows,
            max_tenant_rows=limits.max_tenant_rows,
            max_tenant_bytes=limits.max_tenant_bytes,
        )

    def uses(self, pool: ReplicaPool) -> bool:
        """Whether rows may still go there, or are there."""
        return any(site.pool is pool for site in self._all())

    async def aclose(self) -> None:
        """End what is in flight, without answers."""
        self._sweep_timer.cancel()
        if self._tidy_timer:
            self._tidy_timer.cancel()
        await asyncio.gather(*(site.lane.aclose() for site in self._all()))

    def _all(self) -> Iterator[_Site]:
        return itertools.chain(self._sites.values(), self._retired)

    def _make_batcher(self, key: BatchKey, model: Model) -> Batcher:
        settings = model.settings
        backend = self._settings.backends[settings.backend]
        return Batcher(
            key,
            queue=make_queue(key, self._bounds(model), self.budget),
            budget=self.budget,
            policy=choose_policy(backend.max_in_flight, settings.max_queue_delay_s),
            pool=self._pools[settings.backend],
            backend=settings.backend,
            retries=settings.retries,
            contract=_contract(key, model),
            next_batch_id=self._next_batch_id,
            on_failure=functools.partial(self._models.doubt, settings.backend, key.model),
            metrics=self._metrics,
        )

    def _bounds(self, model: Model) -> Bounds:
        limits = self._settings.limits
        return Bounds(
            max_batch_rows=model.max_batch_rows,
            max_rows=limits.max_queued_rows,
            max_batch_bytes=model.settings.max_batch_bytes,
            max_bytes=limits.max_key_bytes,
            weights=self._settings.tenant_weights,
            patience_s=model.settings.batch_class_patience_s,
        )

    def _configure(self, site: _Site, model: Model) -> None:
        settings = model.settings
        site.batcher.apply(
            self._bounds(model),
            max_in_flight=self._settings.backends[settings.backend].max_in_flight,
            max_queue_delay_s=settings.max_queue_delay_s,
            retries=settings.retries,
            contract=_contract(site.key, model),
        )
        self._set_sharing(site, model)

    def _set_sharing(self, site: _Site, model: Model) -> Lane:
        """Let equal rows share, or not. Who waits in a `SingleFlight` that is put aside is served by it to the end."""
        settings = model.settings
        if site.single_flight and not settings.deterministic:
            site.single_flight.put_aside()
            site.single_flight = None
        if settings.deterministic:
            site.single_flight = site.single_flight or SingleFlight(
                site.batcher, backend=settings.backend, metrics=self._metrics
            )
            site.single_flight.apply(
                cache_ttl_s=settings.cache_ttl_s,
                cache_max_bytes=settings.cache_max_bytes,
                max_rows=self._settings.limits.max_queued_rows,
                contract=_contract(site.key, model),
                outputs=site.key.outputs or model.told_outputs,
            )
        self.by_key[site.key] = site.lane
        return site.lane

    def _retire(self, site: _Site) -> None:
        del self.by_key[site.key]
        self._retired.append(self._sites.pop(site.key))
        if self._tidy_timer is None:
            self._tidy_timer = self._loop.call_later(MIN_SWEEP_S, self._tidy)

    def _tidy(self) -> None:
        """Drop the retired lanes that are empty."""
        for site in [site for site in self._retired if site.lane.is_idle_since(math.inf)]:
            self._retired.remove(site)
            site.lane.stop()
        self._tidy_timer = self._loop.call_later(MIN_SWEEP_S, self._tidy) if self._retired else None

    def _sweep(self) -> None:
        """Forget the keys that nobody has used for `key_idle_s`."""
        idle_s = self._settings.limits.key_idle_s
        then = self._loop.time() - idle_s
        for key in [key for key, site in self._sites.items() if site.lane.is_idle_since(then)]:
            del self.by_key[key]
            self._sites.pop(key).lane.stop()
        self._sweep_timer = self._loop.call_later(max(idle_s / 10, MIN_SWEEP_S), self._sweep)


def _contract(key: BatchKey, model: Model) -> Contract:
    """What answers must hold. `vector_output` is asked of keys that native rows have, not of a model's other inputs."""
    return Contract(model.settings.vector_output if model.is_native(key) else None, model.settings.allow_nan)
