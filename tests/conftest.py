"""For all levels: how programs are started, and what a run tells at its end beside its own results.

PostgreSQL and programs are started by fork and exec, out of processes that speak gRPC.
"""

import os

import pytest

from tests.interop.report import lines

# Before gRPC is loaded: its handlers take threads up again in a child that is about to become another program, and now
# and then that child dies of it (signal 11, "epoll_wait error: Bad file descriptor").
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interop-cases", action="store_true", help="name every case of tests/interop at the end")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Which programs of others the tests have met. Here and not in tests/interop: with several processes the one that
    prints collects nothing."""
    told = list(lines(terminalreporter.stats, with_cases=config.getoption("--interop-cases")))
    if told:
        terminalreporter.section("interoperability")
    for line in told:
        terminalreporter.write_line(line)
