"""Several gateway processes on one port: starts them, replaces those that die, drains them together.

One socket, bound here and shared by all workers, and not one SO_REUSEPORT socket each: with those the kernel assigns a
connection to a worker when it arrives, and the ones that a dying or draining worker has not yet accepted are reset with
its socket (net.ipv4.tcp_migrate_req would move them, but is off by default). In a shared backlog a connection waits for
whoever accepts first, which also spares a busy worker; a worker's end closes one copy of the socket and loses only what
it had accepted.

SIGTERM, SIGINT    SIGTERM to every worker; each says 503 on /readyz and accepts for `drain_delay_s` more. Then this
                   process lets no handshake begin (see listener.py) and closes its copy: it accepts nothing itself, and
                   while it kept the port open, connections would wait for nobody. The workers empty the backlog, close
                   theirs and answer what was accepted. Exit 0; 1 if a worker got lost on the way.
a second signal    SIGKILL to every worker; exit 128 + signal.
a worker ends      is replaced: at once, after another short life later and later. While none is left, connections wait
                   in the backlog for the next one.
none can start     exit 1.
this process dies  every worker closes the port, answers what was accepted, and ends (see worker.py).

Workers are new interpreters, for nothing that grpc has begun survives a fork. This process imports neither grpc nor the
web framework, and stays small. uvicorn's own supervisor is not used: it keeps its copy of the socket
open during a drain, so that new connections hang, forgets the second signal, passes Ctrl-C on twice, restarts what
cannot start without a pause, and leaves the workers behind when it is killed.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Iterator

from rest_gateway.config import Settings
from rest_gateway.listener import refuse_new, url_of
from rest_gateway.metrics import DIRECTORY, forget_process

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A worker that served for less than this has had a short life (supervisord's startsecs is 1).
SHORT_LIFE_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
# So often a worker may end before it serves, while none ever has.
START_ATTEMPTS = 3
# A worker ends by itself after `drain_delay_s`, `drain_timeout_s` and a few seconds; then it hangs.
OVERTIME_S = 10.0


def pause_s(short_lives: int) -> float:
    """The seconds before the next worker, by the short lives in a row: 0, 0, 0.5, 1, 2, 4, 8, 8."""
    return 0.0 if short_lives < 2 else min(FIRST_PAUSE_S * 2.0 ** min(short_lives - 2, 10), LONGEST_PAUSE_S)


def describe_exit(status: int) -> str:
    """`was killed by SIGKILL`, `exited with status 1`."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def supervise(settings: Settings, listener: socket.socket) -> int:
    """Serves `listener` with `settings.workers` processes until a signal; returns the exit status.

    Raises OSError where there is no room for temporary files, which carry the workers' metrics.
    """
    with tempfile.TemporaryDirectory(prefix="rest_gateway-", ignore_cleanup_errors=True) as directory:
        return asyncio.run(Supervisor(settings, listener, directory).run())


