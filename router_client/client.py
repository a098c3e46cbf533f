"""RouterClient: every caller of a process shares one stream to a router. Must not know REST, jobs or batching.

Theory of operation. A call is sent on a stream, or waits in line until there is one, at most ``router_wait_s``; then it
is UNAVAILABLE. One connector task runs whenever a better stream is wanted than there is: none takes calls, or the
router of each that does is draining. It tries at growing intervals of 0.1 to 1 s, at once when an answer came since it
last did.

What becomes of a call whose stream cannot finish it:

    never written on it             back in line
    written, and the stream lost    back in line once: it may have been executed, rows answered already are not repeated
    the same for the second time    UNAVAILABLE
    refused by a draining router    back in line, but no later than ``router_wait_s`` after the first refusal

A draining router still takes calls: its stream is used until it refuses, unless another stream is there. Streams that
are no longer wanted stay until their calls are answered. A stream holds 16,384 open calls; for more, another one is
opened and kept.

`infer_tensors` and the rest of open_inference.py go beside the streams, as RPCs of their own over the connection of one
of them: see unary.py.

Nothing here awaits on behalf of a single call except its caller, on one future: no task, no timer of the loop and no
context manager per call.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from math import inf, isnan
from types import TracebackType
from typing import Any, Self

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client.blocks import Agent, AgentResult, decode, encode, spread
from router_client.calls import Alarms, Call, Line
from router_client.errors import RETRY_PUSHBACK_MS, ConnectError, ProtocolError, failure, unavailable
from router_client.open_inference import OpenInferenceMethods
from router_client.stream import MAX_CALL_BYTES, Link, Stream
from router_client.tensors import InferError

MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0
logger = logging.getLogger(__name__)


class RouterClient(OpenInferenceMethods):
    """A client of the router at ``target`` (any gRPC target, also ``ipv4:10.0.0.1:50051,10.0.0.2:50051``).

    Belongs to one event loop. Connects on entering or with the first call, and stays connected. ``router_wait_s``:
    seconds that a call waits for a router before it is UNAVAILABLE.

    `infer` and `stream` do not raise for a call that fails: the failure is their last answer, with ``rows`` 0,
    ``error`` and ``done``, and speaks of every row not answered before. They return each row once, and the last answer,
    and only that, has ``done``.
    """

    def __init__(self, target: str = "127.0.0.1:50051", *, router_wait_s: float = 2.0) -> None:
        super().__init__(router_wait_s)
        self._target = target
        self._is_closed = False
        # Streams that a router has accepted, in the order they were opened:
        self._streams: list[Stream] = []
        self._accepting = asyncio.Event()  # set while one of them takes calls
        self._link: Link | None = None  # of the last one
        # The task that opens the next one, when it may try, and how long after that again:
        self._connector: asyncio.Task[None] | None = None
        self._connect_at = -inf
        self._backoff_s = MIN_BACKOFF_S
        self._is_away = False  # the last attempt failed
        # Every task that lives, the streams' and the connector:
        self._tasks: set[asyncio.Task[None]] = set()
        # Calls that no stream has; the others are the streams'. Ids are never used again.
        self._line = Line()
        self._call_ids = itertools.count(1)
        # The calls' alarms, and the loop's timer for the first of them:
        self._alarms = Alarms()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<RouterClient {self._target}, {len(self._line)} in line, {self._streams}>"

    async def __aenter__(self) -> Self:
        self._connect_if_wanted()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fail the open calls with UNAVAILABLE, end streams, tasks and connections. The client cannot be used again."""
        self._is_closed = True
        self._accepting.set()  # wakes those who wait for a router
        self._accepting.clear()
        for request in self._requests:
            request.abandon()
        for place in self._places():
            for call in place.take_back():
                call.end(unavailable("the client was closed"))
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in self._streams:  # a task that was cancelled before its first step has cleaned up nothing
            await stream.close()
        self._streams.clear()
        await self._leave_link()

    @property
    def is_connected(self) -> bool:
        """True while a router takes calls; a draining one does so for a while."""
        return self._accepting.is_set()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` seconds until a router takes calls; return whether one does."""
        if self._is_closed:
            return False
        self._connect_if_wanted()
        try:
            async with asyncio.timeout(timeout_s):
                await self._accepting.wait()
        except TimeoutError:
            pass
        return self.is_connected

    async def infer(
        self,
        blocks: Sequence[pb.Block],
        *,
        timeout_s: float | None = None,
        priority_class: pb.PriorityClass.ValueType = pb.PRIORITY_CLASS_UNSPECIFIED,
        tenant: str = "",
        explain: bool = False,
        request_id: str = "",
    ) -> list[pb.Answer]:
        """Send ``blocks`` as one call and return its answers, in the order they came, when the last is there.

        Args:
            blocks: at most 16 MiB; they are copied.
            timeout_s: seconds from now; the router's default when None. Without an answer by then and 50 ms more the
                call is DEADLINE_EXCEEDED.
            priority_class: how urgent the call is.
            tenant: on whose account the rows count.
            explain: ask for an explanation with each answer.
            request_id: for the router's logs.

        A cancelled caller leaves no call behind: the router is told.
        """
        call = self._begin(_message(blocks, timeout_s, priority_class, tenant, explain, request_id), timeout_s)
        if not call.is_over:
            try:
                await call.arrival(asyncio.get_running_loop())
            except asyncio.CancelledError:
                self._forget(call)
                call.let_go()
                raise
        return call.let_go()

    async def stream(
        self,
        blocks: Sequence[pb.Block],
        *,
        timeout_s: float | None = None,
        priority_class: pb.PriorityClass.ValueType = pb.PRIORITY_CLASS_UNSPECIFIED,
        tenant: str = "",
        explain: bool = False,
        request_id: str = "",
    ) -> AsyncGenerator[pb.Answer, None]:
        """Send ``blocks`` as one call at the first step and yield each answer as it arrives; arguments as for `infer`.

        Close the iterator (``contextlib.aclosing``) to give the call up: the router is told.
        """
        message = _message(blocks, timeout_s, priority_class, tenant, explain, request_id)
        call = self._begin(message, timeout_s, wakes_each=True)
        try:
            while call.answers or not call.is_over:
                await call.arrival(asyncio.get_running_loop())
                answers, call.answers = call.answers, []
                for answer in answers:
                    yield answer
        finally:
            self._forget(call)
            call.let_go()

    async def predict(
        self,
        agents: Mapping[str, Agent],
        *,
        timeout_s: float | None = None,
        priority_class: pb.PriorityClass.ValueType = pb.PRIORITY_CLASS_UNSPECIFIED,
        tenant: str = "",
        explain: bool = False,
        request_id: str = "",
    ) -> dict[str, AgentResult]:
        """Send named agents as one call and return each one's result under its name, in the order of ``agents``.

        Does not raise for agents that fail, one or all: their results hold the error. Arguments as for `infer`.
        """
        blocks, names, results = encode(agents)
        if blocks:
            answers = await self.infer(
                blocks,
                timeout_s=timeout_s,
                priority_class=priority_class,
                tenant=tenant,
                explain=explain,
                request_id=request_id,
            )
            results |= {name: decode(outcome, why) for name, outcome, why in spread(answers, names)}
        return {name: results[name] for name in agents}

    # What a unary request asks of its client (unary.StreamFinder).

    def accepting_stream(self) -> Stream | None:
        """Return a stream whose router takes calls; see StreamFinder."""
        if self._is_closed:
            raise InferError("UNAVAILABLE", "the client was closed", RETRY_PUSHBACK_MS)
        accepting = [stream for stream in self._streams if stream.is_accepting]
        return next((stream for stream in accepting if not stream.is_draining), next(iter(accepting), None))

    async def wait_accepting(self) -> None:
        """Wait until one may take calls; see StreamFinder."""
        self._connect_if_wanted()
        if self._accepting.is_set():  # the only one is just ending, and its end will be told
            await asyncio.sleep(MIN_BACKOFF_S)
        else:
            await self._accepting.wait()

    def note_refusal(self, stream: Stream) -> None:
        """Send no more calls to a draining router; see StreamFinder."""
        if stream.is_draining and stream.is_accepting:  # else another router of the same target has refused
            stream.is_refusing = True
            self._on_change()

    # A call's way: sent or in line, then answered or failed. Each step leaves it in exactly one place.

    def _begin(self, message: pb.Call | pb.Answer, timeout_s: float | None, *, wakes_each: bool = False) -> Call:
        """Return a call that is sent, in line, or over already because it cannot be sent."""
        if isinstance(message, pb.Answer):
            return _failed(message)
        now = _now()
        call = Call(message, deadline=inf if timeout_s is None else now + timeout_s, wakes_each=wakes_each)
        refusal = self._refusal(call, now)
        if refusal is not None:
            return _failed(refusal)
        self._set_alarm(call.gives_up_at, call)
        self._send_or_wait(call)
        return call

    def _refusal(self, call: Call, now: float) -> pb.Answer | None:
        if self._is_closed:
            return unavailable("the client was closed")
        if call.size > MAX_CALL_BYTES:
            return _too_large(call, MAX_CALL_BYTES)
        if call.deadline <= now:
            return failure("DEADLINE_EXCEEDED", "the timeout was over before the call was sent")
        return None

    def _send_or_wait(self, call: Call) -> None:
        stream = self._choose()
        if stream is not None:
            self._send(stream, call)
            return
        now = _now()
        if call.waits_until <= now:  # else it waits already, in all: a router may accept its stream and refuse the call
            call.waits_until = now + self._router_wait_s
        self._line.add(call)
        self._set_alarm(call.waits_until, call)
        self._connect_if_wanted()

    def _choose(self) -> Stream | None:
        """Return the first stream with room, better one whose router is not draining."""
        draining = None
        for stream in self._streams:
            if stream.is_accepting and not stream.is_full:
                if not stream.is_draining:
                    return stream
                draining = draining or stream
        return draining

    def _send_waiting(self) -> None:
        while self._line and (stream := self._choose()) is not None:
            self._send(stream, self._line.pop())

    def _send(self, stream: Stream, call: Call) -> None:
        """Send a call that is in no place, unless its message would end the stream for everybody."""
        if call.size > stream.max_message_bytes:
            call.end(_too_large(call, stream.max_message_bytes))
        else:
            stream.send(call, next(self._call_ids))

    def _on_answer(self, stream: Stream, call: Call, answer: pb.Answer) -> None:
        if stream.is_draining and _is_refusal(call, answer):
            self._on_refusal(stream, call)
            return
        try:
            call.accept(answer)
        except ProtocolError as exc:
            logger.warning(
                "an answer of the router does not fit its call (request id %r): %s", call.message.request_id, exc
            )
            self._fail(call, failure("INTERNAL", f"the router's answer does not fit the call: {exc}"))
            return
        if call.is_over:
            stream.release(call)

    def _on_refusal(self, stream: Stream, call: Call) -> None:
        """The router was asked after its time for new calls; it has not begun this one."""
        stream.is_refusing = True
        stream.release(call)
        self._send_or_wait(call)
        self._on_change()

    def _on_loss(self, call: Call) -> None:
        """Send a call again whose stream is gone, unless it may have been executed twice already."""
        if call.is_written and call.losses:
            call.end(unavailable("the connection to the router was lost, and again when the call was sent once more"))
            return
        call.losses += call.is_written
        call.waits_until = 0.0
        self._send_or_wait(call)

    def _fail(self, call: Call, answer: pb.Answer) -> None:
        """End a call that no answer of the router has ended."""
        self._forget(call)
        call.end(answer)

    def _forget(self, call: Call) -> None:
        """Let go of a call that nobody waits for; nothing to do when it is over."""
        if not call.is_over:
            call.is_over = True
            call.place.forget(call)
            self._retire_unwanted()

    def _set_alarm(self, when: float, call: Call) -> None:
        if when == inf:
            return
        self._alarms.set(when, call)
        if self._timer is None or when < self._timer.when():
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        when = self._alarms.wake_at()
        self._timer = asyncio.get_running_loop().call_at(when, self._on_alarm, when) if when < inf else None

    def _on_alarm(self, when: float) -> None:
        now = max(when, _now())  # the loop may ring a clock tick early
        for call in self._alarms.pop_due(now):
            if call.gives_up_at <= now:
                self._fail(call, failure("DEADLINE_EXCEEDED", "no answer within the timeout"))
            elif call.place is self._line and call.waits_until <= now:
                self._fail(call, unavailable(f"no router at {self._target} took the call in {self._router_wait_s:g} s"))
        self._set_timer()

    # The streams: what they report, and which are wanted.

    def on_message(self, stream: Stream, message: pb.PredictStreamResponse) -> None:
        """Take what the router sent on ``stream`` (for the stream)."""
        if message.draining and not stream.is_draining:
            stream.is_draining = True
            self._on_change()
        for answer in message.answers:
            call = stream.find(answer.call_id)
            if call is not None:  # else it was forgotten: its answer was under way
                self._on_answer(stream, call, answer)
        if stream.is_draining:
            self._retire_unwanted()
        else:
            self._connect_at, self._backoff_s = -inf, MIN_BACKOFF_S
        self._send_waiting()  # a full stream may have room now

    def on_end(self, stream: Stream, reason: str) -> None:
        """Take back what was open on ``stream`` (for the stream)."""
        if self._is_closed:
            return
        self._streams.remove(stream)
        stream.link.is_broken |= not stream.is_draining
        calls = stream.take_back()
        level = logging.INFO if stream.is_draining and not calls else logging.WARNING
        logger.log(level, "stream to %s ended (%s) with %d calls open", self._target, reason, len(calls))
        for call in calls:
            self._on_loss(call)
        self._on_change()

    def _on_change(self) -> None:
        """Follow a change of any stream's state."""
        if any(stream.is_accepting for stream in self._streams):
            self._accepting.set()
        else:
            self._accepting.clear()
        self._send_waiting()
        self._retire_unwanted()
        self._connect_if_wanted()

    def _places(self) -> list[Line | Stream]:
        """Return every place where a call can be."""
        return [self._line, *self._streams]

    def _retire_unwanted(self) -> None:
        """Retire the streams of draining routers once their calls are answered, but keep one to send on."""
        for stream in self._streams:
            if stream.is_draining and stream.is_idle and stream is not self._choose():
                stream.retire()

    def _wants_stream(self) -> bool:
        chosen = self._choose()
        return not self._is_closed and (chosen is None or chosen.is_draining)

    def _connect_if_wanted(self) -> None:
        if self._connector is None and self._wants_stream():
            self._connector = self._start(self._connect(), "router_client connector")

    async def _connect(self) -> None:
        """Open streams until there is one that is wanted."""
        try:
            while self._wants_stream():
                delay_s = self._connect_at - _now()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                else:
                    await self._open_stream()
        finally:
            self._connector = None

    async def _open_stream(self) -> None:
        self._connect_at = _now() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        stream = Stream(await self._next_link())
        try:
            await stream.open()
        except ConnectError as exc:
            stream.link.is_broken = True
            logger.log(logging.DEBUG if self._is_away else logging.WARNING, "no router at %s: %s", self._target, exc)
            self._is_away = True
            return
        self._is_away = False
        logger.info("stream to %s open", self._target)
        self._streams.append(stream)
        self._start(stream.run(self), "router_client stream")
        self._on_change()

    async def _next_link(self) -> Link:
        """Return the link of the last stream while it may lead on to another router, else a new one."""
        if self._link is not None and self._link.is_spent:
            await self._leave_link()
        if self._link is None:
            self._link = Link(self._target)
        return self._link

    async def _leave_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.leave()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _now() -> float:
    """Return the loop's time in seconds."""
    return asyncio.get_running_loop().time()


def _failed(answer: pb.Answer) -> Call:
    call = Call(pb.Call())
    call.end(answer)
    return call


def _too_large(call: Call, limit: int) -> pb.Answer:
    return failure("INVALID_ARGUMENT", f"a call of {call.size} bytes is over the limit of {limit}")


def _is_refusal(call: Call, answer: pb.Answer) -> bool:
    """True when a draining router has not taken the call; what it began and gave up is a loss of the caller's."""
    return not answer.rows and answer.done and answer.error.code == "UNAVAILABLE" and not call.has_answers


def _message(
    blocks: Sequence[pb.Block],
    timeout_s: float | None,
    priority_class: pb.PriorityClass.ValueType,
    tenant: str,
    explain: bool,
    request_id: str,
) -> pb.Call | pb.Answer:
    """Return the call's message, or its failure when these arguments make none."""
    if timeout_s is not None and isnan(timeout_s):
        return failure("INVALID_ARGUMENT", "timeout_s is not a number")
    try:
        return pb.Call(
            timeout_s=timeout_s,
            priority_class=priority_class,
            tenant=tenant,
            explain=explain,
            request_id=request_id,
            blocks=blocks,
        )
    except ValueError as exc:  # a lone surrogate in a text, an enum's number out of range
        return failure("INVALID_ARGUMENT", str(exc))
