"""A process of ours: started, listened to, measured and ended. Linux tells what it uses; elsewhere that is unknown.

Each is the leader of a session of its own: a terminal's Ctrl-C reaches the bench alone, and one signal ends a process
with all that it has started. When the bench is killed, the kernel ends them (Linux).
"""

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

START_TIMEOUT_S = 60.0
FAREWELL_TIMEOUT_S = 10.0
END_TIMEOUT_S = 1.0  # of a pipe whose writers are gone
LINE_BYTES = 256 * 1024 * 1024  # a load process reports every latency in one line
KEPT_LINES = 50
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PYTHON = (sys.executable, "-m")


class BenchError(Exception):
    """The bench cannot go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and all its descendants have used: CPU since their start, memory now."""

    cpu_s: float
    rss_bytes: int


class Program:
    """A running program; its stderr is kept, as far as it is recent.

    `farewell`: the signal that ends one which must not be killed, since something of it would stay; 0 where it ends by
    itself before long.
    """

    def __init__(self, name: str, process: Process, farewell: int | None = None) -> None:
        self._name = name
        self._process = process
        self._farewell = farewell
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._has_new_line = asyncio.Event()
        self._reader = asyncio.create_task(self._read_stderr(), name=f"stderr of {name}")

    @classmethod
    async def start(
        cls,
        name: str,
        *arguments: str,
        environment: Mapping[str, str],
        directory: Path,
        command: Sequence[str] = PYTHON,
        user: str | None = None,
        farewell: int | None = None,
        ends_with_parent: bool = True,
    ) -> Self:
        """Run `command` with `arguments`, as `user` where that is another one.

        `ends_with_parent` takes a fork, which a process that speaks gRPC must not do: its child may die of it.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            cwd=directory,
            env=environment,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=LINE_BYTES,
            start_new_session=True,
            user=user,
            preexec_fn=_end_with_parent if ends_with_parent else None,
        )
        return cls(name, process, farewell)

    async def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line of stderr that matches, once it is there."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    self._has_new_line.clear()
                    for line in self._lines:
                        if match := re.search(pattern, line):
                            return match
                    if self._reader.done():
                        raise BenchError(await self._epitaph())
                    await self._has_new_line.wait()
        except TimeoutError as exc:
            raise BenchError(f"{self._name} is not ready after {START_TIMEOUT_S:g} s") from exc

    async def wait_done(self) -> None:
        """Until it has ended; a BenchError unless it ended well."""
        if await self._process.wait() != 0:
            raise BenchError(await self._epitaph())

    async def send_line(self, line: str) -> None:
        """Write to its stdin."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            await self._process.stdin.drain()
        except ConnectionError as exc:
            raise BenchError(await self._epitaph()) from exc

    async def read_line(self, timeout_s: float) -> bytes:
        """The next line of its stdout."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError as exc:
            raise BenchError(f"{self._name} has said nothing for {timeout_s:g} s") from exc
        if not line:
            raise BenchError(await self._epitaph())
        return line

    def usage(self) -> Usage | None:
        """What it has used until now; None where the system does not tell. A BenchError when it is gone."""
        if sys.platform != "linux":
            return None
        try:
            return _sum_up([_usage(self._process.pid), *_usages_of_descendants(self._process.pid)])
        except OSError as exc:
            raise BenchError(f"{self._name} ended while it was measured:\n" + "\n".join(self._lines)) from exc

    async def end(self) -> None:
        """End it and all that it has started, at once: nothing of it stays."""
        if self._farewell is not None:
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                os.killpg(self._process.pid, self._farewell)
                async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                    await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await asyncio.wait([self._reader], timeout=END_TIMEOUT_S)
        self._reader.cancel()

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self._lines.append(line.decode(errors="replace").rstrip("\n"))
            self._has_new_line.set()
        self._has_new_line.set()

    async def _epitaph(self) -> str:
        await asyncio.wait([self._reader], timeout=END_TIMEOUT_S)
        code = await self._process.wait()
        return f"{self._name} ended by itself (exit code {code}):\n" + "\n".join(self._lines)


@contextlib.asynccontextmanager
async def running(
    name: str,
    *arguments: str,
    environment: Mapping[str, str],
    directory: Path,
    command: Sequence[str] = PYTHON,
    user: str | None = None,
    farewell: int | None = None,
    ends_with_parent: bool = True,
) -> AsyncIterator[Program]:
    """A program for the length of a block."""
    program = await Program.start(
        name,
        *arguments,
        environment=environment,
        directory=directory,
        command=command,
        user=user,
        farewell=farewell,
        ends_with_parent=ends_with_parent,
    )
    try:
        yield program
    finally:
        await program.end()


def machine_cpu_s() -> float | None:
    """What all processors have worked until now, in steps of 10 ms; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    times = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    idle, waiting = times[3:5]
    return (sum(times) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _sum_up(usages: Sequence[Usage]) -> Usage:
    """Of a process and those it has started."""
    return Usage(sum(usage.cpu_s for usage in usages), sum(usage.rss_bytes for usage in usages))


def _usage(pid: int) -> Usage:
    return Usage(_cpu_s(pid), _rss_bytes(pid))


def _usages_of_descendants(pid: int) -> Iterator[Usage]:
    """Each thread may have started some; threads and processes that end meanwhile are left out."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                yield _usage(child)
                yield from _usages_of_descendants(child)


def _cpu_s(pid: int) -> float:
    """User and system time of all threads, those that have ended included, to the nanosecond.

    The clock's id is what clock_getcpuclockid(3) makes of a process id: CPUCLOCK_SCHED of include/linux/posix-timers.h.
    /proc/PID/stat has the same number in steps of 10 ms.
    """
    return time.clock_gettime((~pid << 3) | 2)


def _rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if sys.platform == "linux":
    _prctl = ctypes.CDLL(None).prctl

    def _end_with_parent() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
else:

    def _end_with_parent() -> None:
        """Elsewhere a killed bench leaves its programs behind."""
