"""Models: what requests meet under a model's name: its settings, and what its backend tells of it.

Backends are asked once about a model, when its first row comes, and then again while it is in use (`model_watch.py`).
`find` answers from memory and is what others remember; whenever it would answer differently, `on_change` tells.
"""

import asyncio
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.config import ModelSettings, Settings
from router.core import model_rules as rules
from router.core.budget import Budget
from router.core.model_info import IndexEntry, ModelInfo, ModelReport, ModelState
from router.core.types import DEFAULT_TENANT, BatchAnswer, BatchKey, Block, Part, TensorSpec
from router.dispatch.pool import ReplicaPool
from router.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RouterError,
    Unavailable,
    Unsupported,
)
from router.model_watch import RETRY_S, ModelWatch, QuestionQueue
from router.waiting_room import Resume, WaitingRoom

# A question of an operator is not waited for any longer.
REPORT_S = 5.0
RETRY_AFTER_S = 1.0
KEYS_RETRY_AFTER_S = 60.0
# How long a model is remembered as absent where models are asked about only once.
ABSENT_S = 5.0
# The least time from one question to a replica about a model to the next one about any; where rows wait for an answer.
QUESTION_S = 0.02
WAITING_QUESTION_S = 0.005
# How many models that are of no use leave at once for others, and how often it is looked for them.
LEAVING_MODELS = 64
LOOK_FOR_ROOM_S = 0.1
NO_POOLS: Mapping[str, ReplicaPool] = {}


class Unlearned(Exception):
    """Nobody has asked the backend about the model yet: `await Models.learn(*model)`, then try again."""

    def __init__(self, model: tuple[str, str, str]) -> None:
        super().__init__(f"the backend was not asked about {model} yet")
        self.model = model


@dataclass(frozen=True, slots=True)
class Model:
    """One model for one agent type. `info` None: its backend does not tell, and only the settings count.

    `is_batched`: whether rows of several requests may share a call; if not, each request goes as it stands.
    `max_batch_rows`: of one call.
    """

    settings: ModelSettings
    info: ModelInfo | None
    is_batched: bool
    max_batch_rows: int

    @property
    def told_outputs(self) -> tuple[str, ...]:
        """The names of all, as far as the backend tells. To name none is not the same: MLServer leaves some out."""
        return tuple(tensor.name for tensor in self.info.outputs) if self.info else ()

    def check_inputs(self, specs: Sequence[TensorSpec]) -> None:
        """Compare a request's inputs with the model's. Raises InvalidArgument."""
        rules.check_inputs(self.info, specs, is_batched=self.is_batched)

    def check_outputs(self, wanted: Iterable[str]) -> None:
        """Compare the outputs that a request asks for with the model's. Raises InvalidArgument."""
        rules.check_outputs(self.info, wanted)

    def vector_spec(self, dim: int) -> TensorSpec:
        """The input that a native row is sent as. Raises InvalidArgument when the model takes no such row."""
        name, datatype = self.settings.vector_input, self.settings.vector_datatype
        return rules.native_spec(self.info, name, datatype, dim, is_batched=self.is_batched)

    def is_native(self, key: BatchKey) -> bool:
        """Whether native rows of this length have the key's input."""
        try:
            named = rules.native_input(self.info, self.settings.vector_input, self.settings.vector_datatype)
        except InvalidArgument:
            return False
        return len(key.inputs) == 1 and (key.inputs[0].name, key.inputs[0].datatype) == named

    def vector_output(self) -> tuple[str | None, tuple[str, ...]]:
        """The output of native rows (None: `output`, else the first), and what to ask for so that it comes.

        Raises InvalidArgument when the model has no such output.
        """
        output = rules.native_output(self.info, self.settings.vector_output)
        return output, rules.to_ask_for(self.info, output)


