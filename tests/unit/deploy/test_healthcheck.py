"""Which program the image's HEALTHCHECK asks, and where."""

import pytest

from deploy.healthcheck import Probe, choose_probe


@pytest.mark.parametrize(
    ("command", "environment", "probe"),
    [
        ("python -m router", {}, Probe("router", "127.0.0.1:50051")),
        ("python -m router --config /etc/r.yaml", {"ROUTER_LISTEN": "0.0.0.0:5"}, Probe("router", "127.0.0.1:5")),
        ("python -m router", {"ROUTER_LISTEN": "[::]:5"}, Probe("router", "[::1]:5")),
        ("python -m rest_gateway", {"GATEWAY_LISTEN": ""}, Probe("rest_gateway", "127.0.0.1:8000")),
        ("/sbin/docker-init -- python -m rest_gateway", {"GATEWAY_LISTEN": "10.0.0.1:80"},
         Probe("rest_gateway", "10.0.0.1:80")),
        ("python -m mock_nn", {}, Probe("mock_nn", "127.0.0.1:50061")),
        ("python -m mock_nn --listen 0.0.0.0:1 --latency 1", {}, Probe("mock_nn", "127.0.0.1:1")),
        ("python -m mock_nn --listen 0.0.0.0:1 --listen=0.0.0.0:2", {}, Probe("mock_nn", "127.0.0.1:2")),
    ],
)  # fmt: skip
def test_the_program_of_process_1_is_asked_where_it_listens(
    command: str, environment: dict[str, str], probe: Probe
) -> None:
    assert choose_probe([*command.split(), ""], environment) == probe


@pytest.mark.parametrize("command", ["python -m rest_gateway.migrate", "sleep 5", "", "python -m"])
def test_who_serves_nobody_is_not_asked(command: str) -> None:
    assert choose_probe(command.split(), {}) is None
