"""Mock, model server, router and gateway as processes of their own, as a user starts them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.processes import Program, running

# What the mock serves; `slow` is not answered while a test lives, and nothing else is asked of it.
MOCK_MODELS = ("churn", "fraud", "slow", "sentiment")
SLOW_S = 600


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the programs listen."""

    router: str
    metrics: str
    gateway: str
    mock: Program


@contextmanager
def serving(directory: Path) -> Iterator[Stack]:
    """The stack of most tests: every model of the mock and of `model_server`, that one by both protocols.

    The agent type `unary` leads to the backend of that protocol.
    """
    with ExitStack() as stack:
        mock = stack.enter_context(started_mock("--latency", "0", "--latency", f"slow={SLOW_S}"))
        server = stack.enter_context(running("tests.interop.model_server"))
        server_address = server.wait_for(r"listening on ([\d.:]+)")[1]
        backends = {
            "mock": {"addresses": [mock.wait_for(r"listening on ([\d.:]+)")[1]]},
            "stream": {"addresses": [server_address]},
            "unary": {"addresses": [server_address], "protocol": "unary"},
        }
        of_mock: list[dict[str, object]] = [{"match": {"model_name": name}, "backend": "mock"} for name in MOCK_MODELS]
        models: list[dict[str, object]] = [
            *of_mock,
            {"match": {"agent_type": "unary"}, "backend": "unary"},
            {"backend": "stream"},
        ]
        router, metrics = stack.enter_context(started_router(directory, backends, models))
        yield Stack(router, metrics, stack.enter_context(started_gateway(router)), mock)


@contextmanager
def started_mock(*arguments: str) -> Iterator[Program]:
    """A mock; it says where it listens."""
    with running("mock_nn", "--listen", "127.0.0.1:0", "--models", ",".join(MOCK_MODELS), *arguments) as mock:
        yield mock


@contextmanager
def started_router(
    directory: Path, backends: Mapping[str, object], models: Sequence[Mapping[str, object]]
) -> Iterator[tuple[str, str]]:
    """A router with these settings; its address and that of its metrics."""
    file = directory / "router.yaml"
    file.write_text(json.dumps({"backends": backends, "models": models}))  # JSON is YAML
    addresses = {"ROUTER_LISTEN": "127.0.0.1:0", "ROUTER_METRICS": "127.0.0.1:0"}
    with running("router", "--config", str(file), **addresses) as router:
        metrics = router.wait_for(r"metrics on (http://[\d.:]+/metrics)")[1]
        yield router.wait_for(r"router listens on ([\d.:]+)")[1], metrics


@contextmanager
def started_gateway(router: str) -> Iterator[str]:
    """A gateway before that router; its address."""
    with running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER=router) as gateway:
        yield gateway.wait_for(r"listen\w* on (?:http://)?([\d.:]+)")[1]
