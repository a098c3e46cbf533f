"""Databases for gateways as a user runs them: an SQLite file belongs to one process, so each gets its own."""

import atexit
import itertools
import shutil
import tempfile

# Nobody listens there: for gateways that are asked for no job, where several processes cannot share a file.
NO_DATABASE = "postgresql://nobody@127.0.0.1:1/jobs"

_DIRECTORY = tempfile.mkdtemp(prefix="gateway-databases-")
atexit.register(shutil.rmtree, _DIRECTORY, ignore_errors=True)
_numbers = itertools.count(1)


def new_database() -> str:
    """The URL of an SQLite file that nobody has."""
    return f"sqlite:///{_DIRECTORY}/{next(_numbers)}.sqlite3"
