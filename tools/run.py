"""Start the programs of the Procfile, show their output and stop them together: `make run`.

| what happens               | then                                                       | exit code            |
|----------------------------|------------------------------------------------------------|----------------------|
| SIGINT, SIGTERM, SIGHUP    | SIGTERM to one program after another: each drains, leaves  | 0, or 1 if one fails |
| another one while stopping | SIGKILL to every program                                   | 128 + signal         |
| a program ends by itself   | SIGTERM to the others, one after another                   | its own, never 0     |
| programs outlast the stop  | SIGKILL after `STOP_TIMEOUT_S`                             | 1                    |
| an address is taken        | nothing is started                                         | 1                    |
| this program is killed     | SIGTERM to every program at once, by the kernel (Linux)    | -                    |

A program stands in the Procfile above those that need it, and they are stopped from the bottom up: what a program has
accepted, it can still finish.

SIGTERM and SIGHUP often come twice: `timeout` and a closing terminal send them to the whole group, make passes its
SIGTERM on. So one of these within `ECHO_S` of the stop is its echo. Ctrl-C has none: it counts every time.

Every program is the leader of a session of its own: a terminal's Ctrl-C reaches only this launcher (and make), which
then decides what the programs are told, and a signal to a program reaches whatever it started, too.

The Procfile is read by honcho; its manager (2.0) is not used, because it ignores the second Ctrl-C, loses one that
comes while it starts, leaves with 130 after a clean stop, stops all programs at once and kills them 5 s later. `honcho
start` and other runners can use the same Procfile.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from honcho.environ import parse_procfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = (
    120.0  # above the programs' drains one after another: delays of 1 and 3 s, 30 s of drain_timeout_s each
)
SLOW_START_S = 15.0  # then say what is missing
ECHO_S = 0.5
POLL_S = 0.1
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAST_LINE = "Stop with Ctrl-C."
COLOURS = (36, 33, 32, 35)  # cyan, yellow, green, magenta

EXAMPLE = {
    "alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"},
    "bob": {"vector": [0.4, 0.5, 0.6], "model_name": "churn", "agent_type": "buyer"},
    "carol": {"vector": [0.7, 0.8, 0.9], "model_name": "fraud", "agent_type": "seller"},
}


class Listener(NamedTuple):
    """An address that a program of the Procfile listens on, and the variable that moves it."""

    program: str
    variable: str
    address: str

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def reachable(self) -> str:
        """The address as a client on this machine writes it."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


MOCK = Listener("mock", "MOCK_LISTEN", "127.0.0.1:50061")
ROUTER = Listener("router", "ROUTER_LISTEN", "127.0.0.1:50051")
METRICS = Listener("router", "ROUTER_METRICS", "127.0.0.1:9091")
GATEWAY = Listener("gateway", "GATEWAY_LISTEN", "127.0.0.1:8000")


class Addresses(NamedTuple):
    """Where everything listens."""

    mock: Listener
    router: Listener
    metrics: Listener
    gateway: Listener


def read_addresses(environment: Mapping[str, str]) -> Addresses:
    """Return the default addresses with the environment's on top. Raises ValueError where one has no port."""
    listeners = [
        default._replace(address=environment.get(default.variable) or default.address)
        for default in (MOCK, ROUTER, METRICS, GATEWAY)
    ]
    for listener in listeners:
        if not re.fullmatch(r".+:\d{1,5}", listener.address) or listener.port > 65535:
            raise ValueError(f"{listener.variable}: expected host:port, got {listener.address!r}")
    return Addresses(*listeners)


