"""Other settings under rows that wait and fly: none is lost, order is kept, and every field has its effect. In virtual
time, with fake replicas."""

import asyncio
import gc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.backends import Backends
from router.config import BackendSettings, Settings
from router.core.model_info import ModelInfo, ModelReport, ModelState, TensorInfo
from router.core.types import BatchKey, Block, Tensor
from router.dataplane import DataPlane
from router.dispatch.pool import ReplicaPool, Rules
from router.errors import Blame, NotFound, Refused, ResourceExhausted, RouterError, StreamLost, Unavailable
from router.metrics import Metrics
from router.models import Models, Unlearned
from router.single_flight import SingleFlight
from tests.builders import make_block, make_key, make_texts
from tests.unit.router.fakes import FakeBackend, RecordingReply

pytestmark = pytest.mark.anyio


def make_settings(
    models: list[dict[str, Any]], backends: Mapping[str, dict[str, Any]] | None = None, **changes: object
) -> Settings:
    backends = backends or {"one": {}}
    given = {
        "backends": {name: {"addresses": [f"{name}:1"], "max_in_flight": 1, **more} for name, more in backends.items()},
        "models": [{"backend": "one", "max_batch_size": 4, "max_queue_delay_s": 0, **model} for model in models],
    }
    return Settings(**{**given, **changes})  # type: ignore[arg-type]


class Router:
    """Backends and a data plane, changed as the server changes them; replicas are fakes by address, newest last.

    Replicas are asked about the models that a test learns, and about no others.
    """

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics()
        self.replicas: dict[str, list[FakeBackend]] = {}
        self.backends = Backends(settings, self._make_pool, self.metrics)
        self.models = Models(settings, self.backends.pools)
        self.plane = DataPlane(settings, self.backends.pools, self.metrics, self.models)
        self.models.on_change = self.plane.refit
        self.backends.start()

    def _make_pool(self, _: Settings, backend: BackendSettings) -> ReplicaPool:
        rules = Rules(
            backend.max_in_flight,
            backend.ejection_s,
            probe_interval_s=0.0,
            batch_timeout_s=60.0,
            resolve_interval_s=5.0,
        )
        return ReplicaPool(self._connect, backend.addresses, rules)

    def _connect(self, address: str) -> FakeBackend:
        replica = FakeBackend(address)
        self.replicas.setdefault(address, []).append(replica)
        return replica

    def replica(self, address: str = "one:1") -> FakeBackend:
        return self.replicas[address][-1]

    def apply(self, settings: Settings) -> None:
        self.backends.apply(settings, self.plane.uses)
        self.plane.apply(settings)

    async def learn(self, info: ModelInfo) -> None:
        """Let the replica tell of model `m` from now on, and know it."""
        self.replica().reports["m"] = ModelReport(ModelState.READY, info)
        await self.models.report("m")

    def ask(
        self,
        *values: float,
        key: BatchKey | None = None,
        timeout_s: float = 60.0,
        tenant: str = "default",
        is_batch_class: bool = False,
    ) -> "Caller":
        block = make_block(*values, key=key)
        block.tenant, block.is_batch_class = tenant, is_batch_class
        return Caller(self, block, timeout_s)


class Caller:
    """One call of one block."""

    def __init__(self, router: Router, block: Block, timeout_s: float) -> None:
        self.reply = RecordingReply()
        call = router.plane.open(self.reply, block.rows, timeout_s)
        block.recipient, block.arrived_at = call, asyncio.get_running_loop().time()
        block.deadline = block.arrived_at + timeout_s
        router.plane.infer(call, [block])

    @property
    def values(self) -> list[float]:
        return [self.reply.values[place] for place in sorted(self.reply.values)]

    @property
    def error(self) -> RouterError | None:
        return next(iter(self.reply.failures.values()), None)


@asynccontextmanager
async def routing(settings: Settings) -> AsyncIterator[Router]:
    """A router that must end empty."""
    before = asyncio.all_tasks()
    router = Router(settings)
    yield router
    await router.plane.aclose()
    await router.models.aclose()
    await router.backends.aclose()
    assert "<DataPlane 0 open calls" in repr(router.plane)
    assert " 0 rows queued" in repr(router.plane)
    every = [replica for replicas in router.replicas.values() for replica in replicas]
    assert all(replica.in_flight == 0 and replica.is_closed for replica in every)
    assert asyncio.all_tasks() == before


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def sent(replica: FakeBackend) -> list[list[float]]:
    return [one.values for one in replica.sent]


