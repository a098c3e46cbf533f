"""ReplicaPool: the replicas of a backend, and the slots of each model on them (`slots.py`).

Replicas come and go while it runs. Those that fail or are slow are ejected for a while (`core/breaker.py`).

It moves whole batches: no gRPC, no callers, no rows. Decisions are plain calls; only `infer` waits.
"""

import asyncio
import functools
import logging
import math
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from router.core.breaker import SLOW_RATIO, State, common_ratio, may_eject
from router.core.hedge import Hedging
from router.core.model_info import IndexEntry, ModelReport, ModelState
from router.core.model_rules import agree, differ
from router.core.pulse import Sign
from router.core.types import Batch, BatchAnswer
from router.dispatch.member import Backend, Member, Standing
from router.dispatch.prober import Prober
from router.dispatch.race import Race
from router.dispatch.resolver import Resolver, open_source
from router.dispatch.slots import CLOCK_SLACK_S, ModelSlots, Slot
from router.errors import BackendError, BatchTimeout, Malformed, StreamLost

logger = logging.getLogger(__name__)

# What a replica is to blame for. Its refusals are the model's word, or back-pressure.
COUNTED_FAILURES = (StreamLost, BatchTimeout, Malformed)
# One of several replicas has told that it serves a model: the others have so long to tell what they know of it.
OTHERS_S = 0.5
# Whether it is ready as a whole a server tells within so long, or it is not.
READY_S = 3.0
# The word of an index for a model that is served.
READY = "READY"

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Rules:
    """How a pool treats its replicas.

    `max_in_flight`: batches at a time per replica and model, 0: no limit. `ejection_s`: how long a replica that fails
    is left alone the first time. `probe_interval_s`: how often each is asked for a sign of life, 0: never.
    `batch_timeout_s`: how long a batch may take of which nothing else is known. `resolve_interval_s`: how often names
    are looked up again. `max_in_flight_total`: for how many batches a replica has room, whatever their models.
    """

    max_in_flight: int
    ejection_s: float
    probe_interval_s: float
    batch_timeout_s: float
    resolve_interval_s: float
    max_in_flight_total: int = sys.maxsize


