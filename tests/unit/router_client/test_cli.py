"""The command line where it needs no server: usage, help, completion, what is loaded."""

import importlib
import io
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from router_client.__main__ import main as entry_point
from router_client.cli.app import app, main

ENTRY_POINT = "import sys; from router_client.__main__ import main; sys.exit(main())"


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env=environment, prog_name="inference-router")
    return result.exit_code, result.stdout, result.stderr


def installed(*arguments: str, **environment: str) -> str:
    """What the installed script prints on stdout."""
    command = [sys.executable, "-c", ENTRY_POINT, *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["predict"],
        ["predict", "--agent", "x"],
        ["predict", "--agent", "a:m=1", "--file", "-"],
        ["predict", "--agent", "a:m=1", "--timeout", "0"],
        ["predict", "--agent", "a:m=1", "--priority", "high"],
        ["submit", "text", "--agent", "a:m=1"],
        ["jobs", "--status", "over"],
        ["jobs", "--limit", "0"],
        ["jobs", "show"],
        ["models", "more"],
    ],
)
def test_what_makes_no_request_is_a_usage_error(arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: inference-router" in err


def test_help_names_every_command_and_the_exit_codes() -> None:
    code, out, _ = run("--help", COLUMNS="120")
    assert code == 0
    for word in ("predict", "submit", "jobs", "models", "status", "health", "130 interrupted"):
        assert word in out


def test_no_command_at_all_is_a_question_for_help() -> None:
    code, out, err = run()
    assert code == 2
    assert "Usage: inference-router" in out + err


def test_a_variable_tells_where_the_gateway_is() -> None:
    code, _, err = run("jobs", INFERENCE_ROUTER_GATEWAY="nowhere")
    assert (code, err) == (1, "INVALID_ARGUMENT: 'nowhere' is no URL such as http://127.0.0.1:8000\n")
    code, _, err = run("jobs", "--gateway", "option", "show", "1", INFERENCE_ROUTER_GATEWAY="nowhere")
    assert "'option'" in err
    code, _, err = run("jobs", "--gateway", "option", "show", "1", "--gateway", "last")
    assert "'last'" in err


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command")]
)
def test_completion_prints_a_script_for_every_shell(shell: str, word: str) -> None:
    # Typer asks the process above which shell it is; with this variable, its own tests', it takes our word.
    script = installed("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert word in script
    assert f"_INFERENCE_ROUTER_COMPLETE=complete_{shell}" in script


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("inference-router jo", {"jobs"}),
        ("inference-router jobs ", {"show", "cancel", "delete"}),
        ("inference-router jobs --status c", {"completed", "cancelled"}),
        ("inference-router predict --ag", {"--agent"}),
    ],
)
def test_completion_knows_commands_options_and_their_values(line: str, expected: set[str]) -> None:
    at = str(line.count(" "))
    offered = installed(_INFERENCE_ROUTER_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=at)
    assert set(offered.split()) == expected


def test_main_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["predict"]) == 2
    capsys.readouterr()


def test_what_stdout_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["predict", "--help"]) == 0
    print("größe")
    stdout.flush()
    assert stdout.buffer.getvalue().endswith(b"gr\\xf6\\xdfe\n")


def test_ctrl_c_is_quiet_while_the_libraries_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert entry_point() == 130


def test_the_probe_and_the_native_client_load_no_library_of_the_command_line() -> None:
    probe = (
        "from router_client.__main__ import probe; sys.argv = ['x', 'health', '127.0.0.1:1', '--timeout', '0.1'];"
        "assert probe() == 1"
    )
    for code in (probe, "from router_client import Roster, RouterClient, group"):
        assert loaded(code, "httpx", "typer", "rich", "prometheus_client", "numpy", "pydantic") == []


def test_help_and_completion_do_not_wait_for_what_a_command_needs() -> None:
    assert loaded("import router_client.cli.app", "grpc", "httpx", "prometheus_client", "typer") == ["typer"]


def loaded(code: str, *names: str) -> list[str]:
    """Which of these modules a process has after it ran `code`."""
    checked = f"import sys; {code}; print(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()[-1].split()


def test_every_public_name_is_there_and_no_other() -> None:
    import router_client  # noqa: PLC0415 -- the module itself is the matter

    for name in router_client.__all__:
        assert getattr(router_client, name) is not None
        assert name in dir(router_client)
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = router_client.Nobody
