"""compose.yaml beyond its schema: the services, programs and settings that it names are there, and nothing is open."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.healthcheck import choose_probe
from mock_nn.config import parse_config
from rest_gateway.config import load_settings, variable_of
from router.config import load, unknown_variables

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = {"mock_nn": "mock_nn", "router": "router", "gateway": "rest_gateway"}


def read(environment: Mapping[str, str] = {}) -> dict[str, Any]:
    """The file as compose sees it in this environment."""
    text = re.sub(
        r"\$\{(\w+):-([^}]*)\}",
        lambda match: environment.get(match[1]) or match[2],
        (ROOT / "compose.yaml").read_text(),
    )
    assert "${" not in text
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def addresses(service: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(where the machine offers it, the container's port)."""
    return {tuple(port.rsplit(":", 1)) for port in service.get("ports", ())}


def test_every_service_waits_until_those_that_it_needs_are_well() -> None:
    services = read()["services"]
    assert {name: set(service.get("depends_on", ())) for name, service in services.items()} == {
        "postgres": set(),
        "mock_nn": set(),
        "router": {"mock_nn"},
        "gateway": {"postgres", "router"},
    }
    for service in services.values():
        assert service["healthcheck"]["test"][0] == "CMD"
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            assert how == {"condition": "service_healthy"}


def test_every_program_is_the_images_and_is_probed_as_the_image_says() -> None:
    services = read()["services"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert {name: services[name]["command"][0] for name in PROGRAMS} == PROGRAMS
    assert 'ENTRYPOINT ["python", "-m"]' in dockerfile
    for name in PROGRAMS:
        service = services[name]
        assert (service["build"], service["image"]) == (".", "inference-router")
        assert choose_probe(["python", "-m", *service["command"]], service.get("environment", {})) is not None
        assert f"CMD {json.dumps(service['healthcheck']['test'][1:])}" in dockerfile


def test_only_the_loopback_offers_ports_and_the_database_none() -> None:
    services = read()["services"]
    assert {name: addresses(service) for name, service in services.items()} == {
        "postgres": set(),
        "mock_nn": set(),
        "router": {("127.0.0.1:50051", "50051"), ("127.0.0.1:9091", "9091")},
        "gateway": {("127.0.0.1:8000", "8000")},
    }


def test_the_router_finds_the_mock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    services = read()["services"]
    environment = services["router"]["environment"]
    assert unknown_variables(environment) == []
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = parse_config(services["mock_nn"]["command"][1:])
    assert config.listen == "0.0.0.0:50061"
    assert load().backends["mock"].addresses == ["mock_nn:50061"]


def test_the_gateway_finds_the_router_and_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    services = read()["services"]
    for name, value in services["gateway"]["environment"].items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.router == "router:50051"
    assert variable_of("router") in services["gateway"]["environment"]
    of_database = services["postgres"]["environment"]
    user, name = of_database["POSTGRES_USER"], of_database["POSTGRES_DB"]
    assert settings.database_url == f"postgresql://{user}@postgres:5432/{name}"


@pytest.mark.parametrize("password", [None, "a@b:c/d ?"])
def test_both_ends_have_the_same_password_which_the_environment_may_set(password: str | None) -> None:
    services = read({} if password is None else {"POSTGRES_PASSWORD": password})["services"]
    expected = password or "inference-router"
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] == expected
    assert services["gateway"]["environment"]["PGPASSWORD"] == expected


def test_the_data_is_in_a_volume_of_a_name() -> None:
    document = read()
    assert document["services"]["postgres"]["volumes"] == ["jobs:/var/lib/postgresql/data"]
    assert list(document["volumes"]) == ["jobs"]
