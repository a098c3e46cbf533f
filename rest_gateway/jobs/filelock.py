"""One process per SQLite file: a lock that dies with its process, however that dies.

A file of its own beside the database: SQLite's own locks on the database are POSIX locks, which a process loses when it
closes any descriptor of that file.
"""

import fcntl
import os
from pathlib import Path

from rest_gateway.jobs.records import StoreInUse


class FileLock:
    """`flock` on FILE.lock, which tells the process id of its holder."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._path = database.with_name(f"{database.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises StoreInUse when another holds it, OSError where the directory cannot be used."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StoreInUse(
                f"{self._database} is in use by another process{f' (pid {holder})' if holder else ''}: SQLite serves "
                "one gateway process; set DATABASE_URL to a PostgreSQL for several"
            ) from exc
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Lets go; the file stays, since removing it would let two hold locks on two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
