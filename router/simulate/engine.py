"""The event loop of the simulator: what the batchers and the pool do with the pure core, in virtual time.

The queue, the policy with its service times, and the choice of a replica are the router's own objects. This module only
carries out what they decide, event by event, in the order of `batcher.py` and `dispatch/slots.py`: all rows that arrive
at one instant are looked at together; keys take free slots in turn; a hold rings, or lapses when a slot is taken or
freed. A test runs both on the same arrivals and compares every batch.

No CPU time passes here and nothing fails: what is simulated is waiting.
"""

import heapq
import itertools
import math
import random
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from router.core.admission import Admission
from router.core.balance import Load, choose
from router.core.budget import Budget
from router.core.policy import Hold, Policy, View
from router.core.queue import DEFAULT_PATIENCE_S, Bounds, KeyQueue
from router.core.types import DEFAULT_TENANT, BatchAnswer, BatchKey, Block, Part
from router.errors import RouterError

ServiceTime = Callable[[random.Random, int], float]
"""Seconds that a model takes for so many rows."""


@dataclass(slots=True)
class Arrival:
    """A block that comes at `at`. `caller`: of the closed loop, -1 for none; he asks again once it is answered."""

    at: float
    rows: int = 1
    key: str = ""
    timeout_s: float = math.inf
    caller: int = -1
    tenant: str = DEFAULT_TENANT
    is_batch_class: bool = False


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Callers who ask again `pause(chance)` seconds after each answer; the first time after a pause, too."""

    callers: int
    pause: Callable[[random.Random], float]
    timeout_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. `max_queued_rows`: per key. What happens in the first `warm_up_s` is in no count.

    `tenant_weights`, `batch_class_patience_s`: see KeyQueue.
    """

    policy: Callable[[], Policy]
    service_s: ServiceTime
    replicas: int = 1
    max_in_flight: int = 1
    max_batch_size: int = 64
    max_queued_rows: int = 65_536
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    batch_class_patience_s: float = DEFAULT_PATIENCE_S
    closed_loop: ClosedLoop | None = None
    warm_up_s: float = 0.0
    seed: int = 0

    @property
    def slots(self) -> int:
        """In all."""
        return self.replicas * self.max_in_flight


@dataclass(slots=True)
class Outcome:
    """What came of it. Per row that was answered: seconds from arrival to answer. Per batch: start, end and rows."""

    latencies_s: "array[float]" = field(default_factory=lambda: array("d"))
    batch_starts_s: "array[float]" = field(default_factory=lambda: array("d"))
    batch_ends_s: "array[float]" = field(default_factory=lambda: array("d"))
    batch_rows: "array[int]" = field(default_factory=lambda: array("i"))
    arrived_rows: int = 0
    late_rows: int = 0
    expired_rows: int = 0
    refused_rows: int = 0
    ended_at: float = 0.0


class _Nobody:
    """The recipient of every block: rows are counted here, not handed out."""

    is_closed = False

    def answer(self, part: Part, answer: BatchAnswer, offset: int) -> None:
        """See Recipient."""

    def fail(self, part: Part, error: RouterError) -> None:
        """See Recipient."""

    def expire(self) -> None:
        """See Recipient."""


_NOBODY = _Nobody()