def child_environment(environment: Mapping[str, str], addresses: Addresses) -> dict[str, str]:
    """Return the programs' environment: this Python first on the path; whoever moves a program moves its clients."""
    child = dict(environment)
    child["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    child["PYTHONUNBUFFERED"] = "1"
    child.setdefault("MOCK_DRAIN_DELAY", "0")  # nobody needs it any more when it is stopped
    if environment.get(MOCK.variable):
        child.setdefault("ROUTER_BACKENDS__MOCK__ADDRESSES", json.dumps([addresses.mock.reachable]))
    if environment.get(ROUTER.variable):
        child.setdefault("GATEWAY_ROUTER", addresses.router.reachable)
    return child


def find_refused(addresses: Addresses) -> Iterator[str]:
    """Yield one message for each address that cannot be listened on."""
    for listener in addresses:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                listener.host or None, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as exc:
            reason = f"port {listener.port} is already in use" if "in use" in str(exc) else (exc.strerror or str(exc))
            yield (
                f"{listener.program} cannot listen on {listener.address}: {reason} ({listener.variable} is its setting)"
            )


def describe_run(addresses: Addresses, mock_latency: str) -> str:
    """Return what a user wants to know once everything is up."""
    gateway, router, metrics, mock = (
        addresses.gateway.reachable,
        addresses.router.reachable,
        addresses.metrics.reachable,
        addresses.mock.reachable,
    )
    agents = ",\n".join(f"    {json.dumps(name)}: {json.dumps(agent)}" for name, agent in EXAMPLE.items())
    return f"""
Ready.
  REST          http://{gateway}       its documentation: http://{gateway}/docs
  router, gRPC  {router}              its metrics: http://{metrics}/metrics
  mock, gRPC    {mock}

Three agents, two models; paste it into another terminal:

curl -sS http://{gateway}/predict \\
  -H 'Content-Type: application/json' \\
  -d '{{
  "agents": {{
{agents}
  }}
}}'

The mock takes {mock_latency} s to answer. {LAST_LINE}
"""


def describe_code(code: int) -> str:
    """Say how a process ended, by its return code."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class Screen:
    """Prints lines that tell which program they are from."""

    def __init__(self, names: list[str]) -> None:
        self._width = max(map(len, names))
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._colours = dict(zip(names, itertools.cycle(COLOURS), strict=False)) if is_coloured else {}

    def line(self, name: str, text: str) -> None:
        prefix = f"{name:<{self._width}} | "
        self.text(f"\033[{self._colours[name]}m{prefix}\033[0m{text}" if name in self._colours else prefix + text)

    def text(self, text: str) -> None:
        """Print; once nobody reads, drop it: of `make run | tee log` Ctrl-C ends tee, and the drain must go on."""
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Launcher:
    """Runs the programs until they are told to stop or one of them ends."""

    def __init__(self, commands: dict[str, str], addresses: Addresses, environment: dict[str, str]) -> None:
        self._commands = commands
        self._addresses = addresses
        self._environment = environment
        self._screen = Screen([*commands, "run"])
        # What is started, what was told to stop, what has ended and how; when and why we stop.
        self._processes: dict[str, Process] = {}
        self._told: set[str] = set()
        self._codes: dict[str, int] = {}
        self._stopping = asyncio.Event()
        self._stopping_since = float("inf")
        self._died: str | None = None
        self._cut_off_by: signal.Signals | None = None

    async def run(self) -> int:
        """Start, serve, stop; return the exit code."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal, signum)
        try:
            async with asyncio.TaskGroup() as group:
                greeting = group.create_task(self._greet(), name="greet")
                limit = group.create_task(self._limit_stop(), name="limit-stop")
                await asyncio.gather(*(self._run_program(name) for name in self._commands))
                greeting.cancel()
                limit.cancel()
        finally:
            self._kill()
        return self._exit_code()

    def _on_signal(self, signum: signal.Signals) -> None:
        if not self._stopping.is_set():
            self._stop("stopping: the programs finish what they have accepted; a second Ctrl-C leaves at once")
        elif signum == signal.SIGINT or time.monotonic() - self._stopping_since > ECHO_S:
            self._cut_off(signum)

    def _stop(self, why: str) -> None:
        if not self._stopping.is_set():
            self._screen.line("run", why)
            self._stopping.set()
            self._stopping_since = time.monotonic()
            self._stop_next()

    def _stop_next(self) -> None:
        running = [name for name in self._commands if name in self._processes and name not in self._codes]
        if running and running[-1] not in self._told:
            self._told.add(running[-1])
            self._tell(signal.SIGTERM, running[-1:])

    def _cut_off(self, signum: signal.Signals) -> None:
        self._cut_off_by = self._cut_off_by or signum
        self._kill()

    def _tell(self, signum: signal.Signals, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[name].pid, signum)

    def _kill(self) -> None:
        self._tell(signal.SIGKILL, self._processes.keys() - self._codes.keys())

    async def _run_program(self, name: str) -> None:
        if self._stopping.is_set():
            return
        # A pipe of our own: with asyncio's, wait() would go on until whatever the program left behind closes it, too.
        source, sink = os.pipe()
        process = await asyncio.create_subprocess_shell(
            f"exec {self._commands[name]}",
            cwd=ROOT,
            env=self._environment,
            stdin=DEVNULL,
            stdout=sink,
            stderr=STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        os.close(sink)
        self._processes[name] = process
        if self._cut_off_by:  # a signal came while it was being started
            self._kill()
        elif self._stopping.is_set():
            self._stop_next()
        output = asyncio.create_task(self._show_output(name, source), name=f"output-{name}")
        code = await process.wait()
        self._tell(signal.SIGKILL, [name])  # what it started and left behind
        await output
        self._on_end(name, code)

    async def _show_output(self, name: str, source: int) -> None:
        stream = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(stream)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(source, "rb"))
        rest = b""
        while chunk := await stream.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._screen.line(name, line.decode(errors="replace"))
        if rest:
            self._screen.line(name, rest.decode(errors="replace"))
        transport.close()

    def _on_end(self, name: str, code: int) -> None:
        self._codes[name] = code
        if self._stopping.is_set():
            self._screen.line("run", f"{name} ended ({describe_code(code)})")
            self._stop_next()
        else:
            self._died = name
            self._stop(f"{name} ended by itself ({describe_code(code)}): stopping the others")

    async def _greet(self) -> None:
        hint_at = time.monotonic() + SLOW_START_S
        while missing := await self._find_missing():
            if time.monotonic() > hint_at:
                self._screen.line("run", f"still waiting for {missing}")
                hint_at = float("inf")
            await asyncio.sleep(POLL_S)
        if not self._stopping.is_set():
            self._screen.text(describe_run(self._addresses, self._environment.get("MOCK_LATENCY") or "3-7"))

    async def _find_missing(self) -> str | None:
        for listener in (self._addresses.mock, self._addresses.router, self._addresses.metrics):
            if await _exchange(listener, b"") is None:
                return f"{listener.program} to listen on {listener.address}"
        request = f"GET /readyz HTTP/1.1\r\nHost: {self._addresses.gateway.reachable}\r\nConnection: close\r\n\r\n"
        status = await _exchange(self._addresses.gateway, request.encode())
        return (
            None if status and b" 200 " in status else f"http://{self._addresses.gateway.reachable}/readyz to say 200"
        )

    async def _limit_stop(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(STOP_TIMEOUT_S)
        self._screen.line("run", f"{STOP_TIMEOUT_S:.0f} s after the stop: killing what is left")
        self._kill()

    def _exit_code(self) -> int:
        if self._cut_off_by:
            return 128 + self._cut_off_by
        if self._died:
            code = self._codes[self._died]
            self._screen.line("run", f"failed: {self._died} ended by itself ({describe_code(code)})")
            return code if code > 0 else 1
        # One that was told to stop before it had a handler for that ends by the signal itself.
        return 1 if set(self._codes.values()) - {0, -signal.SIGTERM} else 0


async def _exchange(listener: Listener, request: bytes) -> bytes | None:
    """Connect and send; return the first line of the answer (nothing is asked for: b""), None if nobody is there."""
    host, _, port = listener.reachable.rpartition(":")
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(3):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(request)
                return await reader.readline() if request else b""
            finally:
                writer.close()
    return None


if sys.platform == "linux":
    _prctl = ctypes.CDLL(None).prctl

    def _end_with_parent() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
else:

    def _end_with_parent() -> None:
        """Elsewhere a killed launcher leaves its programs behind."""


def main() -> int:
    """Run the Procfile."""
    try:
        addresses = read_addresses(os.environ)
    except ValueError as exc:
        print(f"run: {exc}", file=sys.stderr)
        return 1
    if refused := list(find_refused(addresses)):
        print("\n".join(f"run: {message}" for message in refused), file=sys.stderr)
        return 1
    commands = parse_procfile((ROOT / "Procfile").read_text()).processes
    return asyncio.run(Launcher(commands, addresses, child_environment(os.environ, addresses)).run())


if __name__ == "__main__":
    sys.exit(main())
