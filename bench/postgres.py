"""A PostgreSQL of the bench's own: the system's programs, a new cluster in a directory that is gone afterwards.

Its settings are the built-in ones, so every commit is on the disk when it is answered; it listens on a socket only.
"""

import os
import pwd
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import quote

import asyncpg

from bench.processes import Program, running

OWNER = "postgres"  # of the programs when root starts them, which they refuse to be
PORT = 5432  # names the socket; nothing listens on it
INSTALL = "Debian: apt-get install postgresql"


def why_missing() -> str:
    """Why there can be none here; "" when there can."""
    if _find_binaries() is None:
        return f"no initdb and postgres here ({INSTALL})"
    return "" if _owner() is None or _has_owner() else f"root cannot run it and there is no user {OWNER}"


class Postgres:
    """The running server."""

    def __init__(self, program: Program, url_of: str) -> None:
        self.program = program
        self._url_of = url_of

    async def create_database(self, name: str) -> str:
        """An empty one; returns its URL."""
        connection = await asyncpg.connect(self._url_of.format("postgres"))
        try:
            await connection.execute(f'CREATE DATABASE "{name}"')
        finally:
            await connection.close()
        return self._url_of.format(name)


async def start_postgres(stack: AsyncExitStack, directory: Path) -> Postgres:
    """Make a cluster below `directory` and run it until the stack is closed."""
    binaries = _find_binaries()
    assert binaries is not None
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-pg-", dir=directory)))
    owner = _owner()
    if owner is not None:
        os.chown(root, pwd.getpwnam(owner).pw_uid, -1)
    data = root / "data"
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    making = ("-D", str(data), "-U", OWNER, "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
    # Killed, both would leave shared memory behind. SIGQUIT is an immediate shutdown: the data is not needed again.
    async with running(
        "initdb",
        *making,
        command=[str(binaries / "initdb")],
        environment=environment,
        directory=root,
        user=owner,
        farewell=0,
    ) as initdb:
        await initdb.wait_done()
    program = await stack.enter_async_context(
        running(
            "PostgreSQL",
            *("-D", str(data), "-k", str(root), "-p", str(PORT), "-c", "listen_addresses="),
            command=[str(binaries / "postgres")],
            environment=environment,
            directory=root,
            user=owner,
            farewell=signal.SIGQUIT,
        )
    )
    await program.wait_for("ready to accept connections")
    return Postgres(program, f"postgresql://{OWNER}@/{{}}?host={quote(str(root), safe='')}&port={PORT}")


def _find_binaries() -> Path | None:
    """The directory of initdb and postgres: of the PATH, else the newest of Debian's."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True
    )
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


def _owner() -> str | None:
    return OWNER if os.geteuid() == 0 else None


def _has_owner() -> bool:
    return any(user.pw_name == OWNER for user in pwd.getpwall())
