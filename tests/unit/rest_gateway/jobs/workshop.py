"""A worker with what it needs, all of it fake but itself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from rest_gateway.jobs.housekeeping import Housekeeping
from rest_gateway.jobs.loops import Loops
from rest_gateway.jobs.records import NewJob, Submitted
from rest_gateway.jobs.tasks import Tasks
from rest_gateway.jobs.worker import Worker
from rest_gateway.metrics import Metrics
from rest_gateway.routes.answers import end_of_job
from rest_gateway.schemas.jobs import encode_text
from rest_gateway.schemas.predict import TextCall
from tests.unit.rest_gateway.fake_router import FakeRouter
from tests.unit.rest_gateway.jobs.fake_store import FakeStore, until


def text_job(text: str = "fine", timeout_s: float = 3600.0) -> NewJob:
    return NewJob(kind="text", input=encode_text(TextCall(text, None)), timeout_s=timeout_s)


class Workshop:
    def __init__(self, store: FakeStore, router: FakeRouter, *, concurrency: int, retention_s: float = 3600.0) -> None:
        self.store, self.router = store, router
        self.metrics = Metrics()
        self.changed: list[UUID] = []
        self.loops = Loops()
        tasks, tell = Tasks(router, end_of_job), self.changed.append
        self.worker = Worker(store, tasks, self.loops, self.metrics, concurrency=concurrency, on_change=tell)
        self.housekeeping = Housekeeping(
            store,
            self.loops,
            self.metrics,
            retention_s=retention_s,
            on_change=tell,
            on_arrival=self.worker.note_arrival,
        )

    async def submit(self, text: str = "fine", timeout_s: float = 3600.0) -> Submitted:
        return await self.worker.submit(text_job(text, timeout_s))

    async def settled(self) -> None:
        """Lets time pass until the worker has claimed once."""
        await until(lambda: self.store.calls["claim"] > 0)
        await until(lambda: self.loops.is_database_away is not None)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def working(
    store: FakeStore | None = None,
    router: FakeRouter | None = None,
    *,
    concurrency: int = 4,
    retention_s: float = 3600.0,
) -> AsyncIterator[Workshop]:
    shop = Workshop(store or FakeStore(), router or FakeRouter(), concurrency=concurrency, retention_s=retention_s)
    shop.worker.start()
    shop.housekeeping.start()
    try:
        yield shop
    finally:
        await shop.worker.aclose()


def busy_router() -> FakeRouter:
    """Its calls hang until they are released."""
    router = FakeRouter()
    router.close_gate()
    return router
