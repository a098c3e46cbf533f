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
    variable_of,
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
        "max_text_length": 10_000,
        "database_url": "sqlite:///./var/jobs.sqlite3",
        "migrate": True,
        "job_concurrency": 256,
        "job_timeout_s": 3_600.0,
        "job_retention_s": 86_400.0,
        "job_max_waiting": 100_000,
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
        ("GATEWAY_MIGRATE", "maybe"),
        ("GATEWAY_JOB_CONCURRENCY", "0"),
        ("GATEWAY_JOB_TIMEOUT_S", "0"),
        ("GATEWAY_JOB_RETENTION_S", "inf"),
        ("GATEWAY_JOB_MAX_WAITING", "-1"),
        ("GATEWAY_MAX_TEXT_LENGTH", "0"),
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
    assert all(f"{variable_of(name)} " in text for name in Settings.model_fields)
    assert "  DATABASE_URL " in text


def test_the_database_is_named_without_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://me:secret@db/jobs")
    settings = load_settings()
    assert settings.database_url == "postgresql+asyncpg://me:secret@db/jobs"
    assert "secret" not in repr(settings)


@pytest.mark.parametrize("url", ["mysql://me:secret@db/jobs", "secret", "sqlite://", "sqlite:///", "postgresql:secret"])
def test_a_bad_database_is_refused_without_showing_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ConfigError, match=r"^DATABASE_URL: must begin with sqlite:///") as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_several_processes_on_one_sqlite_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_WORKERS", "2")
    with pytest.raises(
        ConfigError, match=r"^GATEWAY_WORKERS=2 needs .* DATABASE_URL=postgresql://.*GATEWAY_WORKERS=1$"
    ):
        load_settings()
    monkeypatch.setenv("DATABASE_URL", "postgres://db/jobs")
    assert load_settings().workers == 2


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
