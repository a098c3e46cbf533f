"""What a user types to what the client takes: agents, files, texts. What makes no sense is a usage error (exit 2)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import typer

from router_client.blocks import Agent
from router_client.jobs import Priority

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Work:
    """Agents, and what their file says of the request."""

    agents: dict[str, Agent]
    timeout_s: float | None = None
    explain: bool = False
    priority: Priority = "interactive"

    def changed(self, *, timeout_s: float | None, explain: bool, priority: Priority | None) -> "Work":
        """Return it as the options have it, which win over the file."""
        return replace(
            self,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            explain=self.explain or explain,
            priority=priority or self.priority,
        )


def read_work(given: Sequence[str], file: str | None) -> Work:
    """Return the agents of `--agent` or of `--file`.

    Raises:
        BadParameter: there are none, or both, or they cannot be read.
    """
    if bool(given) == (file is not None):
        raise typer.BadParameter("give agents, either by --agent or by --file")
    return read_body(_read_file(file), file) if file is not None else Work(read_agents(given))


def read_agents(given: Sequence[str]) -> dict[str, Agent]:
    """Return agents from `NAME:MODEL[:TYPE]=NUMBER,NUMBER`.

    Raises:
        BadParameter: one is not so, or a name comes twice.
    """
    agents: dict[str, Agent] = {}
    for text in given:
        name, agent = _read_agent(text)
        if name in agents:
            raise typer.BadParameter(f"there are two agents {name!r}")
        agents[name] = agent
    return agents


def read_body(text: str, file: str) -> Work:
    """Return the work in the JSON body of a request over REST, `{"agents": {…}, "timeout_s": …}`.

    Raises:
        BadParameter: it is none.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as exc:  # no JSON, a number of thousands of digits, nested too deeply
        raise typer.BadParameter(f"{file}: {exc}") from exc
    if not isinstance(body, dict) or not isinstance(body.get("agents"), dict) or not body["agents"]:
        raise typer.BadParameter(f'{file}: must hold an object with "agents" by name (for a text: submit TEXT)')
    agents = {name: _agent_of(name, told, file) for name, told in body["agents"].items()}
    timeout_s, explain, priority = body.get("timeout_s"), body.get("explain"), body.get("priority_class")
    if not (timeout_s is None or (_is_number(timeout_s) and 0 < timeout_s < inf)):
        raise typer.BadParameter(f"{file}: timeout_s must be a number of seconds above 0")
    if explain not in (None, True, False):
        raise typer.BadParameter(f"{file}: explain must be true or false")
    if priority not in (None, "interactive", "batch"):
        raise typer.BadParameter(f'{file}: priority_class must be "interactive" or "batch"')
    return Work(agents, timeout_s, bool(explain), priority or "interactive")


def read_text(argument: str | None) -> str:
    """Return a text as given, or stdin for `-` and for none, without its last line break.

    Raises:
        BadParameter: there is none: stdin is a terminal, closed, or no UTF-8.
    """
    if argument is not None and argument != STDIN:
        return argument
    if argument is None and sys.stdin is not None and sys.stdin.isatty():
        raise typer.BadParameter("give a text, - for stdin, or agents")
    return _read_stdin().removesuffix("\n").removesuffix("\r")


def _read_agent(text: str) -> tuple[str, Agent]:
    head, equals, numbers = text.rpartition("=")
    name, *kind = head.split(":")
    if not equals or not name or len(kind) not in (1, 2) or not kind[0]:
        raise typer.BadParameter(f"{text!r} is not NAME:MODEL[:TYPE]=NUMBER,NUMBER")
    try:
        vector = [float(number) for number in numbers.split(",")]
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r}: {exc}") from exc
    return name, Agent(kind[0], vector, *kind[1:])


def _agent_of(name: str, told: object, file: str) -> Agent:
    if not isinstance(told, dict):
        raise typer.BadParameter(f"{file}: agent {name!r} must be an object")
    model_name, agent_type, vector = told.get("model_name"), told.get("agent_type") or "", told.get("vector")
    if not isinstance(model_name, str) or not isinstance(agent_type, str):
        raise typer.BadParameter(f"{file}: agent {name!r} needs a model_name, and an agent_type only as a text")
    if not isinstance(vector, list) or not all(map(_is_number, vector)):
        raise typer.BadParameter(f"{file}: agent {name!r} needs a vector, a list of numbers")
    return Agent(model_name, vector, agent_type)


def _is_number(value: Any) -> bool:  # noqa: ANN401 -- JSON
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_file(file: str) -> str:
    if file == STDIN:
        return _read_stdin()
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise typer.BadParameter(f"{file}: {getattr(exc, 'strerror', None) or exc}") from exc


def _read_stdin() -> str:
    if sys.stdin is None:  # closed by who started the process
        raise typer.BadParameter("stdin is closed")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise typer.BadParameter(f"stdin: {exc}") from exc
