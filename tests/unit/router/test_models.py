"""What becomes of rows while nobody knows their model, and when what is known changes; in virtual time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.config import ModelSettings, Settings
from router.core.model_info import ModelInfo, ModelReport, ModelState, TensorInfo
from router.core.pulse import Sign
from router.core.types import BatchKey, Block
from router.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RouterError,
    StreamLost,
    Unavailable,
    Unsupported,
)
from router.models import Models, Unlearned
from tests.builders import Listener
from tests.unit.router.fakes import FakeBackend, pool_of

pytestmark = pytest.mark.anyio

READY, UNREADY, ABSENT = ModelState.READY, ModelState.UNREADY, ModelState.ABSENT
NAME = ("m", "", "")


def told(datatype: str = "FP32", **more: Any) -> ModelInfo:  # noqa: ANN401
    return ModelInfo("m", inputs=(TensorInfo("x", datatype, (-1, -1)),), **more)


class Router:
    """Models over one pool; `changes` counts what was told of them."""

    def __init__(
        self, *replicas: FakeBackend, interval_s: float, limits: dict[str, Any], model: dict[str, Any]
    ) -> None:
        self.settings = Settings(
            backends={"fake": {"addresses": ["fake:1"], "model_interval_s": interval_s}},  # type: ignore[dict-item]
            models=[{"backend": "fake", **model}],  # type: ignore[list-item]
            limits=limits,  # type: ignore[arg-type]
        )
        self.replicas = replicas
        self.pool = pool_of(*replicas)
        self.pool.start()
        self.pools = {"fake": self.pool}
        self.models = Models(self.settings, self.pools)
        self.changes = 0
        self.models.on_change = self._changed

    def _changed(self, model: tuple[str, str]) -> None:
        assert model == ("m", "")
        self.changes += 1

    async def learn(self, name: str = "m", *, rows: int = 1, nbytes: int = 4, timeout_s: float = 10.0) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        await self.models.learn(name, "", "", rows=rows, nbytes=nbytes, deadline=deadline)


@asynccontextmanager
async def routing(
    *replicas: FakeBackend,
    interval_s: float = 5.0,
    limits: dict[str, Any] | None = None,
    **model: Any,  # noqa: ANN401
) -> AsyncIterator[Router]:
    before = asyncio.all_tasks()
    router = Router(*(replicas or (FakeBackend(),)), interval_s=interval_s, limits=limits or {}, model=model)
    yield router
    await router.models.aclose()
    await router.pool.aclose()
    assert repr(router.models.budget) == "<Budget 0 rows, 0 bytes>"
    assert asyncio.all_tasks() == before


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_model_is_asked_about_once_for_all_who_wait() -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(READY, told(max_batch_size=8))
    async with routing(backend) as router:
        with pytest.raises(Unlearned) as caught:
            router.models.find(*NAME)
        assert caught.value.model == NAME
        await asyncio.gather(*(router.learn() for _ in range(100)))
        assert backend.described == [("m", "")]
        model = router.models.find(*NAME)
        assert (model.is_batched, model.max_batch_rows) == (True, 8)
        assert model.vector_spec(3).name == "x"


async def test_what_a_backend_does_not_tell_is_left_to_the_settings() -> None:
    async with routing(max_batch_size=16) as router:
        await router.learn()
        model = router.models.find(*NAME)
        assert (model.info, model.is_batched, model.max_batch_rows) == (None, True, 16)


async def test_a_model_that_the_settings_do_not_know_is_not_asked_about() -> None:
    async with routing(match={"model_name": "other"}) as router:
        for _ in range(2):
            with pytest.raises(NotFound):
                await router.learn()
        with pytest.raises(NotFound):
            router.models.find(*NAME)
        assert router.replicas[0].described == []


async def test_callers_wait_while_no_replica_is_there_and_one_who_leaves_is_forgotten() -> None:
    backend = FakeBackend(is_ready=False)
    async with routing(backend) as router:
        waits, leaves = asyncio.create_task(router.learn(rows=2, nbytes=8)), asyncio.create_task(router.learn())
        await asyncio.sleep(3)
        assert repr(router.models.budget) == "<Budget 3 rows, 12 bytes>"
        leaves.cancel()
        await settle()
        assert repr(router.models.budget) == "<Budget 2 rows, 8 bytes>"
        backend.set_ready(is_ready=True)
        await settle()
        assert waits.done()
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)


@pytest.mark.parametrize(("at", "is_over"), [(1.999, False), (2.001, True)])
async def test_a_caller_waits_until_their_deadline(at: float, is_over: bool) -> None:
    async with routing(FakeBackend(is_ready=False)) as router:
        task = asyncio.create_task(router.learn(timeout_s=2.0))
        await asyncio.sleep(at)
        assert task.done() is is_over
        with pytest.raises(DeadlineExceeded, match="no answer within 2 s"):
            await task


async def test_what_waits_is_bounded_for_one_model_and_for_all() -> None:
    limits = {"max_queued_rows": 3, "max_process_rows": 5}
    async with routing(FakeBackend(is_ready=False), limits=limits) as router:
        tasks = [asyncio.create_task(router.learn(rows=3)), asyncio.create_task(router.learn("n", rows=2))]
        await settle()
        with pytest.raises(ResourceExhausted, match="3 rows for one model wait already, 3 may") as caught:
            await router.learn()
        assert (caught.value.reason, caught.value.retry_after_s) == ("queue_rows", 1.0)
        with pytest.raises(InvalidArgument, match="4 rows at once; at most 3 may wait for one model"):
            await router.learn(rows=4)
        for task in tasks:
            task.cancel()
        await settle()


async def test_who_waits_hears_of_the_end() -> None:
    async with routing(FakeBackend(is_ready=False)) as router:
        task = asyncio.create_task(router.learn())
        await settle()
        await router.models.aclose()
        with pytest.raises(RouterError, match="shut down"):
            await task
        with pytest.raises(Unavailable):
            await router.models.report("m")


async def test_a_block_that_is_held_goes_on_or_leaves_or_expires() -> None:
    backend = FakeBackend(is_ready=False)
    resumed: list[Block] = []
    key = BatchKey("m", "", "", ())
    recipients = [Listener() for _ in range(3)]
    async with routing(backend) as router:
        blocks = [Block(key, 0, 0, 1, (bytes(4),), 4, 0.0, float(at), who) for at, who in enumerate(recipients, 1)]
        rooms = [router.models.hold(block, resumed.append) for block in blocks]
        await asyncio.sleep(1.5)
        assert [who.has_expired for who in recipients] == [True, False, False]
        rooms[1].discard(blocks[1])
        backend.set_ready(is_ready=True)
        await settle()
        assert resumed == [blocks[2]]


async def test_blocks_that_go_on_leave_the_others_their_turns() -> None:
    backend = FakeBackend(is_ready=False)
    resumed: list[Block] = []
    most = 0
    async with routing(backend) as router:
        blocks = [Block(BatchKey("m", "", "", ()), 0, 0, 1, (b"",), 0, 0.0, 60.0, Listener()) for _ in range(700)]
        rooms = [router.models.hold(block, resumed.append) for block in blocks]
        backend.set_ready(is_ready=True)
        while len(resumed) < 699:
            before = len(resumed)
            await asyncio.sleep(0)
            most = max(most, len(resumed) - before)
            rooms[650].discard(blocks[650])  # at once, and later nobody misses it
        assert most == 256
        assert resumed == blocks[:650] + blocks[651:]


async def test_a_block_that_cannot_go_on_fails_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(is_ready=False)
    resumed: list[Block] = []
    key = BatchKey("m", "", "", ())
    bad, good = Listener(), Listener()

    def resume(block: Block) -> None:
        if block.recipient is bad:
            raise ZeroDivisionError
        resumed.append(block)

    async with routing(backend) as router:
        for who in (bad, good):
            router.models.hold(Block(key, 0, 0, 1, (bytes(4),), 4, 0.0, 60.0, who), resume)
        backend.set_ready(is_ready=True)
        await settle()
        assert [block.recipient for block in resumed] == [good]
        assert [str(error) for *_, error in bad.failures] == ["internal error"]
    assert "this is a bug" in caplog.text


async def test_an_absent_model_is_not_found_and_noticed_when_it_appears() -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(ABSENT)
    async with routing(backend) as router:
        await router.learn()
        with pytest.raises(NotFound, match="backend 'fake' has no model 'm'"):
            router.models.find(*NAME)
        backend.reports["m"] = ModelReport(READY, told())
        await asyncio.sleep(5.1)
        assert router.models.find(*NAME).info == told()
        assert router.changes == 1


async def test_a_name_that_was_asked_for_once_and_is_absent_is_soon_forgotten() -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(ABSENT)
    async with routing(backend) as router:
        await router.learn()
        await asyncio.sleep(11)
        assert repr(router.models) == "<Models []>"
        assert router.changes == 0  # or whoever invents names would make everybody look theirs up again


async def test_absent_models_make_room_for_others_and_ready_ones_do_not() -> None:
    backend = FakeBackend()
    backend.reports["a"] = ModelReport(ABSENT)
    async with routing(backend, limits={"max_keys": 2}) as router:
        for name in ("a", "b", "c"):
            await router.learn(name)
        with pytest.raises(ResourceExhausted, match="2 models are in use"):
            await router.learn("d")


# -- names that callers invent ----------------------------------------------------------------------------------------


class Slow(FakeBackend):
    """Takes `answer_s` for each answer; `most`: so many questions were out at a time."""

    answer_s, out, most = 0.1, 0, 0

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        self.out += 1
        self.most = max(self.most, self.out)
        await asyncio.sleep(self.answer_s)
        self.out -= 1
        return await super().describe(model)


class Failing(FakeBackend):
    """Is there, and has no answer."""

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        self.described.append(model)
        raise StreamLost("no answer")


async def test_a_few_questions_about_unknown_models_are_out_at_a_time_and_known_ones_are_asked_about_at_once() -> None:
    backend = Slow()
    backend.reports["m"] = ModelReport(READY, told())
    async with routing(backend) as router:
        await router.learn()
        tasks = [asyncio.create_task(router.learn(f"m{n}")) for n in range(320)]
        await asyncio.sleep(0.05)
        assert backend.out == 32
        backend.reports["m"] = ModelReport(READY, told("FP64"))
        assert await router.models.report("m") == backend.reports["m"]
        await asyncio.gather(*tasks)
        assert backend.most == 33
        assert asyncio.get_running_loop().time() == pytest.approx(1.1)


async def test_questions_that_hang_give_way_to_others() -> None:
    backend = Slow()
    backend.answer_s = 30.0
    async with routing(backend) as router:
        tasks = [asyncio.create_task(router.learn(f"m{n}", timeout_s=9)) for n in range(96)]
        for seconds, out in ((0.9, 32), (1.1, 64), (2.1, 96)):
            await asyncio.sleep(seconds - asyncio.get_running_loop().time())
            assert backend.out == out
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_name_of_which_nobody_tells_and_for_which_nobody_waits_leaves_its_place(is_silent: bool) -> None:
    backend = Slow() if is_silent else FakeBackend(is_ready=False)
    if isinstance(backend, Slow):
        backend.answer_s = 1000.0
    async with routing(backend, limits={"max_keys": 2}) as router:
        for name in ("a", "b"):
            with pytest.raises(DeadlineExceeded):
                await router.learn(name, timeout_s=1)
        with pytest.raises(DeadlineExceeded):
            await router.learn("c", timeout_s=1)
        if not is_silent:
            await asyncio.sleep(7)
            assert repr(router.models) == "<Models []>"
            assert router.changes == 0


async def test_many_names_of_which_nobody_tells_are_asked_about_less_often_than_a_few() -> None:
    backend = Failing()
    async with routing(backend) as router:
        few = asyncio.create_task(router.learn(timeout_s=20))
        await asyncio.gather(few, return_exceptions=True)
        assert 19 <= len(backend.described) <= 22
        tasks = [asyncio.create_task(router.learn(f"m{n}", timeout_s=20)) for n in range(1000)]
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(backend.described) <= 6000


async def test_other_metadata_is_noticed_and_told_once() -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(READY, told("FP32"))
    async with routing(backend) as router:
        await router.learn()
        await asyncio.sleep(20)
        assert router.changes == 0
        backend.reports["m"] = ModelReport(READY, told("FP64"))
        await asyncio.sleep(20)
        assert router.changes == 1
        assert router.models.find(*NAME).vector_spec(1).datatype == "FP64"


async def test_a_server_that_fails_to_tell_is_believed_to_be_as_it_was() -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(READY, told(max_batch_size=0))
    async with routing(backend) as router:
        await router.learn()
        backend.reports["m"] = ModelReport(READY)
        await asyncio.sleep(6)
        backend.reports["m"] = ModelReport(READY, told())
        await asyncio.sleep(6)
        assert router.models.find(*NAME).info == told(max_batch_size=0)
        assert router.changes == 0


@pytest.mark.parametrize("interval_s", [5.0, 0.0])
async def test_rows_wait_for_a_model_that_is_being_loaded(interval_s: float) -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(UNREADY)
    async with routing(backend, interval_s=interval_s) as router:
        early = asyncio.create_task(router.learn(timeout_s=1.0))
        await asyncio.sleep(2)
        assert isinstance(early.exception(), DeadlineExceeded)
        late = asyncio.create_task(router.learn(timeout_s=60))
        await asyncio.sleep(1)
        backend.reports["m"] = ModelReport(READY, told())
        await asyncio.sleep(1.1)
        assert late.done()
        assert router.models.find(*NAME).info == told()


async def test_a_server_that_leaves_decides_itself_about_its_models() -> None:
    """mock_nn says so while it drains, and serves what comes."""
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(READY, told())
    async with routing(backend) as router:
        await router.learn()
        backend.reports["m"] = ModelReport(UNREADY, told())
        await asyncio.sleep(6)
        with pytest.raises(Unlearned):
            router.models.find(*NAME)
        backend.sign = Sign.UNREADY
        await asyncio.sleep(6)
        assert router.models.find(*NAME).info == told()


async def test_a_frozen_server_keeps_nobody_from_asking_again() -> None:
    """Whether a server is ready as a whole has no time bound of its own."""
    one, frozen = FakeBackend("fake:1"), FakeBackend("fake:2")
    one.reports["m"] = frozen.reports["m"] = ModelReport(UNREADY, told())
    one.sign, frozen.is_frozen = Sign.UNREADY, True
    async with routing(one, frozen) as router:
        early = asyncio.create_task(router.learn(timeout_s=60))
        await asyncio.sleep(1)
        one.reports["m"], one.sign = ModelReport(READY, told()), Sign.READY
        await asyncio.sleep(5)
        assert early.done()
        await router.learn(timeout_s=6)
        assert router.models.find(*NAME).info == told()


async def test_who_waits_for_a_pool_that_is_replaced_asks_the_new_one() -> None:
    async with routing(FakeBackend(is_ready=False)) as router:
        task = asyncio.create_task(router.learn())
        await settle()
        router.pools["fake"] = other = pool_of(FakeBackend())
        other.start()
        router.models.apply(router.settings)
        await settle()
        assert task.done()
        assert repr(router.models) == "<Models []>"
        await router.learn()
        assert router.models.find(*NAME).info is None
        await router.models.aclose()
        await other.aclose()


async def test_zero_asks_only_once() -> None:
    backend = FakeBackend()
    async with routing(backend, interval_s=0) as router:
        await router.learn()
        await asyncio.sleep(500)
        assert len(backend.described) == 1
        await asyncio.sleep(200)
        assert repr(router.models) == "<Models []>"


async def test_a_model_in_use_is_asked_about_again_and_one_that_is_not_is_forgotten() -> None:
    backend = FakeBackend()
    async with routing(backend, limits={"key_idle_s": 60}) as router:
        await router.learn()
        slots = router.pool.slots(("m", ""))  # as a live key has them
        await asyncio.sleep(100)
        assert 18 <= len(backend.described) <= 22
        assert "m" in repr(router.models)
        del slots
        await asyncio.sleep(6)
        assert repr(router.models) == "<Models []>"


async def test_a_refused_batch_asks_at_once_but_not_for_each() -> None:
    backend = FakeBackend()
    async with routing(backend) as router:
        await router.learn()
        backend.reports["m"] = ModelReport(ABSENT)
        for _ in range(100):
            router.models.doubt("fake", ("m", ""))
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.3)
        assert len(backend.described) <= 3
        with pytest.raises(NotFound):
            router.models.find(*NAME)


async def test_a_model_that_cannot_be_served_says_why() -> None:
    backend = FakeBackend()
    backend.reports["m"] = ModelReport(READY, told(is_decoupled=True))
    async with routing(backend) as router:
        await router.learn()
        with pytest.raises(Unsupported, match="model 'm' cannot be served: it is decoupled"):
            router.models.find(*NAME)


# -- several replicas --------------------------------------------------------------------------------------------------


class Silent(FakeBackend):
    """Never answers a question."""

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        self.described.append(model)
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_model_is_absent_only_if_every_replica_says_so() -> None:
    one, two = FakeBackend("fake:1"), FakeBackend("fake:2")
    one.reports["m"] = ModelReport(ABSENT)
    async with routing(one, two) as router:
        await router.learn()
        assert router.models.find(*NAME).info is None
        two.reports["m"] = ModelReport(ABSENT)
        await asyncio.sleep(6)
        with pytest.raises(NotFound):
            router.models.find(*NAME)


async def test_a_replica_that_is_silent_holds_nobody_up() -> None:
    two = FakeBackend("fake:2")
    two.reports["m"] = ModelReport(READY, told())
    async with routing(Silent("fake:1"), two) as router:
        await router.learn(timeout_s=1)
        assert router.models.find(*NAME).info == told()


async def test_nobody_knows_a_model_that_one_replica_does_not_have_and_another_is_silent_about() -> None:
    two = FakeBackend("fake:2")
    two.reports["m"] = ModelReport(ABSENT)
    async with routing(Silent("fake:1"), two) as router:
        with pytest.raises(DeadlineExceeded):
            await router.learn(timeout_s=100)


async def test_replicas_that_tell_different_things_are_named_once_and_the_first_is_believed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = FakeBackend("fake:1"), FakeBackend("fake:2")
    one.reports["m"], two.reports["m"] = ModelReport(READY, told("FP64")), ModelReport(READY, told("FP32"))
    async with routing(one, two) as router:
        await router.learn()
        await asyncio.sleep(20)
        assert router.models.find(*NAME).info == told("FP64")
        assert router.changes == 0
    assert len([record for record in caplog.records if "different things" in record.message]) == 1


# -- reports and the index ---------------------------------------------------------------------------------------------


async def test_a_report_asks_now() -> None:
    backend = FakeBackend()
    async with routing(backend) as router:
        assert await router.models.report("m") == ModelReport(READY)
        backend.reports["m"] = ModelReport(ABSENT)
        assert await router.models.report("m") == ModelReport(ABSENT)
        backend.set_ready(is_ready=False)
        assert (await router.models.report("m")).state is UNREADY


async def test_a_report_of_a_model_that_no_settings_match_asks_nobody() -> None:
    async with routing(match={"model_name": "other"}) as router:
        assert await router.models.report("m") == ModelReport(ABSENT)
        assert router.replicas[0].described == []


async def test_a_report_of_a_name_that_no_request_may_have_asks_nobody() -> None:
    async with routing() as router:
        assert await router.models.report("m" * 257) == ModelReport(ABSENT)
        assert router.replicas[0].described == []


async def test_a_report_finds_a_model_whatever_its_agent_type_is() -> None:
    async with routing(match={"model_name": "m", "agent_type": "buyer"}) as router:
        assert await router.models.report("m") == ModelReport(READY)


async def test_nobody_waits_long_for_a_report() -> None:
    async with routing(Silent()) as router:
        begun = asyncio.get_running_loop().time()
        assert await router.models.report("m") == ModelReport(UNREADY)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(5.0)


async def test_the_index_has_named_listed_and_live_models_once() -> None:
    backend = FakeBackend()
    backend.reports.update({"named": ModelReport(UNREADY), "gone": ModelReport(ABSENT)})
    async with routing(backend, match={"model_name": "named"}) as router:
        listed = await router.models.index()
    assert [(entry.name, entry.state) for entry in listed] == [("named", "UNREADY")]
    backend = FakeBackend()
    async with routing(backend) as router:
        await router.learn("live")
        listed = await router.models.index()
    assert [(entry.name, entry.state) for entry in listed] == [("live", "READY")]


async def test_the_index_is_told_although_some_models_may_not_be_asked_about() -> None:
    async with routing(limits={"max_keys": 1}) as router:
        await router.learn("live")
        names = {"backend": "fake", "match": {"model_name": "named"}}, {"backend": "fake"}
        router.models.apply(
            router.settings.model_copy(update={"models": [ModelSettings.model_validate(n) for n in names]})
        )
        listed = await router.models.index()
    assert [(entry.name, entry.state) for entry in listed] == [("live", "READY"), ("named", "UNAVAILABLE")]


async def test_many_replicas_are_asked_about_many_models_no_more_often_than_one() -> None:
    replicas = [FakeBackend(f"fake:{n}") for n in range(4)]
    async with routing(*replicas) as router:
        await asyncio.gather(*(router.learn(f"m{n}") for n in range(400)))
        await asyncio.sleep(100)
        assert sum(len(replica.described) for replica in replicas) < 400 * 4 + 100 * 60 + 400


async def test_models_are_counted_by_state() -> None:
    backend = FakeBackend()
    backend.reports["gone"] = ModelReport(ABSENT)
    async with routing(backend) as router:
        await asyncio.gather(router.learn("gone"), router.learn("m"))
        counts = [router.models.count(state) for state in (None, READY, UNREADY, ABSENT)]
        assert counts == [0, 1, 0, 1]
