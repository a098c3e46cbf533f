"""ModelWatch: what one backend tells of one model. Asked for until it is known, then again while the model is in use.

    unknown    nobody has answered yet: blocks wait
    READY      blocks go on
    UNREADY    a model that is being loaded: blocks wait, as an operator who reloads it expects, and are not refused.
               Where its server is not ready as a whole, which a server that leaves says, it decides itself
    ABSENT     there is no such model: blocks go on, and fail as those do that come now

It knows no settings and no requests; `Models` has the watches.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable

from router.core.model_info import ModelReport, ModelState
from router.core.model_rules import remember
from router.dispatch.pool import ReplicaPool
from router.errors import StreamLost
from router.waiting_room import WaitingRoom

logger = logging.getLogger(__name__)

# While nobody answers, or blocks wait for a model to be loaded, it is asked that often, if there are few of them.
RETRY_S = 1.0
# Questions about models that nobody knows, or that are not there, that are out at a time; one that is not answered so
# soon makes room for the next.
MOST_QUESTIONS = 32
SOON_S = 1.0
# How often it is looked at whether a model is still in use that is not asked about again.
LOOK_S = 60.0
# A model whose batches are refused is not asked about more often than this.
LEAST_PAUSE_S = 0.25


class QuestionQueue:
    """Where questions about models wait that callers may have invented: all at once, they would be the end of a server.

    A server that hangs holds up nobody for long: what it does not answer soon leaves its place to another.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MOST_QUESTIONS)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, and have it."""
        await self._places.acquire()
        places = contextlib.ExitStack()
        places.callback(self._places.release)
        timer = asyncio.get_running_loop().call_later(SOON_S, places.close)
        try:
            yield
        finally:
            timer.cancel()
            places.close()


class ModelWatch:
    """Watches (name, version) at a backend's pool until `aclose`, or until it is idle.

    `queue`: of the pool; `retry_s`: until it is asked again when nobody has answered, or blocks wait; `interval_s`:
    else, 0: never; `is_idle`: whether it is of no more use, which is asked before that; `on_change`: what is known is
    other than before; `on_idle`: it has stopped.
    """

    def __init__(
        self,
        backend: str,
        pool: ReplicaPool,
        model: tuple[str, str],
        room: WaitingRoom,
        *,
        queue: QuestionQueue,
        interval_s: Callable[["ModelWatch"], float],
        retry_s: Callable[[], float],
        is_idle: Callable[["ModelWatch"], bool],
        on_change: Callable[["ModelWatch"], None],
        on_idle: Callable[["ModelWatch"], None],
    ) -> None:
        self.backend = backend
        self.pool = pool
        self.model = model
        self.room = room
        self._queue = queue
        self._interval_s = interval_s
        self._retry_s = retry_s
        self._is_idle = is_idle
        self._on_change = on_change
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        # State: what was told last, and whether blocks wait nevertheless; whether the last question was answered, and
        # when it was asked; when somebody last wanted to know; the question that is out; what makes it ask at once.
        self.report: ModelReport | None = None
        self.must_wait = True
        self.is_answered = False
        self.asked_at = self.used_at = self._loop.time()
        self._question: asyncio.Task[None] | None = None
        self._is_doubted = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"watch model {model[0]}")

    def __repr__(self) -> str:
        state = self.report.state.value if self.report else "unknown"
        return f"<ModelWatch {self.model} {state}, {self.room!r}>"

    @property
    def is_absent(self) -> bool:
        """Whether the backend says that it has no such model."""
        return self.report is not None and self.report.state is ModelState.ABSENT

    def doubt(self) -> None:
        """What is known seems to be wrong: ask soon."""
        self._is_doubted.set()

    def ask(self) -> asyncio.Task[None]:
        """Ask now. There is one question at a time: who asks meanwhile shares its answer."""
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._ask(), name=f"ask about model {self.model[0]}")
        return self._question

    async def aclose(self) -> None:
        """Ask no more. What waits stays in the room."""
        tasks = [task for task in (self._task, self._question) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        spread = random.uniform(0.5, 1)  # noqa: S311 (spreads, guards nothing)
        is_due = True
        while not self._is_idle(self):
            if is_due:
                await self.ask()
            if self.is_answered:
                is_due = await self._wait_until_due(spread)
                spread = 1.0
            else:
                await self._pause(self.pool.wait_for_change(), self._retry_s())
                is_due = True
        self._on_idle(self)

    async def _wait_until_due(self, spread: float) -> bool:
        """Whether it is to be asked again now; at times it is only looked at."""
        interval_s = self._interval_s(self)
        is_waited_for = self.room.rows > 0
        pause_s = interval_s * spread or LOOK_S
        await self._pause(self._is_doubted.wait(), min(pause_s, self._retry_s()) if is_waited_for else pause_s)
        is_doubted = self._is_doubted.is_set()
        if is_doubted:
            self._is_doubted.clear()
            await asyncio.sleep(self.asked_at + LEAST_PAUSE_S - self._loop.time())
        return is_waited_for or is_doubted or interval_s > 0

    async def _pause(self, until: Awaitable[object], most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await until

    async def _ask(self) -> None:
        async with self._queue.place() if self.report is None or self.is_absent else contextlib.nullcontext():
            await self._ask_now()

    async def _ask_now(self) -> None:
        self.asked_at = self._loop.time()
        try:
            report = remember(self.report, await self.pool.describe(self.model))
            must_wait = report.state is ModelState.UNREADY and (report.info is None or await self.pool.is_ready())
            self.is_answered = True
            self._told(report, must_wait=must_wait)
        except StreamLost:
            self.is_answered = False
        except Exception:
            self.is_answered = False
            logger.exception("a question about model %r failed inside the router; this is a bug", self.model[0])

    def _told(self, report: ModelReport, *, must_wait: bool) -> None:
        before, was_waiting = self.report, self.must_wait
        self.report, self.must_wait = report, must_wait
        if before is not None and (before, was_waiting) != (report, must_wait):
            self._log(before, report)
            self._on_change(self)
        if not must_wait:
            self.room.release()

    def _log(self, before: ModelReport, now: ModelReport) -> None:
        name, version = self.model
        if before.state is not now.state:
            logger.info("model %r%s is %s", name, f" version {version!r}" if version else "", now.state.value)
        if before.info != now.info:
            logger.info("model %r%s has other metadata: %s", name, f" version {version!r}" if version else "", now.info)
