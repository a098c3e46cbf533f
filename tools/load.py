"""Put load on the REST gateway or on the router, tell what came of it, stop: `make load-rest`, `make load-grpc`.

    python -m tools.load rest|grpc [ARGUMENTS FOR locust OR ghz]

Starts mock, router and gateway on free ports, as `make run` does on fixed ones, runs the tool and stops them. With
LOAD_HOST it takes what runs there: `http://127.0.0.1:8000` for REST, `127.0.0.1:50051` for gRPC. MOCK_LATENCY says how
long the mock takes for a batch. The exit code is 0 only when every request was answered.

    rest    locust with bench/locustfile.py
    grpc    ghz with one file of bench/ghz after the other
"""

import argparse
import asyncio
import contextlib
import http.client
import io
import os
import pathlib
import shlex
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping, Sequence

from honcho.environ import parse_procfile
from prometheus_client.parser import text_string_to_metric_families

from tools.run import LAST_LINE, ROOT, Addresses, Launcher, child_environment, read_addresses

LISTEN_VARIABLES = ("MOCK_LISTEN", "ROUTER_LISTEN", "ROUTER_METRICS", "GATEWAY_LISTEN")
CLIENT_VARIABLES = ("ROUTER_BACKENDS__MOCK__ADDRESSES", "GATEWAY_ROUTER")  # would lead the load elsewhere
DEFAULTS = {"MOCK_LATENCY": "0.05", "ROUTER_DRAIN_DELAY_S": "0.1", "GATEWAY_DRAIN_DELAY_S": "0.1"}
DEFAULT_PORTS = {"rest": 8000, "grpc": 50051}
LOCUST = (".venv-load/bin/python", "-m", "locust", "--locustfile=bench/locustfile.py", "--headless", "--only-summary")
LOCUST_OPTIONS = ("--users=64", "--spawn-rate=64", "--run-time=20s", "--stop-timeout=30")
GHZ_ERRORS = "Error distribution:"  # ghz leaves with 0 whatever was answered


class Log(io.StringIO):
    """Keeps what the launcher prints, and notices when everything is up."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready = asyncio.Event()

    def write(self, text: str) -> int:
        """Keep it."""
        if LAST_LINE in text:
            self.is_ready.set()
        return super().write(text)


def tool_commands(target: str, address: str, arguments: Sequence[str], ghz: str = "ghz") -> list[list[str]]:
    """The command lines to run one after another. `arguments` come last: locust takes the last of two alike."""
    if target == "rest":
        return [[*LOCUST, *LOCUST_OPTIONS, "--host", f"http://{address}", *arguments]]
    files = sorted((ROOT / "bench/ghz").glob("*.json"))
    return [[ghz, f"--config={file.relative_to(ROOT)}", *arguments, address] for file in files]


def split_host(target: str, host: str) -> tuple[str, int]:
    """Host and port of LOAD_HOST, which may begin with http:// and may lack its port. Raises ValueError."""
    authority = host.removeprefix("http://").rstrip("/")
    name, _, port = authority.rpartition(":") if not authority.endswith("]") else (authority, "", "")
    if not name or name == authority:
        name, port = authority, str(DEFAULT_PORTS[target])
    if not name or "/" in authority or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"LOAD_HOST: expected host:port, got {host!r}")
    return name.strip("[]"), int(port)


def stack_environment(environment: Mapping[str, str], ports: Sequence[int]) -> dict[str, str]:
    """The variables of a stack of our own: on these ports, quick to stop, and nobody's client but its own."""
    own = {name: value for name, value in environment.items() if name not in CLIENT_VARIABLES}
    listen = {name: f"127.0.0.1:{port}" for name, port in zip(LISTEN_VARIABLES, ports, strict=True)}
    return {**DEFAULTS, **own, **listen}


def summarise_metrics(text: str) -> str:
    """One line of what the router did, from its metrics."""
    sums = dict.fromkeys(("router_batch_rows_count", "router_batch_rows_sum", "refused", "failed"), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
            elif sample.name == "router_refusals_total":
                sums["refused"] += sample.value
            elif sample.name == "router_requests_total" and sample.labels["code"] != "OK":
                sums["failed"] += sample.value
    rows, batches = sums["router_batch_rows_sum"], sums["router_batch_rows_count"]
    return (
        f"router: {rows:,.0f} rows in {batches:,.0f} batches, {rows / max(batches, 1):.1f} rows a batch; "
        f"{sums['refused']:,.0f} rows refused, {sums['failed']:,.0f} calls failed"
    )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]


