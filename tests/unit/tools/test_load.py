"""`make load-rest` and `make load-grpc`: their plain parts. The tools themselves run by hand."""

import socket

import pytest

from tools.load import run_against, split_host, stack_environment, summarise_metrics, tool_commands
from tools.run import read_addresses


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        ("rest", "http://127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("rest", "http://127.0.0.1:9000/", ("127.0.0.1", 9000)),
        ("rest", "localhost", ("localhost", 8000)),
        ("grpc", "[::1]", ("::1", 50051)),
        ("grpc", "[::1]:6000", ("::1", 6000)),
    ],
)
def test_load_host_is_an_address_with_or_without_its_port(target: str, host: str, expected: tuple[str, int]) -> None:
    assert split_host(target, host) == expected


@pytest.mark.parametrize("host", ["https://127.0.0.1:1", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:80/predict"])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="LOAD_HOST"):
        split_host("rest", host)


def test_locust_gets_the_host_and_the_users_own_arguments_last() -> None:
    [command] = tool_commands("rest", "127.0.0.1:7", ["--users", "200"])
    assert command[-4:] == ["--host", "http://127.0.0.1:7", "--users", "200"]


def test_ghz_runs_once_for_each_file_and_takes_the_address_last() -> None:
    commands = tool_commands("grpc", "127.0.0.1:7", ["--duration=1s"], ".tools/ghz")
    assert [command[0] for command in commands] == [".tools/ghz", ".tools/ghz"]
    assert [command[1] for command in commands] == [
        "--config=bench/ghz/predict_01_agent.json",
        "--config=bench/ghz/predict_16_agents_4_models.json",
    ]
    assert {tuple(command[2:]) for command in commands} == {("--duration=1s", "127.0.0.1:7")}


def test_a_stack_of_its_own_listens_on_its_ports_and_leads_nowhere_else() -> None:
    told = {"MOCK_LATENCY": "1", "GATEWAY_ROUTER": "elsewhere:1", "GATEWAY_LISTEN": "0.0.0.0:8000"}
    environment = stack_environment(told, (1, 2, 3, 4))
    addresses = read_addresses(environment)
    assert [listener.port for listener in addresses] == [1, 2, 3, 4]
    assert environment["MOCK_LATENCY"] == "1"
    assert "GATEWAY_ROUTER" not in environment
    assert stack_environment({}, (1, 2, 3, 4))["MOCK_LATENCY"] == "0.05"


def test_the_routers_metrics_are_told_in_one_line() -> None:
    text = """# TYPE router_batch_rows histogram
router_batch_rows_bucket{backend="a",le="+Inf"} 4.0
router_batch_rows_count{backend="a"} 4.0
router_batch_rows_sum{backend="a"} 50.0
# TYPE router_requests counter
router_requests_total{code="OK",method="Predict"} 9.0
router_requests_total{code="NOT_FOUND",method="Predict"} 2.0
# TYPE router_refusals counter
router_refusals_total{reason="queue"} 3.0
"""
    assert summarise_metrics(text) == (
        "router: 50 rows in 4 batches, 12.5 rows a batch; 3 rows refused, 2 calls failed"
    )


def test_nothing_at_load_host_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert run_against("rest", f"http://127.0.0.1:{port}", [], "ghz") == 1
    assert capsys.readouterr().err.startswith(f"load: nothing listens at http://127.0.0.1:{port} (")
