"""`make run` as a user runs it: what it prints, the request it offers, Ctrl-C, a program that dies, a taken port."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from tests.acceptance.databases import new_database
from tools.run import LAST_LINE, ROOT

LAUNCHER = ROOT / "tools/run.py"
LEAVES_AT_ONCE_S = 10.0  # a busy machine's; each drain below would take longer
LISTEN_VARIABLES = ("MOCK_LISTEN", "ROUTER_LISTEN", "ROUTER_METRICS", "GATEWAY_LISTEN")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits for processes by pidfd and looks in /proc")


def free_addresses() -> dict[str, str]:
    """An address for each variable, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in LISTEN_VARIABLES]
        return {
            name: f"127.0.0.1:{listener.getsockname()[1]}"
            for name, listener in zip(LISTEN_VARIABLES, sockets, strict=True)
        }


@dataclass
class Program:
    """A child of the launcher; the descriptor becomes readable when the process is gone."""

    pid: int
    descriptor: int

    def wait_gone(self) -> None:
        assert select.select([self.descriptor], [], [], LEAVES_AT_ONCE_S)[0], f"process {self.pid} is still there"


@dataclass
class Run:
    """A running launcher, its programs by their module, and what it has printed."""

    popen: subprocess.Popen[str]
    addresses: Mapping[str, str]
    programs: dict[str, Program] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def read_until(self, text: str) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return
        raise AssertionError(f"ended without a line with {text!r}:\n" + "\n".join(self.lines))

    def find_programs(self) -> None:
        for pid in pathlib.Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split():
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            self.programs[command[2]] = Program(int(pid), os.pidfd_open(int(pid)))

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code, once the launcher and all its programs are gone."""
        assert self.popen.stdout is not None
        code = self.popen.wait(timeout_s)
        self.lines += self.popen.stdout.read().splitlines()
        for program in self.programs.values():
            program.wait_gone()
        return code

    @property
    def curl(self) -> str:
        """The command that the launcher offers to paste."""
        text = "\n".join(self.lines)
        return text[text.index("\ncurl ") + 1 : text.index("\n}'") + 3]


@contextlib.contextmanager
def launched(addresses: Mapping[str, str] | None = None, variables: Mapping[str, str] | None = None) -> Iterator[Run]:
    inherited = {name: value for name, value in os.environ.items() if not re.match("GATEWAY_|ROUTER_|MOCK_", name)}
    addresses = addresses or free_addresses()
    quick = {"MOCK_LATENCY": "0.05", "GATEWAY_DRAIN_DELAY_S": "0.1", "ROUTER_DRAIN_DELAY_S": "0.1"}
    quick["DATABASE_URL"] = new_database()
    with subprocess.Popen(
        [sys.executable, LAUNCHER],
        env=inherited | quick | dict(addresses) | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as popen:
        run = Run(popen, addresses)
        try:
            yield run
        finally:
            popen.kill()
            for program in run.programs.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(program.descriptor, signal.SIGKILL)
                os.close(program.descriptor)


@contextlib.contextmanager
def ready(variables: Mapping[str, str] | None = None) -> Iterator[Run]:
    with launched(variables=variables) as run:
        run.read_until(LAST_LINE)
        run.find_programs()
        assert set(run.programs) == {"mock_nn", "router", "rest_gateway"}
        yield run


def test_the_printed_request_works_and_ctrl_c_stops_all_with_exit_code_0() -> None:
    with ready() as run:
        answer = subprocess.run(run.curl, shell=True, check=True, capture_output=True, text=True).stdout
        document = json.loads(answer)
        assert set(document["results"]) == {"alice", "bob", "carol"}
        assert all(len(result["output"]) == 1 for result in document["results"].values())
        assert document["errors"] == {}

        os.killpg(run.popen.pid, signal.SIGINT)
        assert run.wait() == 0, run.lines


def test_sigterm_stops_as_ctrl_c_does_even_when_it_comes_twice_at_once() -> None:
    """make passes SIGTERM on, and `timeout` sends it to the whole group: the launcher sees two."""
    with ready() as run:
        run.popen.send_signal(signal.SIGTERM)
        run.read_until("stopping")
        run.popen.send_signal(signal.SIGTERM)
        assert run.wait() == 0, run.lines


def test_a_request_in_flight_is_answered_after_ctrl_c() -> None:
    with ready({"MOCK_LATENCY": "2"}) as run:
        client = http.client.HTTPConnection(run.addresses["GATEWAY_LISTEN"], timeout=30)
        agents = {"alice": {"vector": [1.0], "model_name": "churn", "agent_type": "buyer"}}
        client.request("POST", "/predict", json.dumps({"agents": agents}), {"Content-Type": "application/json"})
        run.popen.send_signal(signal.SIGINT)
        answer = client.getresponse()
        assert answer.status == 200
        assert set(json.loads(answer.read())["results"]) == {"alice"}
        client.close()
        assert run.wait() == 0, run.lines


def test_a_second_ctrl_c_leaves_at_once() -> None:
    with ready({"GATEWAY_DRAIN_DELAY_S": "100", "ROUTER_DRAIN_DELAY_S": "100"}) as run:
        run.popen.send_signal(signal.SIGINT)
        run.read_until("stopping")
        run.popen.send_signal(signal.SIGINT)
        assert run.wait(LEAVES_AT_ONCE_S) == 128 + signal.SIGINT


def test_ctrl_c_before_all_are_ready_leaves_nothing_behind() -> None:
    with launched() as run:
        run.read_until("mock")
        run.find_programs()
        run.popen.send_signal(signal.SIGINT)
        assert run.wait() == 0, run.lines


@pytest.mark.parametrize(("module", "name"), [("mock_nn", "mock"), ("router", "router"), ("rest_gateway", "gateway")])
def test_when_one_program_dies_the_others_stop_and_the_last_line_names_it(module: str, name: str) -> None:
    with ready() as run:
        os.kill(run.programs[module].pid, signal.SIGKILL)
        assert run.wait() == 1
        assert run.lines[-1].endswith(f"failed: {name} ended by itself (killed by SIGKILL)")


def test_when_the_launcher_is_killed_its_programs_leave() -> None:
    with ready() as run:
        run.popen.kill()
        assert run.wait() == -signal.SIGKILL


def test_a_taken_port_is_named_with_its_program_and_nothing_is_started() -> None:
    addresses = free_addresses()
    host, port = addresses["GATEWAY_LISTEN"].split(":")
    with socket.create_server((host, int(port))), launched(addresses) as run:
        assert run.wait() == 1
        reason = f"port {port} is already in use (GATEWAY_LISTEN is its setting)"
        assert run.lines == [f"run: gateway cannot listen on {host}:{port}: {reason}"]
