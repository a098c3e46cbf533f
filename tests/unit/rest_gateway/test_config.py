"""Settings: defaults, variables, and messages that name the variable."""

import logging

import pytest

from rest_gateway.config import (
    ConfigError,
    OneLineFormatter,
    Settings,
    describe_variables,
    load_settings,
    logging_config,
    split_address,
)


def test_the_defaults_are_those_of_the_design() -> None:
    assert Settings().model_dump() == {
        "listen": "127.0.0.1:8000",
        "workers": 1,
        "router": "127.0.0.1:50051",
        "router_wait_s": 2.0,
        "drain_delay_s": 1.0,
        "drain_timeout_s": 30.0,
        "max_body_bytes": 8_388_608,
        "max_agents": 1024,
        "max_vector_length": 65_536,
        "max_name_length": 256,
        "log_format": "text",
        "log_level": "INFO",
        "log_requests": "errors",
        "trust_tenant": False,
    }


def test_variables_set_them_and_empty_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_LISTEN", "[::1]:0")
    monkeypatch.setenv("GATEWAY_DRAIN_DELAY_S", "0.5")
    monkeypatch.setenv("GATEWAY_TRUST_TENANT", "true")
    monkeypatch.setenv("GATEWAY_ROUTER", "")
    settings = load_settings()
    assert (settings.listen, settings.drain_delay_s, settings.trust_tenant) == ("[::1]:0", 0.5, True)
    assert settings.router == "127.0.0.1:50051"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GATEWAY_LISTEN", "8000"),
        ("GATEWAY_ROUTER", "http://127.0.0.1:50051"),
        ("GATEWAY_ROUTER", "router"),
        ("GATEWAY_LISTEN", "127.0.0.1:http"),
        ("GATEWAY_LISTEN", "127.0.0.1:65536"),
        ("GATEWAY_LISTEN", ":8000"),
        ("GATEWAY_MAX_AGENTS", "many"),
        ("GATEWAY_MAX_AGENTS", "0"),
        ("GATEWAY_WORKERS", "0"),
        ("GATEWAY_WORKERS", "many"),
        ("GATEWAY_MAX_BODY_BYTES", "8MiB"),
        ("GATEWAY_DRAIN_DELAY_S", "-1"),
        ("GATEWAY_DRAIN_TIMEOUT_S", "inf"),
        ("GATEWAY_ROUTER_WAIT_S", "nan"),
        ("GATEWAY_LOG_FORMAT", "xml"),
        ("GATEWAY_LOG_REQUESTS", "yes"),
        ("GATEWAY_TRUST_TENANT", "maybe"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"^{variable}='{value}': .+$"):
        load_settings()


def test_every_bad_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MAX_AGENTS", "x")
    monkeypatch.setenv("GATEWAY_LOG_LEVEL", "LOUD")
    with pytest.raises(ConfigError, match=r"GATEWAY_MAX_AGENTS='x': .*; GATEWAY_LOG_LEVEL='LOUD': "):
        load_settings()


def test_the_help_lists_every_variable() -> None:
    text = describe_variables()
    assert all(f"GATEWAY_{name.upper()} " in text for name in Settings.model_fields)


def test_addresses_split_into_host_and_port() -> None:
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[::1]:65535") == ("::1", 65_535)
    assert split_address("localhost:8000") == ("localhost", 8_000)


def test_a_text_record_is_one_line_even_with_a_traceback() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as exc:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "broken\r\n", None, (ValueError, exc, exc.__traceback__))
    text = OneLineFormatter("%(message)s").format(record)
    assert len(text.splitlines()) == 1
    assert "ValueError: a\\nb" in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_logging_of_either_format_is_for_stderr_only(log_format: str) -> None:
    config = logging_config(Settings(log_format=log_format))  # type: ignore[arg-type]  # parametrized
    assert config["root"]["handlers"] == list(config["handlers"]) == ["stderr"]
