"""A real PostgreSQL for tests: a cluster in a temporary directory, reached by a socket there.

Never skipped: where PostgreSQL is missing, the tests that need it fail and say what to install. `fsync` is off only
where a test says so: it makes functional tests quick, and what is measured or killed meaningless.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_PORT = 5432  # names the socket; nothing listens on it
_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name.split(".")[0]))


class PostgresMissing(Exception):
    """There is no initdb."""


def find_binaries() -> Path:
    """The directory of initdb and postgres: of the PATH, else the newest of Debian's. Raises PostgresMissing."""
    found = shutil.which("initdb")
    if found is not None and Path(found).resolve().with_name("postgres").exists():
        return Path(found).resolve().parent
    if not _BINARIES:
        raise PostgresMissing(
            "these tests run a real PostgreSQL and found no initdb: install it "
            "(Debian: apt-get install postgresql; macOS: brew install postgresql) or put its bin directory into PATH"
        )
    return _BINARIES[-1]


class Postgres:
    """A cluster of its own. `start` and `stop_immediately` may be called again and again; data stays."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._binaries = find_binaries()
        self._settings = dict(settings or {})
        # Short: a socket's path has at most 107 characters.
        self._root = Path(tempfile.mkdtemp(prefix="pg"))
        self._process: subprocess.Popen[bytes] | None = None
        self._initialize()

    def url(self, database: str = "postgres") -> str:
        """For DATABASE_URL."""
        return f"postgresql://postgres@/{database}?host={self._root}&port={_PORT}"

    def start(self) -> None:
        """Starts it; returns when it answers."""
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        command = self._as_owner(
            "postgres", "-D", self._data, "-k", self._root, "-p", str(_PORT), "--listen_addresses=", *options
        )
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=_owner(), cwd=self._root)
        self._wait_until_ready(self._process)

    def stop_immediately(self) -> None:
        """As `pg_ctl stop -m immediate`: no shutdown checkpoint, clients are cut off; the next start recovers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Neither it nor its connections do anything until the end of the block."""
        assert self._process is not None
        servers = self.run_sql("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        pids = [self._process.pid, *map(int, servers.split())]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def create_database(self, name: str) -> str:
        """An empty database; returns its URL."""
        self.run_sql(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def run_sql(self, sql: str, database: str = "postgres") -> str:
        """What psql prints for it, without headers."""
        command = self._as_owner(
            "psql", "-h", self._root, "-p", str(_PORT), "-U", "postgres", "-d", database, "-qAt", "-c", sql
        )
        answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=self._root)
        return answer.stdout.strip()

    def close(self) -> None:
        """Stops it and deletes it."""
        self.stop_immediately()
        shutil.rmtree(self._root, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._root / "data"

    def _as_owner(self, program: str, *arguments: str | Path) -> Sequence[str]:
        return [str(self._binaries / program), *map(str, arguments)]

    def _initialize(self) -> None:
        owner = _owner()
        if owner is not None:
            os.chown(self._root, pwd.getpwnam(owner).pw_uid, -1)
        command = self._as_owner(
            *("initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8"),
            "--no-locale",
        )
        subprocess.run(command, check=True, capture_output=True, user=owner, cwd=self._root)

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        """The postmaster writes `ready` into its pid file when it accepts connections; that is what pg_ctl looks at."""
        command = self._as_owner("pg_isready", "-q", "-t", "1", "-h", self._root, "-p", str(_PORT), "-U", "postgres")
        while subprocess.run(command, check=False).returncode != 0:
            if process.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended: {(self._root / 'log').read_text()[-2000:]}")


def _owner() -> str | None:
    """PostgreSQL refuses to run as root."""
    return "postgres" if os.geteuid() == 0 else None