class Models:
    """The models of a router. `pools` by backend; one that is not there is never asked, and settings alone count.

    `budget`: of all rows that wait, those for models that nobody knows yet among them.
    """

    def __init__(self, settings: Settings, pools: Mapping[str, ReplicaPool] = NO_POOLS) -> None:
        self._settings = settings
        self._pools = pools
        self.budget = Budget(settings.limits.max_queued_bytes)
        # Told of a model, by name and version, of which `find` may answer otherwise than before.
        self.on_change: Callable[[tuple[str, str]], None] = lambda _: None
        # State: by backend, model name and version, what is known or being asked; rooms whose blocks go elsewhere;
        # where questions about models that nobody knows wait, by pool; when it is looked again whether some models are
        # of no use; watches that end; whether nobody is asked any more.
        self._watches: dict[tuple[str, str, str], ModelWatch] = {}
        self._leaving: set[WaitingRoom] = set()
        self._queues: weakref.WeakKeyDictionary[ReplicaPool, QuestionQueue] = weakref.WeakKeyDictionary()
        self._look_for_room_at = -math.inf
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Models {list(self._watches.values())!r}>"

    def find(self, model_name: str, model_version: str, agent_type: str) -> Model:
        """The model that rows go to.

        Raises:
            NotFound: no settings match, or the backend has no such model.
            Unsupported: it is of a kind that the router cannot serve.
            Unlearned: nobody knows yet, or the model is being loaded.
        """
        settings = self._route(model_name, agent_type)
        if settings.backend not in self._pools:
            return _make_model(settings, None, model_name)
        watch = self._watches.get((settings.backend, model_name, model_version))
        if watch is None or watch.report is None or watch.must_wait:
            raise Unlearned((model_name, model_version, agent_type))
        watch.used_at = asyncio.get_running_loop().time()
        if watch.is_absent:
            version = f" version {model_version!r}" if model_version else ""
            raise NotFound(f"backend {settings.backend!r} has no model {model_name!r}{version}")
        return _make_model(settings, watch.report.info, model_name)

    def of_key(self, key: BatchKey) -> Model:
        """The model of a live key, whatever its state is. Raises NotFound when no settings match any more."""
        settings = self._route(key.model_name, key.agent_type)
        watch = self._watches.get((settings.backend, *key.model))
        info = watch.report.info if watch and watch.report else None
        rows = rules.most_rows(info, settings.max_batch_size, is_batched=key.is_batched)
        return Model(settings, info, key.is_batched, rows)

    def takes(self, key: BatchKey) -> bool:
        """Whether rows of the key would still be rows of it; not, once the model takes others."""
        try:
            model = self.find(*key.model, key.agent_type)
            model.check_inputs(key.inputs)
        except (Unlearned, NotFound):  # it may come back as it was
            return True
        except RouterError:
            return False
        return model.is_batched is key.is_batched

    def hold(self, block: Block, resume: Resume) -> WaitingRoom:
        """Keep a block until its model can be found or is known not to be there; then `resume` it.

        The key of the block may be without inputs. At its deadline its recipient is told. Whoever has it leave before
        that discards it from the room. Raises RouterError when it is refused.
        """
        key = block.key
        watch = self._watch(self._route(key.model_name, key.agent_type).backend, key.model)
        watch.room.hold(block, resume)
        if watch.report:  # it is being loaded, and may be asked about again only after a while
            watch.doubt()
        return watch.room

    async def learn(
        self,
        model_name: str,
        model_version: str,
        agent_type: str,
        *,
        rows: int,
        nbytes: int,
        deadline: float,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        """Return when `find` may be asked again; so many rows and bytes of a caller wait for that.

        Raises:
            DeadlineExceeded: nobody has answered in time.
            RouterError: no settings match, or so much may not wait.
        """
        now = asyncio.get_running_loop().time()
        waiter = _Waiter(deadline - now)
        key = BatchKey(model_name, model_version, agent_type, ())
        block = Block(key, 0, 0, rows, (), -(-nbytes // rows), now, deadline, waiter, tenant)
        room = self.hold(block, waiter.resume)
        try:
            await waiter.future
        finally:
            room.discard(block)

    def doubt(self, backend: str, model: tuple[str, str]) -> None:
        """A batch has failed, perhaps since the model is gone or another than before: ask again at once."""
        watch = self._watches.get((backend, *model))
        if watch:
            watch.doubt()

    async def report(self, model_name: str, model_version: str = "") -> ModelReport:
        """Ask about a model now. UNREADY, with what is known, while nobody answers; ABSENT where no settings match.

        Raises ResourceExhausted when too many models are known already.
        """
        settings = self._settings.find_model(model_name)
        if settings is None or max(len(model_name), len(model_version)) > self._settings.limits.max_name_length:
            return ModelReport(ModelState.ABSENT)
        if settings.backend not in self._pools:
            return ModelReport(ModelState.READY)
        watch = self._watch(settings.backend, (model_name, model_version))
        question = watch.ask()
        await asyncio.wait([question], timeout=REPORT_S)
        if question.done() and watch.is_answered and watch.report:
            return watch.report
        return ModelReport(ModelState.UNREADY, watch.report.info if watch.report else None)

    async def index(self) -> list[IndexEntry]:
        """The models that are configured by name, that backends list, and that are in use, by name and version."""
        listed = await asyncio.gather(*(self._index_of(backend) for backend in self._pools))
        found = {(entry.name, entry.version): entry for entries in listed for entry in entries}
        named = {name for name, _ in found}
        reports = {watch.model: watch.report for watch in self._watches.values() if watch.model[0] not in named}
        asked = [name for name in self._settings.model_names() if name not in named]
        told = await asyncio.gather(*(self._report_if_possible(name) for name in asked))
        reports.update(((name, ""), report) for name, report in zip(asked, told, strict=True))
        for model, report in reports.items():
            if report and report.state is not ModelState.ABSENT:
                found[model] = _to_entry(model, report)
        return [found[model] for model in sorted(found)]

    async def _report_if_possible(self, model_name: str) -> ModelReport:
        """One model that may not be asked about must not cost the answer about all."""
        try:
            return await self.report(model_name)
        except RouterError:
            return ModelReport(ModelState.UNREADY)

    async def _index_of(self, backend: str) -> list[IndexEntry]:
        """Those of them that the settings lead to."""
        try:
            async with asyncio.timeout(REPORT_S):
                entries = await self._pools[backend].index()
        except TimeoutError:
            return []
        routes = ((entry, self._settings.find_model(entry.name)) for entry in entries)
        return [entry for entry, model in routes if model is not None and model.backend == backend]

    def count(self, state: ModelState | None) -> int:
        """The models that are known to be in a state; None: of which nobody has told yet."""
        reports = [watch.report for watch in list(self._watches.values())]  # at once: another thread may ask
        return sum((report.state if report else None) is state for report in reports)

    def recount(self) -> None:
        """Tell the budget what waits, after its bounds have changed."""
        for room in {watch.room for watch in self._watches.values()} | self._leaving:
            room.recount()

    def apply(self, settings: Settings) -> None:
        """Go on by other settings; `pools` has them already. What waits for a pool that is gone goes on elsewhere.

        So does what waits where its model is not any more; both once all others know the settings.
        """
        self._settings = settings
        self._leaving = {room for room in self._leaving if room.rows}
        for watch in list(self._watches.values()):
            watch.room.max_rows = settings.limits.max_queued_rows
            if self._pools.get(watch.backend) is not watch.pool:
                self._drop(watch)
            if watch.room.rows:
                self._leaving.add(watch.room)
                asyncio.get_running_loop().call_soon(self._move, watch)

    def _move(self, watch: ModelWatch) -> None:
        """Let those go on that belong to another watch now."""
        if self._watches.get((watch.backend, *watch.model)) is not watch:
            watch.room.release()
            return
        routes = functools.cache(functools.partial(self._settings.route, watch.model[0]))

        def has_moved(block: Block) -> bool:
            settings = routes(block.key.agent_type)
            return settings is None or settings.backend != watch.backend

        watch.room.release(has_moved)

    async def aclose(self) -> None:
        """Ask no more; who waits is told."""
        self._is_closed = True
        error = Unavailable("the router shut down before the call was answered", retry_after_s=RETRY_AFTER_S)
        for watch in list(self._watches.values()):
            watch.room.fail(error)
            self._drop(watch)
        await asyncio.gather(*self._closing)

    def _route(self, model_name: str, agent_type: str) -> ModelSettings:
        settings = self._settings.route(model_name, agent_type)
        if settings is None:
            raise NotFound(f"no model {model_name!r} for agent type {agent_type!r}")
        return settings

    # -- watches -----------------------------------------------------------------------------------------------------

    def _watch(self, backend: str, model: tuple[str, str]) -> ModelWatch:
        watch = self._watches.get((backend, *model))
        if watch is None:
            if self._is_closed:
                raise Unavailable("the router is shutting down and asks no backend any more")
            self._make_room()
            watch = self._watches[backend, *model] = ModelWatch(
                backend,
                self._pools[backend],
                model,
                WaitingRoom(self.budget, self._settings.limits.max_queued_rows),
                queue=self._queues.setdefault(self._pools[backend], QuestionQueue()),
                interval_s=self._interval_s,
                retry_s=self._retry_s,
                is_idle=self._is_idle,
                on_change=self._changed,
                on_idle=self._forget,
            )
        watch.used_at = asyncio.get_running_loop().time()
        return watch

    def _make_room(self) -> None:
        """Models of no use go first, the oldest before the others. Raises ResourceExhausted when there are none."""
        most, now = self._settings.limits.max_keys, asyncio.get_running_loop().time()
        if len(self._watches) >= most and self._look_for_room_at <= now:
            useless = (watch for watch in self._watches.values() if _is_useless(watch))
            leaving = list(itertools.islice(useless, LEAVING_MODELS))
            for watch in leaving:
                self._drop(watch)
            if not leaving:  # whoever invents names would have all models looked at for each
                self._look_for_room_at = now + LOOK_FOR_ROOM_S
        if len(self._watches) >= most:
            message = f"{most} models are in use, no more may be"
            raise ResourceExhausted(message, reason="keys", retry_after_s=KEYS_RETRY_AFTER_S)

    def _interval_s(self, watch: ModelWatch) -> float:
        """Longer where models and replicas are so many that the questions would be a load of their own. 0: never."""
        interval_s = self._settings.backends[watch.backend].model_interval_s
        if not interval_s:
            return ABSENT_S if watch.is_absent else 0.0
        return max(interval_s, len(self._watches) * watch.pool.count_ready() * QUESTION_S)

    def _retry_s(self) -> float:
        return max(RETRY_S, len(self._watches) * WAITING_QUESTION_S)

    def _is_idle(self, watch: ModelWatch) -> bool:
        """A model that is not there is remembered for one interval only: names cost nothing to invent.

        One of which nobody has told is not remembered once nobody waits for that.
        """
        if _is_needed(watch):
            return False
        if watch.is_absent:
            return watch.used_at < watch.asked_at
        idle_s = self._settings.limits.key_idle_s if watch.report else ABSENT_S
        return watch.used_at + idle_s <= asyncio.get_running_loop().time()

    def _forget(self, watch: ModelWatch) -> None:
        self._drop(watch)
        if watch.report and not watch.is_absent:  # of others nobody remembers anything
            self._changed(watch)

    def _changed(self, watch: ModelWatch) -> None:
        self.on_change(watch.model)

    def _drop(self, watch: ModelWatch) -> None:
        name = watch.backend, *watch.model
        if self._watches.get(name) is watch:  # it may be dropped twice: when its pool is replaced, and as idle
            del self._watches[name]
        task = asyncio.create_task(watch.aclose(), name=f"close {watch.model[0]}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Waiter:
    """The recipient of a block that stands for a coroutine."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_closed(self) -> bool:
        """See Recipient."""
        return self.future.done()

    def resume(self, _: Block) -> None:
        """The model can be found, or is known not to be there."""
        if not self.future.done():
            self.future.set_result(None)

    def answer(self, part: Part, answer: BatchAnswer, offset: int) -> None:
        """See Recipient."""
        raise AssertionError(f"rows that are not sent were answered: {part}, {answer}, {offset}: this is a bug")

    def fail(self, part: Part, error: RouterError) -> None:  # noqa: ARG002 (Recipient's signature)
        """See Recipient."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        """See Recipient."""
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded(f"no answer within {self._timeout_s:.3g} s"))


def _is_needed(watch: ModelWatch) -> bool:
    """Whether rows wait for what it will tell, or a key lives by what it has told and must hear of other things."""
    return watch.room.rows > 0 or watch.pool.uses(watch.model)


def _is_useless(watch: ModelWatch) -> bool:
    """Whether it is not known to be there, and nobody misses it."""
    return (watch.report is None or watch.is_absent) and not _is_needed(watch)


def _to_entry(model: tuple[str, str], report: ModelReport) -> IndexEntry:
    is_ready = report.state is ModelState.READY
    return IndexEntry(*model, "READY" if is_ready else "UNAVAILABLE", "" if is_ready else report.state.value)


def _make_model(settings: ModelSettings, info: ModelInfo | None, name: str) -> Model:
    is_batched = rules.takes_batches(settings.batching, info)
    why = rules.why_unsupported(info, is_batched=is_batched)
    if why:
        raise Unsupported(f"model {name!r} cannot be served: {why}")
    return Model(settings, info, is_batched, rules.most_rows(info, settings.max_batch_size, is_batched=is_batched))
