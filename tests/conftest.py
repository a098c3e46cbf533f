"""What a run tells at its end beside its own results: which programs of others the tests have met."""

import pytest

from tests.interop.report import lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interop-cases", action="store_true", help="name every case of tests/interop at the end")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Here and not in tests/interop: with several processes the one that prints collects nothing."""
    told = list(lines(terminalreporter.stats, with_cases=config.getoption("--interop-cases")))
    if told:
        terminalreporter.section("interoperability")
    for line in told:
        terminalreporter.write_line(line)