async def answer_all(*replicas: FakeBackend) -> None:
    """Answer until nothing comes any more."""
    while flying := [one for replica in replicas for one in replica.sent if not one.future.done()]:
        for one in flying:
            one.answer()
        await settle()


async def test_rows_that_wait_go_by_the_new_batch_size_in_their_order_and_those_in_flight_go_on() -> None:
    async with routing(make_settings([{}])) as router:
        callers = [router.ask(1), router.ask(2, 3, 4, 5, 6), router.ask(7)]
        await settle()
        flying = sent(router.replica())
        router.apply(make_settings([{"max_batch_size": 2}]))
        router.ask(8)
        await answer_all(router.replica())
        assert flying == [[1, 2, 3, 4]]
        assert sent(router.replica()) == [[1, 2, 3, 4], [5, 6], [7, 8]]
        assert [caller.values for caller in callers] == [[2], [4, 6, 8, 10, 12], [14]]


async def test_a_batchs_bytes_change_for_rows_of_one_width_and_for_texts() -> None:
    async with routing(make_settings([{"max_batch_size": 64}])) as router:
        router.ask(0)
        Caller(router, make_texts("first"), 60.0)
        await settle()
        router.ask(*range(1, 9))
        Caller(router, make_texts("aaaa", "bbbb", "cccc"), 60.0)
        router.apply(make_settings([{"max_batch_size": 64, "max_batch_bytes": 16}]))
        while flying := [one for one in router.replica().sent if not one.future.done()]:
            for one in flying:
                one.answer((Tensor("output", "FP32", (one.batch.rows,), bytes(4 * one.batch.rows)),))
            await settle()
        rows = [(one.batch.key.model_name, one.batch.rows) for one in router.replica().sent]
        assert sorted(rows) == [("m", 1), ("m", 4), ("m", 4), ("sentiment", 1), ("sentiment", 1), ("sentiment", 2)]


async def test_retries_change_for_rows_that_are_in_flight_already() -> None:
    async with routing(make_settings([{}])) as router:
        caller = router.ask(1)
        await settle()
        router.apply(make_settings([{"retries": 0}]))
        router.replica().sent[0].fail(StreamLost("gone"))
        await settle()
        assert caller.error is not None
        assert len(router.replica().sent) == 1


async def test_a_longer_delay_holds_by_the_service_time_that_was_learned_before() -> None:
    async with routing(make_settings([{}], {"one": {"max_in_flight": 2}})) as router:
        router.ask(1)
        await asyncio.sleep(5)
        await answer_all(router.replica())
        router.apply(make_settings([{"max_queue_delay_s": 0.1}], {"one": {"max_in_flight": 2}}))
        router.ask(2)
        await asyncio.sleep(0.05)
        router.ask(3)
        await asyncio.sleep(0.04)
        assert sent(router.replica()) == [[1]]
        await asyncio.sleep(0.02)
        assert sent(router.replica()) == [[1], [2, 3]]
        await answer_all(router.replica())


async def test_more_slots_are_taken_at_once_and_fewer_when_they_are_free() -> None:
    async with routing(make_settings([{"max_batch_size": 1}])) as router:
        router.ask(*range(8))
        await settle()
        assert len(router.replica().sent) == 1
        router.apply(make_settings([{"max_batch_size": 1}], {"one": {"max_in_flight": 3}}))
        await settle()
        assert len(router.replica().sent) == 3
        router.apply(make_settings([{"max_batch_size": 1}], {"one": {"max_in_flight": 1}}))
        for one in router.replica().sent[:2]:
            one.answer()
        await settle()
        assert len(router.replica().sent) == 3
        await answer_all(router.replica())
        assert sent(router.replica()) == [[value] for value in range(8)]


async def test_without_a_limit_of_slots_rows_gather_in_a_window_from_then_on() -> None:
    async with routing(make_settings([{"max_queue_delay_s": 0.5}])) as router:
        router.ask(1)
        await settle()
        router.apply(make_settings([{"max_queue_delay_s": 0.5}], {"one": {"max_in_flight": 0}}))
        router.ask(2)
        await asyncio.sleep(0.4)
        router.ask(3)
        assert sent(router.replica()) == [[1]]
        await asyncio.sleep(0.11)
        assert sent(router.replica()) == [[1], [2, 3]]
        await answer_all(router.replica())