async def run_tools(commands: Sequence[Sequence[str]]) -> int:
    """Run one after the other, their output on ours; the first exit code that is not 0, or 0."""
    codes = []
    for command in commands:
        say(shlex.join(command))
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=DEVNULL, stdout=PIPE)
        try:
            codes.append(await _pass_on(process))
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    return next((code for code in codes if code), 0)


async def _pass_on(process: asyncio.subprocess.Process) -> int:
    assert process.stdout is not None
    has_errors = False
    async for line in process.stdout:
        has_errors |= GHZ_ERRORS.encode() in line
        say(line.decode(errors="replace").rstrip("\n"))
    return await process.wait() or int(has_errors)


def say(text: str) -> None:
    """Print past the redirection that keeps the programs' output."""
    print(text, file=sys.__stdout__, flush=True)


async def run_with_stack(target: str, arguments: Sequence[str], ghz: str) -> int:
    """Start the stack, load it, tell, stop it."""
    with tempfile.TemporaryDirectory(prefix="load-") as directory:
        own_database = {"DATABASE_URL": f"sqlite:///{directory}/jobs.sqlite3"}
        environment = stack_environment(own_database | os.environ, free_ports(len(LISTEN_VARIABLES)))
        return await _run_with(environment, target, arguments, ghz)


async def _run_with(environment: dict[str, str], target: str, arguments: Sequence[str], ghz: str) -> int:
    addresses = read_addresses(environment)
    commands = parse_procfile((ROOT / "Procfile").read_text()).processes
    commands["mock"] += " --quiet"
    address = (addresses.gateway if target == "rest" else addresses.router).reachable
    say(f"load: starting mock ({environment['MOCK_LATENCY']} s a batch), router and gateway")
    log = Log()
    with contextlib.redirect_stdout(log):
        launcher = Launcher(commands, addresses, child_environment(environment, addresses))
        stack = asyncio.create_task(launcher.run(), name="stack")
        load = asyncio.create_task(_load(addresses, tool_commands(target, address, arguments, ghz), log), name="load")
        await asyncio.wait({stack, load}, return_when=asyncio.FIRST_COMPLETED)
        if not stack.done():
            signal.raise_signal(signal.SIGTERM)  # the launcher's own way to be stopped
        elif not load.done():
            load.cancel()
        stack_code = await stack
        load_code = (await asyncio.gather(load, return_exceptions=True))[0]
    if isinstance(load_code, int) and not stack_code:
        return load_code
    if stack_code:
        print(f"load: the programs failed; their last lines:\n{log.getvalue()[-4000:]}", file=sys.stderr)
    elif isinstance(load_code, Exception):
        raise load_code
    return stack_code or 1


async def _load(addresses: Addresses, commands: Sequence[Sequence[str]], log: Log) -> int:
    await log.is_ready.wait()
    code = await run_tools(commands)
    say(summarise_metrics(await asyncio.to_thread(_fetch_metrics, addresses.metrics.reachable)))
    return code


def _fetch_metrics(address: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=5)  # not urllib: it would ask http_proxy's proxy
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def run_against(target: str, host: str, arguments: Sequence[str], ghz: str) -> int:
    """Load what already runs at `host`."""
    try:
        name, port = split_host(target, host)
        socket.create_connection((name, port), timeout=5).close()
    except ValueError as exc:
        print(f"load: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"load: nothing listens at {host} ({exc.strerror or exc}); start it with `make run`", file=sys.stderr)
        return 1
    address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    return asyncio.run(run_tools(tool_commands(target, address, arguments, ghz)))


def main() -> int:
    """Run the load that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tools.load", description="Put load on a stack of its own.")
    parser.add_argument("--ghz", default="ghz", metavar="PATH", type=lambda path: str(pathlib.Path(path)))
    parser.add_argument("target", choices=("rest", "grpc"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for locust or ghz")
    options = parser.parse_args()
    host = os.environ.get("LOAD_HOST")
    if host:
        return run_against(options.target, host, options.arguments, options.ghz)
    return asyncio.run(run_with_stack(options.target, options.arguments, options.ghz))


if __name__ == "__main__":
    sys.exit(main())
