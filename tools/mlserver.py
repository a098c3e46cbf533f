"""MLServer, in its own environment, on free ports of the loopback: for the example, its tests and its comparison."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.processes import BenchError, Program, running
from tools.load import free_ports
from tools.run import ROOT

ENVIRONMENT = ROOT / ".venv-mlserver"
PYTHON = ENVIRONMENT / "bin/python"
# Its log goes to stdout, which nobody reads. And it ends with the process that started it; the bench's own way to see
# to that needs a fork, which a process that speaks gRPC must not do.
LAUNCH = """
import ctypes, os, signal, sys
os.dup2(2, 1)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which outlives exec
os.execv(sys.argv[1], sys.argv[1:])
"""
COMMAND = (str(PYTHON), "-I", "-S", "-c", LAUNCH, str(ENVIRONMENT / "bin/mlserver"), "start")
LOAD_TIMEOUT_S = 60.0
ASK_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class MLServer:
    """A running one, its models loaded."""

    program: Program
    address: str
    rest_address: str

    @property
    def ports(self) -> tuple[int, int]:
        """gRPC, REST: for one that takes its place."""
        return int(self.address.rpartition(":")[2]), int(self.rest_address.rpartition(":")[2])


def why_missing() -> str:
    """ "" where there is one."""
    return "" if (ENVIRONMENT / ".synced").exists() else "there is no .venv-mlserver; make venv-mlserver makes it"


@asynccontextmanager
async def serving(
    repository: Path, *, workers: int = 1, ports: tuple[int, int] | None = None
) -> AsyncIterator[MLServer]:
    """MLServer with the models of a folder, into which its settings are written; ended with the block.

    `workers`: processes that compute; 0: the process that serves computes, too, and starts in half the time.
    """
    grpc_port, rest_port = ports or free_ports(2)
    settings = {"host": "127.0.0.1", "grpc_port": grpc_port, "http_port": rest_port, "parallel_workers": workers}
    (repository / "settings.json").write_text(json.dumps({**settings, "metrics_endpoint": None, "debug": False}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLSERVER_")}
    async with running(
        "MLServer",
        str(repository),
        environment=environment,
        directory=repository,
        command=COMMAND,
        ends_with_parent=False,
    ) as program:
        await program.wait_for("gRPC server running")
        await program.wait_for("Uvicorn running")
        await _until_ready(f"127.0.0.1:{rest_port}", _models(repository))
        yield MLServer(program, f"127.0.0.1:{grpc_port}", f"127.0.0.1:{rest_port}")


def _models(repository: Path) -> list[str]:
    return [file.parent.name for file in repository.glob("*/model-settings.json")]


async def _until_ready(rest_address: str, models: Sequence[str]) -> None:
    """It answers before it has loaded them. Asked over REST: who starts programs afterwards must not have used gRPC."""
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as client:
            for model in models:
                while (await client.get(f"http://{rest_address}/v2/models/{model}/ready")).is_error:  # noqa: ASYNC110
                    await asyncio.sleep(ASK_AGAIN_S)
    except TimeoutError as exc:
        raise BenchError(f"MLServer has not loaded {', '.join(models)} within {LOAD_TIMEOUT_S:g} s") from exc