class ReplicaPool:
    """The replicas of one backend. `connect` makes one of an address, not started; `entries`: see `set_addresses`."""

    def __init__(self, connect: Callable[[str], Backend], entries: Iterable[str], rules: Rules) -> None:
        self._connect = connect
        self._rules = rules
        self._max_in_flight = rules.max_in_flight
        # State: those that belong to it and those that leave and still hold batches, with who probes them; the
        # addresses of the former; whether `start` was called; the tasks that close who has left.
        self._members: list[Member] = []
        self._probers: dict[Member, Prober] = {}
        self._peers: list[str] = []
        self._has_started = False
        self._closing: set[asyncio.Task[None]] = set()
        # What wakes those who wait for a change of a replica; the models of which replicas tell different things.
        self._has_changed = asyncio.Event()
        self._disagreed: set[tuple[str, str]] = set()
        self._resolver = Resolver(self._set_members, lambda entry: open_source(entry, rules.resolve_interval_s))
        # A model's slots live as long as one of its keys holds them.
        self._slots: weakref.WeakValueDictionary[tuple[str, str], ModelSlots] = weakref.WeakValueDictionary()
        self.set_addresses(entries)

    def __repr__(self) -> str:
        return f"<ReplicaPool {self._members!r}>"

    def count_ready(self) -> int:
        """Replicas that are connected."""
        return sum(member.replica.is_connected for member in self._staying())

    def count_ejected(self) -> int:
        """Replicas that get no batches for what became of their last ones, or are on trial again."""
        return sum(not member.breaker.is_closed for member in self._staying())

    def start(self) -> None:
        """Connect every replica."""
        self._has_started = True
        for member in self._members:
            self._start(member)
        self._resolver.start()

    async def aclose(self) -> None:
        """Let go of every replica."""
        await self._resolver.aclose()
        for member in list(self._members):
            self._close(member)
        await asyncio.gather(*self._closing)

    def slots(self, model: tuple[str, str]) -> ModelSlots:
        """The slots of a model; its keys share them."""
        slots = self._slots.get(model)
        if slots is None:
            slots = self._slots[model] = ModelSlots(self._members, self._max_in_flight, self._rules.max_in_flight_total)
        return slots

    def set_addresses(self, entries: Iterable[str]) -> None:
        """Let replicas join and leave; `entries` as in the settings: addresses, or where they come from.

        Who leaves gets no new batch, ends what it holds, and is closed then. Who comes back before that is the same
        replica as before, never a second one beside it.
        """
        self._resolver.follow(entries)

    def set_max_in_flight(self, max_in_flight: int) -> None:
        """Change the slots per replica and model; what is in flight beyond them ends in its own time."""
        self._max_in_flight = max_in_flight
        for slots in list(self._slots.values()):
            slots.set_max_in_flight(max_in_flight)

    async def infer(self, batch: Batch, slot: Slot, hedging: Hedging) -> BatchAnswer:
        """Send a batch to the slot's replica and return its checked answer; gives the slot back in any case.

        When it stalls it may be sent to a second replica as well. `hedging`: of the batch's key. Raises BackendError.
        """
        stalled_s = hedging.sent(batch.rows) if len(self._peers) > 1 else None
        if stalled_s is None:
            return await self._send(batch, hedging, slot)
        send = functools.partial(self._send, batch, hedging)
        return await Race(send, functools.partial(self._spare, batch, hedging, slot)).run(slot, stalled_s)

    async def _send(self, batch: Batch, hedging: Hedging, slot: Slot) -> BatchAnswer:
        failure: BackendError | None = None
        member = slot.seat.member
        member.out[slot] = slot.taken_at, batch.rows, hedging.times
        try:
            answer = await member.replica.infer(batch)
            failure = answer.fault
            if failure:
                self._count_failure(slot, failure)
            else:
                self._count_answer(slot, answer, hedging)
        except BackendError as error:
            failure = error
            self._count_failure(slot, error)
            raise
        except asyncio.CancelledError:
            if member.trial is slot:
                self._count_failure(slot, BatchTimeout("another replica was faster"))
            raise
        finally:
            self._give_back(slot, failure)
        return answer

    def _spare(self, batch: Batch, hedging: Hedging, slot: Slot) -> Slot | None:
        """A slot for a second copy of a batch that has stalled, if somebody still waits for it and the key may."""
        now = asyncio.get_running_loop().time()
        if all(part.block.recipient.is_closed for part in batch.parts):
            return None

        def expect_s(replica: str) -> float:
            return hedging.times.of(replica).predict(batch.rows)

        return slot.slots.take_spare(slot, now, lambda: hedging.may_hedge(batch.rows, now), expect_s)

    # -- questions ---------------------------------------------------------------------------------------------------

    def uses(self, model: tuple[str, str]) -> bool:
        """Whether a key of the model is alive here."""
        return model in self._slots

    async def wait_for_change(self) -> None:
        """Return when a replica may have come, gone, or changed its standing."""
        await self._has_changed.wait()

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        """Ask about a model; `model_rules.agree` tells who is believed. Raises StreamLost when nobody can tell."""
        reports = await self._ask(lambda replica: replica.describe(model), _serves)
        if not differ(reports):
            self._disagreed.discard(model)
        elif model not in self._disagreed:
            self._disagreed.add(model)
            logger.warning("replicas tell different things of model %r; the first one is believed: %s", model, reports)
        agreed = agree(reports)
        if agreed is None:
            raise StreamLost(f"no replica tells of model {model[0]!r}")
        return agreed

    async def is_ready(self) -> bool:
        """Whether a replica says within READY_S that it is ready, whatever its models are."""
        return Sign.READY in await self._ask(lambda replica: replica.probe(), lambda sign: sign is Sign.READY, READY_S)

    async def index(self) -> tuple[IndexEntry, ...]:
        """Ask for the models of the backend; of several replicas' entries for one, the first that is READY counts."""
        found: dict[tuple[str, str], IndexEntry] = {}
        for entries in await self._ask(lambda replica: replica.index(), lambda _: False):
            for entry in entries or ():
                if found.setdefault((entry.name, entry.version), entry).state != READY:
                    found[entry.name, entry.version] = entry
        return tuple(found.values())

    async def _ask(
        self, question: Callable[[Backend], Awaitable[A]], is_enough: Callable[[A], bool], most_s: float = math.inf
    ) -> list[A | None]:
        """What the replicas that are there answer within `most_s`, in their order; None of a silent one.

        Once an answer is enough the others have OTHERS_S: one that hangs holds nobody up.
        """
        tasks = [
            asyncio.create_task(_hear(question(member.replica)), name=f"ask {member.address}")
            for member in self._members
            if member.standing is not Standing.AWAY
        ]
        loop = asyncio.get_running_loop()
        pending, until = set(tasks), loop.time() + most_s
        try:
            while pending and (left_s := until - loop.time()) > 0:
                done, pending = await asyncio.wait(
                    pending, timeout=None if until == math.inf else left_s, return_when=asyncio.FIRST_COMPLETED
                )
                if any((answer := _heard(task)) is not None and is_enough(answer) for task in done):
                    until = min(until, loop.time() + OTHERS_S)
            return [_heard(task) for task in tasks]
        finally:
            for task in pending:
                task.cancel()

    # -- joining and leaving -----------------------------------------------------------------------------------------

    def _staying(self) -> list[Member]:
        return [member for member in self._members if not member.is_leaving]

    def _set_members(self, addresses: Sequence[str]) -> None:
        members = {member.address: member for member in self._members}
        for address in addresses:
            if address not in members:
                self._join(Member(self._connect(address), self._rules.ejection_s, self._rules.batch_timeout_s))
        for address, member in members.items():
            member.is_leaving = address not in addresses
            self._close_if_done(member)
        self._peers = list(addresses)
        self._replica_changed()

    def _join(self, member: Member) -> None:
        self._members.append(member)
        for slots in list(self._slots.values()):
            slots.join(member)
        if self._has_started:
            logger.info("backend %s joined", member.address)
            self._start(member)

    def _start(self, member: Member) -> None:
        member.replica.start(self._replica_changed)
        if self._rules.probe_interval_s:
            prober = self._probers[member] = Prober(member, self._rules.probe_interval_s, self._replica_changed)
            prober.start()

    def _close_if_done(self, member: Member) -> None:
        if member.is_leaving and not member.replica.in_flight and member in self._members:
            logger.info("backend %s left", member.address)
            self._close(member)

    def _close(self, member: Member) -> None:
        self._members.remove(member)
        for slots in list(self._slots.values()):
            slots.part(member)
        task = asyncio.create_task(self._let_go(member), name=f"close {member.address}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _let_go(self, member: Member) -> None:
        prober = self._probers.pop(member, None)
        if prober:
            await prober.aclose()
        await member.aclose()

    def _replica_changed(self) -> None:
        """Look at the standing of all: while one is away, another may do that is none too good.

        A model that takes some of the room goes behind the others, or the first would take it all.
        """
        self._has_changed.set()
        self._has_changed = asyncio.Event()
        for prober in self._probers.values():
            prober.look()
        self._survey()
        for model, slots in list(self._slots.items()):
            busy = slots.busy
            slots.assign()
            if slots.busy > busy:
                self._slots[model] = self._slots.pop(model)

    def _survey(self) -> None:
        best = min((member.standing for member in self._members), default=Standing.AWAY)
        for member in self._members:
            member.admit(best)

    # -- health ------------------------------------------------------------------------------------------------------

    def _count_answer(self, slot: Slot, answer: BatchAnswer, hedging: Hedging) -> None:
        member = slot.seat.member
        state, ratio, common = member.breaker.state, None, 1.0
        member.has_answered = True
        if member.pulse.is_doubtful:
            member.pulse.heard()
            self._survey()
        if len(self._peers) > 1:
            service_s = answer.answered_at - answer.dispatched_at
            ratio = hedging.times.ratio(answer.replica, answer.batch_rows, service_s, self._peers)
        is_slow = ratio is not None and ratio > SLOW_RATIO
        if is_slow:
            common = common_ratio(other.breaker for other in self._staying() if other is not member)
        member.breaker.answered(slot.taken_at, answer.answered_at, ratio, common)
        if is_slow or member.breaker.state is not state:
            self._follow_breaker(member, state, common)

    def _count_failure(self, slot: Slot, error: BackendError) -> None:
        breaker = slot.seat.member.breaker
        state = breaker.state
        if isinstance(error, COUNTED_FAILURES):
            breaker.failed(slot.taken_at, asyncio.get_running_loop().time())
            self._follow_breaker(slot.seat.member, state)

    def _follow_breaker(self, member: Member, state: State, common: float = 1.0) -> None:
        """Eject a member that must go and may; let everybody know when the breaker is not in `state` any more."""
        loop, breaker = asyncio.get_running_loop(), member.breaker
        why = breaker.trip(common)
        if why and self._may_eject(member):
            breaker.eject(loop.time())
        if breaker.state is state:
            return
        if breaker.is_closed:
            logger.info("backend %s is back", member.address)
        else:
            for_s, why = breaker.until - loop.time(), why or "its trial has failed"
            logger.warning("backend %s ejected for %g s: %s", member.address, for_s, why)
            member.wake_timer = loop.call_at(breaker.until, self._wake, member)
        self._survey()
        loop.call_soon(self._replica_changed)

    def _may_eject(self, member: Member) -> bool:
        others_fit = sum(other.standing is Standing.FIT for other in self._members if other is not member)
        return not member.is_leaving and may_eject(len(self._staying()), self.count_ejected(), others_fit)

    def _wake(self, member: Member) -> None:
        """An ejection is over: the replica is tried with one small batch."""
        member.breaker.wake(asyncio.get_running_loop().time() + CLOCK_SLACK_S)
        self._replica_changed()

    def _give_back(self, slot: Slot, failure: BackendError | None) -> None:
        member = slot.seat.member
        del member.out[slot]
        if member.trial is slot:
            member.trial = None
        slot.slots.release(slot, failure)
        self._close_if_done(member)


async def _hear(answer: Awaitable[A]) -> A | None:
    """None: silence."""
    try:
        return await answer
    except StreamLost:
        return None


def _heard(task: asyncio.Task[A | None]) -> A | None:
    """None of a question that is out, or that ended with its replica."""
    return task.result() if task.done() and not task.cancelled() else None


def _serves(report: ModelReport) -> bool:
    return report.state is ModelState.READY
