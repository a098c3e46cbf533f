"""Where and of what the figures are: machine, versions, git revision, command."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("grpcio", "protobuf", "uvloop", "fastapi", "uvicorn", "httptools", "orjson", "numpy", "pydantic"),
    *("sqlalchemy", "asyncpg"),
)
FSYNCS = 50


def describe(arguments: list[str], environment: Mapping[str, str], program: str = "bench") -> dict[str, Any]:
    """To be called before anything runs: the machine's load is that of others."""
    return {
        "command": shlex.join(["python", "-m", program, *arguments]),
        "settings": dict(environment),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": {"revision": _git("rev-parse", "HEAD"), "has_changes": bool(_git("status", "--porcelain"))},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": count_cores(),
            "memory_mb": _memory_mb(),
            "load_average": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }


def one_line(surroundings: Mapping[str, Any]) -> str:
    """`revision 1a2b3c4 with changes; 2 cores, Xeon …; Python 3.11.7, grpcio 1.85.1`."""
    git, machine, versions = surroundings["git"], surroundings["machine"], surroundings["versions"]
    revision = f"revision {git['revision'][:7]}" if git["revision"] else "no revision"
    return (
        f"{revision}{' with changes' if git['has_changes'] else ''}; {machine['cores']} cores, {machine['processor']}; "
        f"Python {versions['python']}, grpcio {versions['grpcio']}"
    )


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def describe_disk(directory: Path) -> str:
    """What a durable write costs there, which no commit can undercut."""
    median_ms = statistics.median(_fsync_times_s(directory)) * 1e3
    return f"Databases in {directory.parent}, where a write of 8 KiB with its fsync takes {median_ms:.2f} ms."


def _fsync_times_s(directory: Path) -> list[float]:
    times_s = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(FSYNCS):
            began = time.perf_counter()
            file.write(bytes(8192))
            os.fsync(file.fileno())
            times_s.append(time.perf_counter() - began)
    return times_s


def _git(*arguments: str) -> str:
    """What git says; "" where there is no git or no repository."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_mb() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6)
