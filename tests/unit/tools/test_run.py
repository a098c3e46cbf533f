"""The launcher's plain parts; whole runs are in tests/acceptance."""

import pytest
from honcho.environ import parse_procfile

from tools.run import LAST_LINE, ROOT, child_environment, describe_code, describe_run, read_addresses


def test_the_projects_procfile_names_the_programs_above_those_that_need_them() -> None:
    assert list(parse_procfile((ROOT / "Procfile").read_text()).processes) == ["mock", "router", "gateway"]


def test_addresses_come_from_the_environment_an_empty_variable_is_none() -> None:
    addresses = read_addresses({"GATEWAY_LISTEN": "0.0.0.0:9000", "ROUTER_LISTEN": ""})
    assert addresses.gateway.address == "0.0.0.0:9000"
    assert addresses.router.address == "127.0.0.1:50051"


@pytest.mark.parametrize("address", ["8000", "localhost", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536"])
def test_an_address_without_a_port_is_refused_by_its_variable(address: str) -> None:
    with pytest.raises(ValueError, match=r"ROUTER_METRICS: .*host:port"):
        read_addresses({"ROUTER_METRICS": address})


@pytest.mark.parametrize(
    ("address", "reachable"),
    [
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("0.0.0.0:8000", "127.0.0.1:8000"),
        ("[::]:8000", "[::1]:8000"),
        ("[::1]:8000", "[::1]:8000"),
        ("localhost:8000", "localhost:8000"),
    ],
)
def test_a_client_on_this_machine_reaches_whatever_is_listened_on(address: str, reachable: str) -> None:
    assert read_addresses({"GATEWAY_LISTEN": address}).gateway.reachable == reachable


def test_who_moves_a_program_moves_its_clients_unless_they_are_told_otherwise() -> None:
    moved = {"MOCK_LISTEN": "0.0.0.0:6000", "ROUTER_LISTEN": "127.0.0.1:6001"}
    child = child_environment(moved, read_addresses(moved))
    assert child["ROUTER_BACKENDS__MOCK__ADDRESSES"] == '["127.0.0.1:6000"]'
    assert child["GATEWAY_ROUTER"] == "127.0.0.1:6001"

    told = moved | {"GATEWAY_ROUTER": "elsewhere:1"}
    assert child_environment(told, read_addresses(told))["GATEWAY_ROUTER"] == "elsewhere:1"
    assert "GATEWAY_ROUTER" not in child_environment({}, read_addresses({}))


def test_the_block_tells_every_address_and_ends_with_how_to_stop() -> None:
    text = describe_run(read_addresses({"GATEWAY_LISTEN": "0.0.0.0:9000"}), "0.05")
    for expected in ("http://127.0.0.1:9000/docs", "127.0.0.1:50051", "http://127.0.0.1:9091/metrics", "0.05 s"):
        assert expected in text
    assert text.rstrip().endswith(LAST_LINE)


def test_how_a_process_ended_is_said_in_words() -> None:
    assert describe_code(3) == "exit code 3"
    assert describe_code(-9) == "killed by SIGKILL"