async def test_addresses_come_and_go_without_losing_what_they_hold() -> None:
    async with routing(make_settings([{}])) as router:
        caller = router.ask(1)
        await settle()
        router.apply(make_settings([{}], {"one": {"addresses": ["two:1"]}}))
        other = router.ask(2)
        await settle()
        assert sent(router.replica("two:1")) == [[2]]
        assert not router.replica("one:1").is_closed
        await answer_all(router.replica("one:1"), router.replica("two:1"))
        assert (caller.values, other.values) == ([2], [4])
        await settle()
        assert router.replica("one:1").is_closed


async def test_where_a_models_backend_changes_old_rows_end_there_and_new_ones_go_to_the_other() -> None:
    both: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    async with routing(make_settings([{}], both)) as router:
        flying, waiting = router.ask(1, 2, 3, 4), router.ask(5)
        await settle()
        router.apply(make_settings([{"backend": "two"}], both))
        new = router.ask(6)
        await settle()
        assert sent(router.replica("two:1")) == [[6]]
        await answer_all(router.replica("one:1"), router.replica("two:1"))
        assert sent(router.replica("one:1")) == [[1, 2, 3, 4], [5]]
        assert (flying.values, waiting.values, new.values) == ([2, 4, 6, 8], [10], [12])


async def test_a_backend_that_is_gone_is_closed_when_its_last_row_is_answered() -> None:
    async with routing(make_settings([{}], {"one": {}, "two": {}})) as router:
        waiting = [router.ask(1), router.ask(2, 3, 4, 5)]
        await settle()
        router.apply(make_settings([{"backend": "two"}], {"two": {}}))
        assert router.metrics.registry.get_sample_value("router_ready_replicas", {"backend": "one"}) is None
        await asyncio.sleep(10)
        assert not router.replica("one:1").is_closed
        await answer_all(router.replica("one:1"))
        assert [caller.values for caller in waiting] == [[2], [4, 6, 8, 10]]
        await asyncio.sleep(3)
        assert router.replica("one:1").is_closed
        assert not router.replica("two:1").is_closed


async def test_deadlines_and_cancels_reach_rows_that_wait_for_a_backend_that_is_gone() -> None:
    async with routing(make_settings([{}], {"one": {}, "two": {}})) as router:
        flying = router.ask(9)
        await settle()
        hasty = router.ask(1, timeout_s=2.0)
        router.apply(make_settings([{"backend": "two"}], {"two": {}}))
        await asyncio.sleep(5)
        assert hasty.reply.ended_at == 2.0
        await answer_all(router.replica("one:1"))
        assert flying.values == [18]
        assert sent(router.replica("one:1")) == [[9]]


async def test_a_model_that_is_gone_is_not_found_and_what_it_took_is_answered() -> None:
    only_m = make_settings([{"match": {"model_name": "m"}}])
    async with routing(make_settings([{}])) as router:
        old = router.ask(1, key=make_key("other"))
        await settle()
        router.apply(only_m)
        new = router.ask(2, key=make_key("other"))
        assert isinstance(new.error, NotFound)
        await answer_all(router.replica())
        assert old.values == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_timeout_s": 5},
        {"limits": {"max_backend_message_bytes": 2**25}},
        {"backends": {"one": {"protocol": "unary"}}},
    ],
)
async def test_what_a_pool_cannot_change_makes_a_new_one_beside_the_old(changes: dict[str, Any]) -> None:
    async with routing(make_settings([{}])) as router:
        old = router.ask(1)
        await settle()
        router.apply(make_settings([{}], **changes))
        new = router.ask(2)
        await settle()
        first, second = router.replicas["one:1"]
        assert (sent(first), sent(second)) == ([[1]], [[2]])
        await answer_all(first, second)
        await asyncio.sleep(3)
        assert (first.is_closed, second.is_closed) == (True, False)
        assert (old.values, new.values) == ([2], [4])


async def test_how_often_models_are_asked_about_changes_in_a_pool_that_stays() -> None:
    async with routing(make_settings([{}])) as router:
        router.apply(make_settings([{}], {"one": {"model_interval_s": 1}}))
        assert len(router.replicas["one:1"]) == 1
        await router.learn(told())
        await asyncio.sleep(10)
        assert len(router.replica().described) > 8