@dataclass(slots=True, eq=False)
class _Key:
    """A batcher's state."""

    key: BatchKey
    queue: KeyQueue
    policy: Policy
    admission: Admission
    blocks_in_flight: int = 0
    new_blocks: int = 0
    new_rows: int = 0
    hold: Hold | None = None
    alarm_at: float = math.inf


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch on its slot."""

    key: _Key
    replica: int
    parts: tuple[Part, ...]
    rows: int
    started_at: float
    back_at: float


class Simulation:
    """One run; `run` may be called once."""

    def __init__(self, setup: Setup, arrivals: Iterable[Arrival]) -> None:
        self._setup = setup
        self._arrivals: Iterator[Arrival] = iter(arrivals)
        self._service_chance = random.Random(f"service {setup.seed}")  # noqa: S311 (simulates, guards nothing)
        self._pause_chance = random.Random(f"pause {setup.seed}")  # noqa: S311
        # State: what is to come, as (time, order, what); the keys; those that want a slot, and those that are held,
        # with and without regard to slots; the batches in flight, per replica and with the time they are expected back.
        self._events: list[tuple[float, int, Arrival | _Flight | _Key]] = []
        self._order = itertools.count()
        self._keys: dict[str, _Key] = {}
        self._waiting: OrderedDict[_Key, None] = OrderedDict()
        self._held: OrderedDict[_Key, None] = OrderedDict()
        self._resting: OrderedDict[_Key, None] = OrderedDict()
        self._in_flight = [0] * setup.replicas
        self._back_at: dict[_Flight, float] = {}
        self._budget = Budget(1 << 60)
        self.outcome = Outcome()

    # -- policy.Slots ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        """See policy.Slots."""
        return len(self._back_at)

    @property
    def others_wait(self) -> bool:
        """See policy.Slots."""
        return bool(self._waiting or self._held or self._resting)

    def count_free(self, _now: float, /) -> int:
        """See policy.Slots."""
        return self._setup.slots - self.busy

    def expected_back(self) -> Sequence[float]:
        """See policy.Slots."""
        return list(self._back_at.values())

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self, until: float) -> Outcome:
        """Simulate up to `until` seconds; what is still open then is in no count but `arrived_rows`."""
        self._start_callers()
        self._next_arrival()
        events = self._events
        while events and events[0][0] <= until:
            now = events[0][0]
            touched: dict[_Key, None] = {}
            while events and events[0][0] == now:
                self._happen(heapq.heappop(events)[2], touched, now)
            for key in touched:
                self._pump(key, now)
            self._assign(now)
        self.outcome.ended_at = until
        return self.outcome

    def _at(self, when: float, what: "Arrival | _Flight | _Key") -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _start_callers(self) -> None:
        loop = self._setup.closed_loop
        for caller in range(loop.callers if loop else 0):
            self._ask_again(caller, 0.0)

    def _ask_again(self, caller: int, now: float) -> None:
        loop = self._setup.closed_loop
        assert loop is not None, "a caller of no loop: this is a bug"
        at = now + loop.pause(self._pause_chance)
        self._at(at, Arrival(at, timeout_s=loop.timeout_s, caller=caller))

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self._at(arrival.at, arrival)

    def _happen(self, event: "Arrival | _Flight | _Key", touched: "dict[_Key, None]", now: float) -> None:
        if isinstance(event, Arrival):
            self._arrive(event, touched, now)
        elif isinstance(event, _Flight):
            self._land(event, touched, now)
        elif event.alarm_at <= now:
            event.alarm_at = math.inf
            touched[event] = None

    def _arrive(self, arrival: Arrival, touched: "dict[_Key, None]", now: float) -> None:
        if arrival.caller < 0:
            self._next_arrival()
        key = self._keys.get(arrival.key) or self._new_key(arrival.key)
        deadline = now + arrival.timeout_s
        whose = arrival.tenant, arrival.is_batch_class
        block = Block(key.key, arrival.caller, 0, arrival.rows, (), 0, now, deadline, _NOBODY, *whose)
        is_counted = now >= self._setup.warm_up_s
        self.outcome.arrived_rows += is_counted * arrival.rows
        try:
            self._admit(key, block, now)
            key.queue.push(block)
        except RouterError:
            self.outcome.refused_rows += is_counted * arrival.rows
            self._return_caller(block, now)
        else:
            key.new_blocks += 1
            key.new_rows += arrival.rows
            touched[key] = None

    def _new_key(self, name: str) -> _Key:
        setup = self._setup
        bounds = Bounds(
            max_batch_rows=setup.max_batch_size,
            max_rows=setup.max_queued_rows,
            weights=setup.tenant_weights,
            patience_s=setup.batch_class_patience_s,
        )
        queue = KeyQueue(bounds, row_bytes=0, budget=self._budget)
        key = self._keys[name] = _Key(BatchKey("model", "", name, ()), queue, setup.policy(), Admission())
        return key

    def _return_caller(self, block: Block, now: float) -> None:
        if block.index >= 0:
            self._ask_again(block.index, now)

    @property
    def _waiting_keys(self) -> int:
        return len(self._waiting) + len(self._held) + len(self._resting)

    # -- as in batcher.py --------------------------------------------------------------------------------------------

    def _admit(self, key: _Key, block: Block, now: float) -> None:
        rows, left_s = key.queue.rows, block.deadline - now
        if (rows + block.rows) * key.admission.row_s + key.admission.own_s <= left_s:
            return
        busy = sorted(max(back_at - now, 0.0) for back_at in self._back_at.values())
        returns_s = [0.0] * (self._setup.slots - self.busy) + busy
        ahead = key.queue.rows_ahead(block.tenant, block.is_batch_class, block.rows) if rows else 0
        key.admission.check(ahead + block.rows - 1 if ahead else 0, left_s, returns_s, self._waiting_keys)

    def _pump(self, key: _Key, now: float) -> None:
        key.hold = None
        self._count_arrivals(key, now)
        self._expire(key, now)
        if key.queue.rows:
            self._held.pop(key, None)
            self._resting.pop(key, None)
            self._waiting[key] = None
        self._set_alarm(key)

    def _count_arrivals(self, key: _Key, now: float) -> None:
        if key.new_blocks:
            key.policy.arrived(key.new_blocks, key.new_rows, now)
            key.new_blocks = key.new_rows = 0

    def _expire(self, key: _Key, now: float) -> None:
        """As in the batcher; what expires and what is given up count alike, and what has been sent in neither."""
        rows = key.queue.rows
        for block in key.queue.pop_expired(now):
            self._return_caller(block, now)
        self.outcome.expired_rows += (now >= self._setup.warm_up_s) * (rows - key.queue.rows)
        least_s = key.admission.give_up_s
        if least_s:
            self._give_up(key.queue.pop_infeasible(now, least_s), now)

    def _yield_seats(self, key: _Key, now: float) -> None:
        queue = key.queue
        likely_s = key.policy.service_times.likely_s(queue.seats)
        if likely_s:
            free = self.count_free(now)
            self._give_up(queue.pop_infeasible(now, likely_s, queue.rows - free * queue.seats), now)

    def _give_up(self, parts: Iterable[Part], now: float) -> None:
        for part in parts:
            self.outcome.expired_rows += (now >= self._setup.warm_up_s) * part.rows
            if part.first + part.rows == part.block.rows:
                self._return_caller(part.block, now)

    def _set_alarm(self, key: _Key) -> None:
        at = min(key.queue.wake_at - key.admission.give_up_s, key.hold.until if key.hold else math.inf)
        if at < key.alarm_at:
            key.alarm_at = at
            self._at(at, key)

    def _take(self, key: _Key, now: float) -> tuple[Part, ...]:
        self._expire(key, now)
        self._yield_seats(key, now)
        key.hold = None
        queue = key.queue
        if not queue.rows:
            return ()
        view = View(queue.blocks, queue.rows, queue.oldest_at, queue.wake_at, queue.is_full, key.blocks_in_flight, self)
        key.hold = key.policy.hold(view, now)
        if key.hold is None:
            return queue.pop_batch(now)
        self._set_alarm(key)
        (self._held if key.hold.lapses_with_slots else self._resting)[key] = None
        return ()

    # -- as in dispatch/slots.py -------------------------------------------------------------------------------------

    def _assign(self, now: float) -> None:
        while self._waiting and self.busy < self._setup.slots:
            key, _ = self._waiting.popitem(last=False)
            replica = self._choose(key)
            assert replica is not None, "a slot is free and nobody has it: this is a bug"
            parts = self._take(key, now)
            if parts:
                self._start(key, replica, parts, now)
            if key.queue.rows and key.hold is None:
                self._waiting[key] = None

    def _choose(self, key: _Key) -> int | None:
        rows, limit, lines = min(key.queue.rows, key.queue.seats), self._setup.max_in_flight, key.policy.service_times
        return choose(
            [
                Load(in_flight, in_flight, in_flight < limit, lines.of(str(replica)).predict(rows))
                for replica, in_flight in enumerate(self._in_flight)
            ]
        )

    def _start(self, key: _Key, replica: int, parts: tuple[Part, ...], now: float) -> None:
        rows = sum(part.rows for part in parts)
        back_at = now + self._setup.service_s(self._service_chance, rows)
        flight = _Flight(key, replica, parts, rows, now, back_at)
        self._back_at[flight] = now + key.policy.service_times.of(str(replica)).predict(rows)
        self._in_flight[replica] += 1
        key.blocks_in_flight += len(parts)
        self._at(back_at, flight)
        self._ask_held_again()

    def _land(self, flight: _Flight, touched: "dict[_Key, None]", now: float) -> None:
        del self._back_at[flight]
        self._in_flight[flight.replica] -= 1
        flight.key.blocks_in_flight -= len(flight.parts)
        self._ask_held_again()
        flight.key.policy.completed(str(flight.replica), flight.rows, now - flight.started_at, now)
        key, setup = flight.key, self._setup
        key.admission.update(
            key.policy.service_times, batch_rows=setup.max_batch_size, slots=setup.slots, keys=self._waiting_keys
        )
        self._count(flight, now)
        touched[flight.key] = None

    def _ask_held_again(self) -> None:
        self._waiting.update(self._held)
        self._held.clear()

    def _count(self, flight: _Flight, now: float) -> None:
        outcome = self.outcome
        is_counted = now >= self._setup.warm_up_s
        if is_counted:
            outcome.batch_starts_s.append(flight.started_at)
            outcome.batch_ends_s.append(now)
            outcome.batch_rows.append(flight.rows)
        for part in flight.parts:
            block = part.block
            if is_counted:
                outcome.latencies_s.extend([now - block.arrived_at] * part.rows)
                outcome.late_rows += (now > block.deadline) * part.rows
            if part.first + part.rows == block.rows:
                self._return_caller(block, now)