class Worker:
    """One life of one worker, between `start` and the end of `wait`."""

    def __init__(self, process: Process, lifeline: socket.socket) -> None:
        self.process = process
        self._lifeline = lifeline
        self._serving_since_s: float | None = None

    @classmethod
    async def start(cls, number: int, listener: socket.socket, directory: str) -> "Worker":
        """Raises OSError when the machine has no room for another process."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.callback(ours.close)
            fds = (listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "rest_gateway.worker", str(number), *map(str, fds)),
                stdin=DEVNULL,
                pass_fds=fds,
                env=os.environ | {DIRECTORY: directory},
            )
            unless_started.pop_all()
        return cls(process, ours)

    @property
    def served_s(self) -> float:
        """For how long it has served; 0 when it never did."""
        return 0.0 if self._serving_since_s is None else time.monotonic() - self._serving_since_s

    async def is_serving(self) -> bool:
        """True as soon as it serves, False when it has ended before."""
        self._lifeline.setblocking(False)
        with contextlib.suppress(ConnectionError):
            if await asyncio.get_running_loop().sock_recv(self._lifeline, 1):
                self._serving_since_s = time.monotonic()
        return self._serving_since_s is not None

    async def wait(self) -> int:
        """The exit status."""
        status = await self.process.wait()
        self._lifeline.close()
        return status

    def send(self, signal_: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal_)


class Supervisor:
    """Keeps the workers alive until it is told to leave."""

    def __init__(self, settings: Settings, listener: socket.socket, directory: str) -> None:
        self._settings = settings
        self._listener = listener
        self._directory = directory
        # The living workers by number; whether any has ever served.
        self._workers: dict[int, Worker] = {}
        self._has_served = False
        # From the first signal on, or when giving up; what to tell the shell then; whether to take no more time for it.
        self._leaving = asyncio.Event()
        self._status = 0
        self._is_cut_off = False
        self._starting = asyncio.Lock()

    async def run(self) -> int:
        """Until every worker has ended; returns the exit status."""
        for signal_ in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signal_, self._on_signal, signal_)
        logger.info("starting %d workers for %s", self._settings.workers, url_of(self._listener))
        async with asyncio.TaskGroup() as tasks:
            stop = tasks.create_task(self._stop(), name="stop")
            numbers = range(1, self._settings.workers + 1)
            await asyncio.gather(*(self._keep(number) for number in numbers))
            stop.cancel()
        logger.info("stopped")
        return self._status

    def _on_signal(self, signal_: signal.Signals) -> None:
        if self._leaving.is_set():
            self._is_cut_off = True
            self._status = 128 + signal_
            self._tell_all(signal.SIGKILL)
        else:
            logger.info("draining %d workers", len(self._workers))
            self._leave(0)

    def _leave(self, status: int) -> None:
        self._status = status
        self._leaving.set()
        self._tell_all(signal.SIGTERM)

    def _tell_all(self, signal_: signal.Signals) -> None:
        for worker in self._workers.values():
            worker.send(signal_)

    async def _stop(self) -> None:
        """From the first signal on: the door, and the end of patience."""
        await self._leaving.wait()
        await asyncio.sleep(self._settings.drain_delay_s)
        refuse_new(self._listener)
        self._listener.close()
        await asyncio.sleep(self._settings.drain_timeout_s + OVERTIME_S)
        logger.error("killing %d workers that do not end", len(self._workers))
        self._tell_all(signal.SIGKILL)

    async def _keep(self, number: int) -> None:
        """One worker after another."""
        short_lives = 0
        while not self._leaving.is_set():
            served_s = await self._live(number)
            short_lives = short_lives + 1 if served_s < SHORT_LIFE_S else 0
            if short_lives >= START_ATTEMPTS and not self._has_served and not self._leaving.is_set():
                logger.critical("giving up: no worker can start")
                self._leave(1)
            await self._pause(number, pause_s(short_lives))

    async def _pause(self, number: int, seconds: float) -> None:
        if seconds and not self._leaving.is_set():
            logger.warning("worker %d is started again in %g s", number, seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), seconds)

    async def _live(self, number: int) -> float:
        """One life of one worker; returns the seconds that it served."""
        worker = await self._start(number)
        if worker is None:
            return 0
        with self._known(number, worker):
            if await worker.is_serving():
                self._has_served = True
            status = await worker.wait()
        self._report(number, worker, status)
        return worker.served_s

    async def _start(self, number: int) -> Worker | None:
        async with self._starting:  # one at a time: the signal mask is the whole thread's
            if self._leaving.is_set():
                return None
            try:
                with _sigint_blocked():
                    return await Worker.start(number, self._listener, self._directory)
            except OSError as exc:
                logger.error("worker %d cannot be started: %s", number, exc)  # noqa: TRY400 -- the line says all
                return None

    @contextlib.contextmanager
    def _known(self, number: int, worker: Worker) -> Iterator[None]:
        """While it lives it is told what all are told."""
        self._workers[number] = worker
        if self._leaving.is_set():  # a signal came while it was being started
            worker.send(signal.SIGKILL if self._is_cut_off else signal.SIGTERM)
        try:
            yield
        finally:
            del self._workers[number]
            forget_process(self._directory, number)

    def _report(self, number: int, worker: Worker, status: int) -> None:
        """Says how it ended. Its SIGTERM kills a worker that does not serve yet, which harms nobody."""
        is_expected = status == 0 or (self._leaving.is_set() and (status == -signal.SIGTERM or self._is_cut_off))
        if self._leaving.is_set() and not is_expected:
            self._status = self._status or 1
        level = logging.INFO if is_expected else logging.ERROR
        ending = describe_exit(status)
        logger.log(level, "worker %d pid=%d %s, served for %.1f s", number, worker.process.pid, ending, worker.served_s)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """What is started here never sees a SIGINT: a terminal's Ctrl-C, sent to the whole group, is ours to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