async def test_bounds_of_rows_bytes_and_keys_hold_from_then_on_for_what_comes() -> None:
    async with routing(make_settings([{}])) as router:
        router.ask(0)
        await settle()
        router.ask(1, 2, 3)
        for limits, reason in (
            ({"max_queued_rows": 3}, "queue_rows"),
            ({"max_queued_bytes": 12}, "queue_bytes"),
            ({"max_key_bytes": 12}, "key_bytes"),
            ({"max_process_rows": 3}, "process_rows"),
        ):
            router.apply(make_settings([{}], limits=limits))
            error = router.ask(4).error
            assert isinstance(error, ResourceExhausted)
            assert error.reason == reason
        router.apply(make_settings([{}], limits={"max_keys": 1}))
        error = router.ask(4, key=make_key("other")).error
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "keys"
        router.apply(make_settings([{}]))
        assert router.ask(4, key=make_key("other")).error is None
        await answer_all(router.replica())


async def test_bounds_of_tenants_count_what_waits_already_here_and_in_a_backend_that_is_gone() -> None:
    bounded = make_settings([{"backend": "two"}], {"two": {}}, limits={"max_tenant_rows": 4})
    async with routing(make_settings([{}], {"one": {}, "two": {}})) as router:
        router.ask(0)
        router.ask(0, key=make_key("other"))
        await settle()
        router.ask(1, 2, tenant="loud")
        router.ask(1, key=make_key("other"), tenant="loud")
        router.apply(bounded)
        assert router.ask(4, tenant="loud").error is None
        error = router.ask(5, tenant="loud").error
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "tenant_rows"
        assert router.ask(*range(4), tenant="calm").error is None
        await settle()
        await answer_all(router.replica("one:1"), router.replica("two:1"))
        assert router.ask(*range(4), tenant="loud").error is None
        router.apply(make_settings([{"backend": "two"}], {"two": {}}))
        assert router.ask(*range(9), tenant="loud").error is None
        await answer_all(router.replica("two:1"))


async def learn(router: Router, agent_type: str = "a", *, rows: int = 1, tenant: str = "default") -> None:
    """Wait until model `m` is known, wherever it is by then."""
    deadline = asyncio.get_running_loop().time() + 60
    while True:
        try:
            router.models.find("m", "", agent_type)
        except Unlearned:
            await router.models.learn("m", "", agent_type, rows=rows, nbytes=rows, deadline=deadline, tenant=tenant)
        else:
            return


async def test_rows_of_an_unknown_model_that_moves_are_asked_for_where_it_is_now() -> None:
    """Those of an agent type that has not moved wait where they are, although less may wait now."""
    both: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    moved: list[dict[str, Any]] = [{"match": {"agent_type": "a"}, "backend": "two"}, {"match": {"agent_type": "b"}}]
    async with routing(make_settings([{}], both)) as router:
        router.replica("one:1").set_ready(is_ready=False)
        moves, stays = asyncio.create_task(learn(router)), asyncio.create_task(learn(router, "b", rows=2))
        gone = asyncio.create_task(learn(router, "c"))
        await settle()
        router.apply(make_settings(moved, both, limits={"max_queued_rows": 1}))
        await settle()
        await moves
        assert router.replica("two:1").described == [("m", "")]
        assert isinstance(gone.exception(), NotFound)
        assert not stays.done()
        router.replica("one:1").set_ready(is_ready=True)
        await stays


async def test_bounds_of_tenants_count_rows_of_an_unknown_model_whose_backend_is_another_now() -> None:
    limits = {"max_tenant_rows": 4}
    async with routing(make_settings([{}], limits=limits)) as router:
        router.replica().set_ready(is_ready=False)
        waits = asyncio.create_task(learn(router, rows=3, tenant="loud"))
        await settle()
        router.apply(make_settings([{}], {"one": {"ejection_s": 7}}, limits=limits))
        router.replica().set_ready(is_ready=False)
        await settle()
        with pytest.raises(ResourceExhausted, match="3 rows of tenant 'loud' wait already, 4 may"):
            await learn(router, rows=2, tenant="loud")
        waits.cancel()
        await settle()
        assert repr(router.models.budget) == "<Budget 0 rows, 0 bytes>"


async def test_tenants_that_wait_share_the_next_batch_by_the_new_weights() -> None:
    async with routing(make_settings([{}])) as router:
        router.ask(0)
        await settle()
        for tenant, first in (("gold", 10), ("other", 20)):
            router.ask(*range(first, first + 8), tenant=tenant)
        router.apply(make_settings([{}], tenant_weights={"gold": 3}))
        router.replica().sent[0].answer()
        await settle()
        assert sorted(sent(router.replica())[1]) == [10, 11, 12, 20]
        await answer_all(router.replica())


