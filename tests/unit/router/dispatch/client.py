"""A key that wants slots of a pool, without queue, policy or retries: so what happens to a batch can be told apart."""

import asyncio
from collections.abc import Iterable, Sequence

from router.core.hedge import Hedging
from router.core.isolation import Piece
from router.core.service_time import ServiceTimes
from router.core.types import ANY_ANSWER, Batch, BatchAnswer, Contract
from router.dispatch.pool import ReplicaPool
from router.dispatch.slots import ModelSlots, Slot
from router.errors import BackendError
from tests.builders import make_block
from tests.unit.router.fakes import FakeBackend


class Key:
    """A slots.Taker that sends batches of `rows` rows, as many as it is asked to. `budget`: retries it may spend."""

    def __init__(
        self,
        pool: ReplicaPool,
        *,
        rows: int = 8,
        budget: int = 1000,
        is_allowed: bool = True,
        contract: Contract = ANY_ANSWER,
    ) -> None:
        self.times = ServiceTimes()
        self.hedging = Hedging(self.times, self._may_spend, is_allowed=is_allowed)
        self.budget = budget
        self.ends: list[BatchAnswer | BackendError] = []
        self._pool = pool
        self._rows = rows
        self._contract = contract
        self._left = 0
        self._numbers = iter(range(1_000_000))
        self._slots: ModelSlots = pool.slots(("m", ""))
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, batches: int = 1) -> None:
        """Want slots for so many batches."""
        self._left += batches
        self._slots.request(self)

    async def exchange(self, batches: int = 1) -> Sequence[BatchAnswer | BackendError]:
        """Send batches one after the other; what became of them."""
        seen = len(self.ends)
        for _ in range(batches):
            self.send()
            await self.wait()
        return self.ends[seen:]

    async def wait(self) -> None:
        """Until nothing is out."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        """Give up what is out."""
        for task in self._tasks:
            task.cancel()
        await self.wait()

    def learn(self, replicas: Iterable[str], service_s: float, calls: int = 20) -> None:
        """So many calls on each replica have taken so long."""
        for replica in replicas:
            for _ in range(calls):
                self.times.observe(replica, self._rows, service_s)

    def save_for_hedges(self) -> None:
        """Have sent enough batches that one may be sent twice."""
        for _ in range(100):
            self.hedging.sent(self._rows)

    @property
    def wants_slot(self) -> bool:
        return self._left > 0

    def take(self, slots: ModelSlots, now: float, max_rows: int | None) -> Batch | None:
        if not self._left:
            return None
        self._left -= 1
        rows = self._rows if max_rows is None else min(max_rows, self._rows)
        part = make_block(*range(rows)).whole()
        return Batch(f"b-{next(self._numbers)}", part.block.key, (part,), rows, now, self._contract)

    def dispatch(self, batch: Batch, slot: Slot) -> None:
        task = asyncio.get_running_loop().create_task(self._infer(batch, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def rows_to_take(self) -> int:
        return self._rows

    def take_piece(self, piece: Piece, now: float) -> Batch | None:
        raise AssertionError("a piece of nobody")

    def expect_s(self, rows: int, replica: str) -> float:
        return self.times.of(replica).predict(rows)

    async def _infer(self, batch: Batch, slot: Slot) -> None:
        try:
            answer = await self._pool.infer(batch, slot, self.hedging)
        except BackendError as error:
            self.ends.append(error)
        else:
            self.times.observe(answer.replica, batch.rows, answer.answered_at - answer.dispatched_at)
            self.ends.append(answer)

    def _may_spend(self, rows: int, now: float) -> bool:
        self.budget -= 1
        return self.budget >= 0


def sent(*replicas: FakeBackend) -> list[int]:
    """Batches that each replica has got."""
    return [len(replica.sent) for replica in replicas]
