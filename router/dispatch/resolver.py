"""Resolver: the addresses of a backend's replicas, and their changes while the router runs.

What the settings say is one of three: `HOST:PORT` is an address and stays one; every record of `dns:///NAME:PORT` is
one, asked for every few seconds; `file:PATH` has one a line, looked at every second. Who cannot be asked, or answers
nonsense, is believed what it said last: a name server that is away takes no replica out of service. Neither does a new
entry: until all were found for the first time everybody stays who was told.

It finds addresses and knows nothing of what is there.
"""

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from router.config import DNS_PREFIX, FILE_PREFIX, check_remote

logger = logging.getLogger(__name__)

FILE_INTERVAL_S = 1.0


class Source(Protocol):
    """Where addresses come from, looked at every `interval_s`."""

    interval_s: float

    async def find(self) -> Sequence[str]:
        """Its addresses now, in an order that does not change by itself. Raises OSError or ValueError."""


class DnsSource:
    """A name; its A and AAAA records, by whatever the operating system asks."""

    def __init__(self, name: str, port: int, interval_s: float) -> None:
        self._name = name
        self._port = port
        self.interval_s = interval_s

    async def find(self) -> Sequence[str]:
        """See Source."""
        found = await asyncio.get_running_loop().getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        return sorted({self._address(family, str(where[0])) for family, _, _, _, where in found})

    def _address(self, family: int, host: str) -> str:
        return f"[{host}]:{self._port}" if family == socket.AF_INET6 else f"{host}:{self._port}"


class FileSource:
    """A file with an address a line; it may be replaced, also by way of a symbolic link."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.interval_s = FILE_INTERVAL_S
        # State: what the file was when it was last read, and the addresses in it.
        self._read_as: tuple[int, int, int] | None = None
        self._addresses: Sequence[str] = ()

    async def find(self) -> Sequence[str]:
        """See Source. Disks can be slow, too."""
        return await asyncio.to_thread(self._find)

    def _find(self) -> Sequence[str]:
        with open(self._path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            seen_as = status.st_mtime_ns, status.st_ino, status.st_size
            if seen_as != self._read_as:
                self._addresses = parse(file)
                self._read_as = seen_as
        return self._addresses


def parse(lines: Iterable[str]) -> list[str]:
    """The addresses of a file: one a line, `#` begins a comment. Raises ValueError that names the line."""
    addresses: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                addresses[check_remote(text)] = None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    if not addresses:
        raise ValueError("no address in it")
    return list(addresses)


def open_source(entry: str, resolve_interval_s: float) -> Source | None:
    """The source behind an entry of the settings; None when it is an address itself."""
    if entry.startswith(FILE_PREFIX):
        return FileSource(entry.removeprefix(FILE_PREFIX))
    if entry.startswith(DNS_PREFIX):
        name, _, port = entry.removeprefix(DNS_PREFIX).rpartition(":")
        return DnsSource(name.strip("[]"), int(port), resolve_interval_s)
    return None


class _Followed:
    """An entry, what is known of it, whether that was ever found, and what was wrong with it last."""

    def __init__(self, entry: str, source: Source | None) -> None:
        self.entry = entry
        self.source = source
        self.known: Sequence[str] = () if source else (entry,)
        self.is_found = source is None
        self.complaint = ""
        self.task: asyncio.Task[None] | None = None


class Resolver:
    """Tells `apply` the addresses of all entries, at once and whenever they change. `open_`: entry to source."""

    def __init__(self, apply: Callable[[Sequence[str]], None], open_: Callable[[str], Source | None]) -> None:
        self._apply = apply
        self._open = open_
        # State: the entries in their order; the addresses that were told last; whether sources are looked at yet.
        self._followed: dict[str, _Followed] = {}
        self._told: Sequence[str] = ()
        self._has_started = False

    def follow(self, entries: Iterable[str]) -> None:
        """These are the entries from now on; what is known of those that stay, stays."""
        before, self._followed = self._followed, {}
        for entry in entries:
            self._followed[entry] = before.pop(entry) if entry in before else _Followed(entry, self._open(entry))
        for gone in before.values():
            if gone.task:
                gone.task.cancel()
        self._watch_all()
        self._tell()

    def start(self) -> None:
        """Begin to look at the sources."""
        self._has_started = True
        self._watch_all()

    async def aclose(self) -> None:
        """Look no more."""
        tasks = [one.task for one in self._followed.values() if one.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _watch_all(self) -> None:
        for one in self._followed.values():
            if self._has_started and one.source and not one.task:
                one.task = asyncio.create_task(self._watch(one, one.source), name=f"resolve {one.entry}")

    async def _watch(self, one: _Followed, source: Source) -> None:
        while True:
            await self._look(one, source)
            await asyncio.sleep(source.interval_s)

    async def _look(self, one: _Followed, source: Source) -> None:
        try:
            found = await source.find()
        except (OSError, ValueError) as error:
            self._complain(one, str(error))
            return
        one.complaint = ""
        if found != one.known or not one.is_found:
            logger.info("%s: %s", one.entry, ", ".join(found))
            one.known, one.is_found = found, True
            self._tell()

    def _complain(self, one: _Followed, complaint: str) -> None:
        """Once, until something changes."""
        if complaint != one.complaint:
            one.complaint = complaint
            logger.warning("%s: %s; the %d addresses known of it stay", one.entry, complaint, len(one.known))

    def _tell(self) -> None:
        addresses = list(itertools.chain.from_iterable(one.known for one in self._followed.values()))
        if not all(one.is_found for one in self._followed.values()):
            addresses += self._told
        self._told = list(dict.fromkeys(addresses))
        self._apply(self._told)