async def test_batch_rows_that_wait_are_due_by_the_new_patience() -> None:
    async with routing(make_settings([{}])) as router:
        router.ask(0)
        await settle()
        router.ask(1, is_batch_class=True)
        await asyncio.sleep(2)
        router.ask(*range(10, 18))
        router.apply(make_settings([{"batch_class_patience_s": 1}]))
        router.replica().sent[0].answer()
        await settle()
        assert sent(router.replica())[1] == [1, 10, 11, 12]
        await answer_all(router.replica())


async def test_idle_keys_go_after_the_new_time() -> None:
    async with routing(make_settings([{}])) as router:
        router.ask(1)
        await settle()
        await answer_all(router.replica())
        await asyncio.sleep(20)
        router.apply(make_settings([{}], limits={"key_idle_s": 30}))
        await asyncio.sleep(9)
        assert "1 keys" in repr(router.plane)
        await asyncio.sleep(5)
        assert " 0 keys" in repr(router.plane)


async def test_sharing_begins_and_ends_while_rows_wait() -> None:
    plain, shared = make_settings([{}]), make_settings([{"deterministic": True, "cache_ttl_s": 60}])
    async with routing(plain) as router:
        callers = [router.ask(0)]
        await settle()
        callers += [router.ask(1), router.ask(1)]
        router.apply(shared)
        callers += [router.ask(2), router.ask(2), router.ask(1)]
        router.apply(plain)
        callers += [router.ask(2)]
        hasty = router.ask(7, timeout_s=1.0)
        await asyncio.sleep(2)
        await answer_all(router.replica())
        assert sent(router.replica()) == [[0], [1, 1, 2, 1], [2]]
        assert [caller.values for caller in callers] == [[0], [2], [2], [4], [4], [2], [4]]
        assert hasty.reply.closed_by is not None
        router.apply(shared)
        router.ask(5)
        await settle()
        await answer_all(router.replica())
        assert router.ask(5).values == [10]


async def test_sharing_that_ends_and_begins_again_is_another_one() -> None:
    """Rows of the first once departed in the books of the second, and nobody who followed them there was answered."""
    plain, shared = (
        make_settings([{"max_batch_size": 1}]),
        make_settings([{"max_batch_size": 1, "deterministic": True}]),
    )
    async with routing(shared) as router:
        router.ask(0)
        await settle()
        before = router.ask(1)
        await settle()
        router.apply(plain)
        router.apply(shared)
        router.replica().sent[0].answer()
        await settle()
        during = router.ask(1)
        await settle()
        await answer_all(router.replica())
        after = router.ask(1)
        await settle()
        await answer_all(router.replica())
        assert [caller.values for caller in (before, during, after)] == [[2], [2], [2]]


async def test_answers_are_forgotten_when_they_may_be_kept_for_another_time() -> None:
    def cached(**more: object) -> Settings:
        return make_settings([{"deterministic": True, "cache_ttl_s": 60, **more}])

    async with routing(cached()) as router:
        router.ask(5)
        await settle()
        await answer_all(router.replica())
        router.apply(cached(max_batch_size=2))
        assert router.ask(5).values == [10]
        router.apply(cached(cache_ttl_s=30))
        router.ask(5)
        await settle()
        assert sent(router.replica()) == [[5], [5]]
        await answer_all(router.replica())


async def test_answers_are_forgotten_that_would_not_be_believed_now() -> None:
    def cached(*, allow_nan: bool) -> Settings:
        return make_settings([{"deterministic": True, "cache_ttl_s": 60, "allow_nan": allow_nan}])

    async with routing(cached(allow_nan=True)) as router:
        router.ask(5)
        await settle()
        router.replica().sent[0].answer((Tensor("output", "FP32", (1,), b"\0\0\xc0\x7f"),))
        await settle()
        router.apply(cached(allow_nan=False))
        caller = router.ask(5)
        await settle()
        await answer_all(router.replica())
        assert caller.values == [10]


async def test_nothing_is_left_of_sharing_that_has_ended() -> None:
    """The alarm for the oldest answer once kept all of them for as long as they might have been known."""

    def alive() -> int:
        return sum(isinstance(thing, SingleFlight) for thing in gc.get_objects())

    gc.collect()
    before = alive()
    async with routing(make_settings([{"deterministic": True, "cache_ttl_s": 1e6}])) as router:
        router.ask(5)
        await settle()
        await answer_all(router.replica())
        router.replica().sent.clear()
        assert alive() == before + 1
        router.apply(make_settings([{}]))
        await settle()
        assert alive() == before


