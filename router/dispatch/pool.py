"""ReplicaPool: the replicas of a backend, and the slots of each model on them (`slots.py`).

It moves whole batches: no gRPC, no callers, no rows. Decisions are plain calls; only `infer` waits.
"""

import asyncio
import weakref
from collections.abc import Sequence

from router.core.types import Batch, BatchAnswer
from router.dispatch.slots import Backend, ModelSlots, Slot
from router.errors import BackendError


class ReplicaPool:
    """The replicas of one backend."""

    def __init__(self, replicas: Sequence[Backend], max_in_flight: int) -> None:
        self._replicas = list(replicas)
        self._max_in_flight = max_in_flight
        # A model's slots live as long as one of its keys holds them.
        self._slots: weakref.WeakValueDictionary[tuple[str, str], ModelSlots] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<ReplicaPool {self._replicas!r}>"

    def count_ready(self) -> int:
        """Replicas that are connected."""
        return sum(replica.is_ready for replica in self._replicas)

    def start(self) -> None:
        """Connect every replica."""
        for replica in self._replicas:
            replica.start(self._replica_changed)

    async def aclose(self) -> None:
        """Let go of every replica."""
        await asyncio.gather(*(replica.aclose() for replica in self._replicas))

    def slots(self, model: tuple[str, str]) -> ModelSlots:
        """The slots of a model; its keys share them."""
        slots = self._slots.get(model)
        if slots is None:
            slots = self._slots[model] = ModelSlots(self._replicas, self._max_in_flight)
        return slots

    async def infer(self, batch: Batch, slot: Slot) -> BatchAnswer:
        """Send a batch to the slot's replica and return its checked answer; gives the slot back in any case.

        Raises BackendError.
        """
        failure: BackendError | None = None
        try:
            answer = await slot.seat.replica.infer(batch)
            failure = answer.fault
        except BackendError as error:
            failure = error
            raise
        finally:
            slot.slots.release(slot, failure)
        return answer

    def _replica_changed(self) -> None:
        for slots in list(self._slots.values()):
            slots.assign()
