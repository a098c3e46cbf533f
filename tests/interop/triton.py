"""Starts and ends a real Triton; it lives in .venv-triton, since it wants other versions than the project."""

import contextlib
import ctypes
import signal
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.acceptance.processes import ROOT, Program

PYTHON = ROOT / ".venv-triton/bin/python"
SCRIPT = Path(__file__).with_name("triton_server.py")
# It unloads its models first, on a busy machine for long.
PATIENCE_S = 120


def why_not() -> str:
    """Why there is no Triton here; "" if there is one."""
    if not (ROOT / ".venv-triton/.synced").exists():
        return "Triton is not installed (make venv-triton)"
    if not any(ROOT.glob(".venv-triton/lib/python3.*/site-packages/pytriton/tritonserver/bin/tritonserver")):
        return "PyTriton brings no Triton for this machine"
    return _why_no_python()


def _why_no_python() -> str:
    """Triton runs its Python as a library."""
    name = f"libpython{sysconfig.get_python_version()}.so.1.0"
    try:
        ctypes.CDLL(str(next(Path(sysconfig.get_config_var("LIBDIR")).glob(name), name)))
    except OSError:
        return f"Triton needs {name}, which is not here"
    return ""


@contextlib.contextmanager
def started_triton(ports: Sequence[int], workspace: Path, *models: str) -> Iterator[Program]:
    """Triton with its models loaded, at ports for gRPC, HTTP and metrics; leaving the block ends it politely."""
    arguments = [*map(str, [SCRIPT, *ports, workspace]), *models]
    program = Program(arguments, launcher=[str(PYTHON)])
    try:
        program.wait_for("triton serves", PATIENCE_S)
        yield program
        program.send(signal.SIGTERM)
        program.wait(PATIENCE_S)
    finally:
        program.end()