async def test_a_model_that_moves_and_may_not_be_sent_twice_any_more_is_not_sent_twice_where_it_was() -> None:
    """Settings did not reach lanes that were retired by the same change, or had been before."""
    both: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    async with routing(make_settings([{}], both)) as router:
        early = router.ask(1)
        await settle()
        router.apply(make_settings([{"backend": "two", "retries": 0}], both))
        router.replica("one:1").sent[0].fail(StreamLost("gone"))
        await settle()
        assert isinstance(early.error, Unavailable)
        assert len(router.replica("one:1").sent) == 1
    async with routing(make_settings([{}], both)) as router:
        early = router.ask(1)
        await settle()
        router.apply(make_settings([{"backend": "two"}], both))
        router.apply(make_settings([{"backend": "two", "retries": 0}], both))
        router.replica("one:1").sent[0].fail(StreamLost("gone"))
        await settle()
        assert isinstance(early.error, Unavailable)


def told(datatype: str = "FP32", **more: Any) -> ModelInfo:  # noqa: ANN401
    return ModelInfo("m", inputs=(TensorInfo("vector", datatype, (-1, -1)),), **more)


async def test_what_waits_goes_in_batches_as_large_as_the_backend_takes_now() -> None:
    async with routing(make_settings([{}])) as router:
        await router.learn(told())
        callers = [router.ask(0)]
        await settle()
        callers += [router.ask(value) for value in (1, 2, 3, 4)]
        await settle()
        await router.learn(told(max_batch_size=2))
        await answer_all(router.replica())
        assert sent(router.replica()) == [[0], [1, 2], [3, 4]]
        assert [caller.values for caller in callers] == [[0], [2], [4], [6], [8]]


@pytest.mark.parametrize("other", [told("FP64"), told(max_batch_size=0)], ids=["other input", "no batches"])
async def test_a_key_that_its_model_does_not_take_any_more_ends_what_it_has_and_is_gone(other: ModelInfo) -> None:
    async with routing(make_settings([{}])) as router:
        await router.learn(told())
        flying, waiting = router.ask(1, 2, 3, 4), router.ask(5)
        await settle()
        assert "1 keys" in repr(router.plane)
        await router.learn(other)
        assert "0 keys" in repr(router.plane)
        await answer_all(router.replica())
        assert (flying.values, waiting.values) == ([2, 4, 6, 8], [10])


async def test_a_key_stays_while_its_model_is_absent_or_not_ready() -> None:
    async with routing(make_settings([{}])) as router:
        await router.learn(told())
        router.ask(1)
        await settle()
        for state in (ModelState.UNREADY, ModelState.ABSENT, ModelState.READY):
            router.replica().reports["m"] = ModelReport(state, told())
            await router.models.report("m")
            assert "1 keys" in repr(router.plane)
        await answer_all(router.replica())


async def test_a_key_hears_of_a_model_that_was_absent_for_long_and_is_back() -> None:
    async with routing(make_settings([{"max_batch_size": 4}])) as router:
        await router.learn(told(max_batch_size=2))
        callers = [router.ask(1)]
        await settle()
        router.replica().reports["m"] = ModelReport(ModelState.ABSENT)
        await asyncio.sleep(30)
        router.replica().reports["m"] = ModelReport(ModelState.READY, told(max_batch_size=2))
        await asyncio.sleep(10)
        callers += [router.ask(value) for value in (2, 3, 4)]
        await answer_all(router.replica())
        assert sent(router.replica()) == [[1], [2, 3], [4]]
        assert [caller.values for caller in callers] == [[2], [4], [6], [8]]


async def test_a_backend_that_refuses_a_batch_is_asked_about_its_model_at_once() -> None:
    async with routing(make_settings([{}])) as router:
        await router.learn(told())
        caller = router.ask(1)
        await settle()
        router.replica().reports["m"] = ModelReport(ModelState.ABSENT)
        router.replica().sent[0].fail(Refused("unknown model", NotFound, Blame.MODEL))
        await asyncio.sleep(0.3)
        assert isinstance(caller.error, NotFound)
        with pytest.raises(NotFound):
            router.models.find("m", "", "a")
