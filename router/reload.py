"""Reload: new settings for a running router, when its file has changed or SIGHUP asks for it.

The file is looked at once a second (device, inode, size, time of change), through symbolic links, so a file that was
renamed over it, or a link that was turned to another, is a change too. It is read once two looks have found the same:
whoever is still writing is left alone, and an empty file is no settings. Settings are loaded as a whole and taken or
refused as a whole; refused ones are told with the same words as at the start, and the old ones stay.

It knows nothing of what the settings do.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from router.config import ConfigError, Settings, changes, find_file, load
from router.metrics import Metrics

logger = logging.getLogger(__name__)

LOOK_S = 1.0

Stamp: TypeAlias = tuple[int, int, int, int] | None


def stamp_of(path: Path | None) -> Stamp:
    """What tells one state of a file from another; None: there is no such file."""
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found else None


def load_again(path: Path | None) -> Settings:
    """As at the start, but an empty file is one that somebody is about to write. Raises ConfigError."""
    stamp = stamp_of(path)
    if stamp and not stamp[2]:
        raise ConfigError(f"{path} is empty")
    return load(path)


class Looks:
    """Decides from one look to the next whether a file is to be read."""

    def __init__(self, stamp: Stamp) -> None:
        # State: what was read last, and what was seen last.
        self._read = self._seen = stamp

    def is_due(self, stamp: Stamp) -> bool:
        """Whether the file is another than was read, and the same as at the last look."""
        is_due = stamp != self._read and stamp == self._seen
        self._seen = stamp
        if is_due:
            self._read = stamp
        return is_due

    def has_read(self, stamp: Stamp) -> None:
        """It was read without a look."""
        self._read = self._seen = stamp


class Reloader:
    """Keeps a router's settings up to date.

    `settings`: those in effect, from `path` (None: from ./router.yaml, if it was there). `apply`: puts new ones into
    effect, or raises ConfigError.
    """

    def __init__(
        self, path: Path | None, settings: Settings, apply: Callable[[Settings], None], metrics: Metrics
    ) -> None:
        self._path = path or find_file()
        self._apply = apply
        self._count = metrics.config_reloads.labels
        # State: the settings in effect; what was seen of the file; whether somebody has asked.
        self._settings = settings
        self._looks = Looks(stamp_of(self._path))
        self._is_asked = asyncio.Event()

    def ask(self) -> None:
        """Load the settings now, changed or not."""
        self._is_asked.set()

    async def run(self) -> None:
        """Look, and load when there is something to load, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._is_asked.wait()
            stamp = stamp_of(self._path)
            if self._is_asked.is_set():
                self._is_asked.clear()
                self._looks.has_read(stamp)
                self._reload()
            elif self._looks.is_due(stamp):
                self._reload()

    def _reload(self) -> None:
        try:
            settings = load_again(self._path)
            changed = changes(self._settings, settings)
            if changed:
                self._apply(settings)
        except ConfigError as error:
            self._count("refused").inc()
            for line in str(error).splitlines():
                logger.error("settings refused, the old ones stay: %s", line)  # noqa: TRY400 (the message says it all)
            return
        self._settings = settings
        self._count("applied" if changed else "unchanged").inc()
        if changed:
            logger.info("settings changed: %s", "; ".join(str(change) for change in changed))
        else:
            logger.info("settings were read again; nothing has changed")
