"""Whole programs as a user starts them, told apart by their stderr; every wait is for a line or for an exit."""

import itertools
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance.databases import new_database

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30


class Program:
    """A running program; its stderr is read as it comes."""

    def __init__(
        self,
        arguments: list[str],
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (sys.executable, "-m"),
    ) -> None:
        self._process = subprocess.Popen(
            [*launcher, *arguments],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": new_database(), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._arriving: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._arriving.put(line.rstrip("\n"))
        self._arriving.put(None)

    def wait_for(self, pattern: str, patience_s: float = PATIENCE_S) -> re.Match[str]:
        """The next line of stderr that matches."""
        while (line := self._arriving.get(timeout=patience_s)) is not None:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"ended without a line like {pattern!r}:\n" + "\n".join(self.lines))

    def lines_so_far(self) -> list[str]:
        """Everything on stderr until now."""
        while not self._arriving.empty():
            if (line := self._arriving.get()) is not None:
                self.lines.append(line)
        return self.lines

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """The exit code; all of stderr is in `lines` then."""
        code = self._process.wait(timeout=patience_s)
        while (line := self._arriving.get(timeout=PATIENCE_S)) is not None:
            self.lines.append(line)
        return code

    def wait_long(self) -> int:
        """The exit code, however long that takes; what it said then is read by nobody."""
        return self._process.wait()

    def stdout(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.read()

    def end(self) -> None:
        """Whatever happened: nothing of it stays."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Program]:
    """A program for the length of a block."""
    program = Program(list(arguments), environment)
    try:
        yield program
    finally:
        program.end()


def fixed_ports(count: int) -> list[int]:
    """Free ports outside of the range from which the kernel gives ports to clients: nobody takes them in between."""
    of_clients = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_of_clients = int(of_clients.read_text().split()[0]) if of_clients.exists() else 49152  # macOS, RFC 6335
    candidates = random.sample(range(first_of_clients - 20_000, first_of_clients), 100)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
