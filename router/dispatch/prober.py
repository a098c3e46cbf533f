"""Prober: asks one replica now and then whether it lives and is ready, and tells its pulse.

It asks with every new connection, then every `interval_s`, the first time somewhat sooner by chance, so that replicas
that have connected together are not all asked at one instant. It has a task of its own and holds up nobody.

A server may have a thread per stream and none left for questions. So after a miss the streams without a batch are
closed: what is silent then is not silent for our sake.

Our own loop may stand still, too. Then answers are there and unread, so a wait that ends late is waited again: no
replica is blamed for the router's stalls.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable

from router.core.pulse import Sign
from router.dispatch.member import Member, Sent

logger = logging.getLogger(__name__)

# A probe is in vain after so long, or after so much of the interval where that is less: before the next one is due.
TIMEOUT_S = 3.0
TIMEOUT_SHARE = 0.75
# Others are preferred from this share of it on.
DOUBT_SHARE = 1 / 3
# A timer that rings later than this tells that our loop stood still.
STALL_S = 0.25


class Prober:
    """Probes one member while `start` .. `aclose`; `on_change` when its standing may have changed."""

    def __init__(self, member: Member, interval_s: float, on_change: Callable[[], None]) -> None:
        self._member = member
        self._pulse = member.pulse
        self._interval_s = interval_s
        self._timeout_s = min(TIMEOUT_S, TIMEOUT_SHARE * interval_s)
        self._on_change = on_change
        # State: the task; whether there was a connection when it was last looked at, and whether one is new; the alarm
        # for the moment at which silence is suspect; the oldest batch that was given up on this connection.
        self._task: asyncio.Task[None] | None = None
        self._was_connected = False
        self._has_connected = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._given_up: Sent | None = None

    def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._run(), name=f"probe {self._member.address}")
        self.look()

    async def aclose(self) -> None:
        """Ask no more."""
        self._set_alarm(math.inf)
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    def look(self) -> None:
        """The connection may have come or gone."""
        is_connected = self._member.replica.is_connected
        if is_connected is self._was_connected:
            return
        self._was_connected = is_connected
        self._pulse.heard()
        self._given_up = None
        self._set_alarm(math.inf)
        if is_connected:
            self._has_connected.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._has_connected.wait()
            self._has_connected.clear()
            next_at = loop.time() + random.uniform(0.5, 1) * self._interval_s  # noqa: S311 (spreads, guards nothing)
            await self._ask()
            while not await self._reconnects_before(next_at):
                next_at = loop.time() + self._interval_s
                await self._ask()

    async def _reconnects_before(self, at: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(at):
                await self._has_connected.wait()
        return self._has_connected.is_set()

    async def _ask(self) -> None:
        """One probe. What is found about a connection that has gone meanwhile says nothing."""
        if not self._member.replica.is_connected:
            return
        probe = asyncio.create_task(self._member.replica.probe(), name=f"ask {self._member.address}")
        try:
            if not await self._comes_back(probe, DOUBT_SHARE * self._timeout_s):
                self._pulse.waited()
                self._on_change()
                await self._comes_back(probe, (1 - DOUBT_SHARE) * self._timeout_s)
            if self._was_connected and not self._has_connected.is_set():
                self._tell(probe.result() if probe.done() else Sign.NONE)
        finally:
            probe.cancel()

    async def _comes_back(self, probe: asyncio.Task[Sign], patience_s: float) -> bool:
        """Whether it is done within so long; a wait during which our loop stood still is waited again."""
        loop = asyncio.get_running_loop()
        while True:
            due_at = loop.time() + patience_s
            await asyncio.wait([probe], timeout=patience_s)
            if probe.done() or loop.time() < due_at + STALL_S:
                return probe.done()

    def _tell(self, sign: Sign) -> None:
        pulse, was_suspect, was_ready = self._pulse, self._pulse.is_suspect, self._pulse.is_ready
        if sign is Sign.NONE:
            pulse.missed()
            self._member.replica.close_idle()
            self._judge()
        else:
            pulse.answered(sign)
        if was_suspect and not pulse.is_suspect:
            self._returned()
        if pulse.is_ready is not was_ready:
            logger.info(
                "backend %s says that it is %s", self._member.address, "ready" if pulse.is_ready else "not ready"
            )
        self._on_change()

    def _returned(self) -> None:
        logger.info("backend %s answers again", self._member.address)
        if self._given_up:
            self._member.was_alive(self._given_up, asyncio.get_running_loop().time())
            self._given_up = None

    def _judge(self) -> None:
        """Is its silence suspect now, or when?"""
        loop = asyncio.get_running_loop()
        at = self._pulse.suspect_at(self._member.oldest_due_at())
        if at <= loop.time():
            self._set_alarm(math.inf)
            self._suspect()
        else:
            self._set_alarm(at)

    def _suspect(self) -> None:
        """Its batches are lost, or would be waited for until their timeout; nothing of theirs can be read any more."""
        in_flight = self._member.replica.in_flight
        logger.warning("backend %s gives no sign of life: its %d batches are lost", self._member.address, in_flight)
        self._pulse.is_suspect = True
        # One that answers in between was frozen, and its calls are not any longer for that.
        self._given_up = None if self._member.has_answered else self._member.oldest
        self._member.has_answered = False
        self._member.replica.abandon()
        self._on_change()

    def _set_alarm(self, at: float) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_at(at, self._ring, at) if at < math.inf else None

    def _ring(self, at: float) -> None:
        """After a stall of ours the answer may be there, unread: look again when it has been read."""
        loop = asyncio.get_running_loop()
        if loop.time() < at + STALL_S:
            self._judge()
        else:
            self._set_alarm(loop.time() + STALL_S)
