"""What a user types, read; what makes no sense is a usage error."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from router_client import Agent
from router_client.cli.inputs import Work, read_agents, read_body, read_text, read_work

ANN = {"model_name": "churn", "vector": [1, 2.5]}


@pytest.mark.parametrize(
    ("text", "name", "agent"),
    [
        ("alice:churn:buyer=0.1,0.2", "alice", Agent("churn", [0.1, 0.2], "buyer")),
        ("bob:churn=1", "bob", Agent("churn", [1.0])),
        ("bob:a=b:t=1,-2e3", "bob", Agent("a=b", [1.0, -2000.0], "t")),
        ("bob:churn:=1", "bob", Agent("churn", [1.0], "")),
    ],
)
def test_an_agent_is_name_model_type_and_numbers(text: str, name: str, agent: Agent) -> None:
    assert read_agents([text]) == {name: agent}


@pytest.mark.parametrize("text", ["", "x", "x=1", ":m=1", "a:=1", "a:m:t:u=1", "a:m", "a:m=", "a:m=1,,2", "a:m=x"])
def test_what_is_no_agent_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        read_agents([text])


def test_two_agents_of_one_name_are_a_usage_error() -> None:
    with pytest.raises(typer.BadParameter, match="two agents 'a'"):
        read_agents(["a:m=1", "a:m=2"])


def test_a_file_holds_the_body_of_a_request(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"agents": {"ann": ANN}, "timeout_s": 5, "explain": True, "priority_class": "batch"}))
    work = read_work([], str(file))
    assert work == Work({"ann": Agent("churn", [1, 2.5])}, 5, explain=True, priority="batch")
    assert work.changed(timeout_s=None, explain=False, priority=None) == work
    assert work.changed(timeout_s=1.0, explain=False, priority="interactive").timeout_s == 1.0


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"text": "hi"},
        {"agents": {}},
        {"agents": {"ann": 1}},
        {"agents": {"ann": {**ANN, "model_name": None}}},
        {"agents": {"ann": {**ANN, "agent_type": 1}}},
        {"agents": {"ann": {**ANN, "vector": "1"}}},
        {"agents": {"ann": {**ANN, "vector": [True]}}},
        {"agents": {"ann": ANN}, "timeout_s": 0},
        {"agents": {"ann": ANN}, "timeout_s": "1"},
        {"agents": {"ann": ANN}, "explain": "yes"},
        {"agents": {"ann": ANN}, "priority_class": "high"},
    ],
)
def test_another_file_is_a_usage_error_that_names_it(body: Any) -> None:  # noqa: ANN401
    with pytest.raises(typer.BadParameter, match=r"request\.json: "):
        read_body(json.dumps(body), "request.json")


def test_a_file_that_is_no_json_or_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="line 1"):
        read_body("{", "request.json")
    with pytest.raises(typer.BadParameter, match="No such file"):
        read_work([], str(tmp_path / "none.json"))


def test_agents_come_from_one_place(tmp_path: Path) -> None:
    for given, file in (([], None), (["a:m=1"], str(tmp_path))):
        with pytest.raises(typer.BadParameter, match="--agent or by --file"):
            read_work(given, file)


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, is_terminal: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: is_terminal))


@pytest.mark.parametrize("argument", ["-", None])
def test_stdin_is_a_text_too_without_its_last_line_break(argument: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "Très bien\n\n".encode())
    assert read_text(argument) == "Très bien\n"
    assert read_text("as it stands\n") == "as it stands\n"


def test_nobody_waits_for_a_text_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"", is_terminal=True)
    with pytest.raises(typer.BadParameter, match="give a text"):
        read_text(None)


def test_bytes_that_are_no_text_are_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"\xff")
    with pytest.raises(typer.BadParameter, match="stdin"):
        read_text("-")


def test_a_closed_stdin_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for argument in (None, "-"):
        with pytest.raises(typer.BadParameter, match="stdin is closed"):
            read_text(argument)


@pytest.mark.parametrize("text", ["[" * 200_000, f'{{"agents": {"1" * 5000}}}'])
def test_json_that_python_does_not_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"body\.json: "):
        read_body(text, "body.json")
