"""Settings: defaults, file, environment, and messages that name the field."""

from pathlib import Path

import pytest
import yaml

from router.config import ConfigError, load, unknown_variables

DESIGNED_DEFAULTS = {
    "listen": "127.0.0.1:50051",
    "metrics": "127.0.0.1:9091",
    "default_timeout_s": 60,
    "max_timeout_s": 600,
    "batch_timeout_s": 60,
    "drain_delay_s": 3,
    "drain_timeout_s": 30,
}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> Path:
    path = Path("given.yaml")
    path.write_text(text)
    return path


def test_without_a_file_the_defaults_serve_every_model_from_one_local_backend() -> None:
    settings = load()
    shown = yaml.safe_load(settings.to_yaml())
    assert DESIGNED_DEFAULTS.items() <= shown.items()
    designed = {"addresses": ["127.0.0.1:50061"], "protocol": "stream", "max_in_flight": 4}
    assert list(shown["backends"]) == ["mock"]
    assert designed.items() <= shown["backends"]["mock"].items()
    model = settings.route("any", "thing")
    assert model is not None
    assert (model.backend, model.max_batch_size, model.max_batch_bytes) == ("mock", 64, 8388608)
    assert model.max_queue_delay_s == 0.002


def test_what_is_printed_is_a_file_that_gives_the_same() -> None:
    settings = load()
    assert load(write(settings.to_yaml())) == settings


def test_router_yaml_in_the_current_directory_is_found() -> None:
    Path("router.yaml").write_text("listen: 127.0.0.1:1\nbackends: {x: {addresses: [h:2]}}\nmodels: [{backend: x}]")
    assert load().listen == "127.0.0.1:1"


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("backends: {mock: {addresses: [h:1], max_in_flight: 9}}\nmodels: [{backend: mock}]")
    monkeypatch.setenv("ROUTER_BACKENDS__MOCK__ADDRESSES", '["mock_nn:50061"]')
    monkeypatch.setenv("ROUTER_LIMITS__MAX_KEYS", "7")
    settings = load(path)
    assert settings.backends["mock"].addresses == ["mock_nn:50061"]
    assert settings.backends["mock"].max_in_flight == 9
    assert settings.limits.max_keys == 7


def test_the_environment_alone_changes_the_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_BACKENDS__MOCK__ADDRESSES", '["a:1", "b:2"]')
    assert load().backends["mock"].addresses == ["a:1", "b:2"]


def test_addresses_may_be_names_to_look_up_and_files() -> None:
    given = [
        "10.0.0.1:50061",
        "dns:///models.local:50061",
        "dns:///[::1]:50061",
        "file:replicas.txt",
        "file:/etc/replicas",
    ]
    settings = load(write(f"backends: {{mock: {{addresses: {given}}}}}\nmodels: [{{backend: mock}}]"))
    assert settings.backends["mock"].addresses == given


def test_the_first_model_that_matches_wins_and_none_means_not_served() -> None:
    settings = load(
        write("""
backends: {one: {addresses: ["h:1"]}, two: {addresses: ["h:2"]}}
models:
  - {match: {model_name: "churn-*", agent_type: buyer}, backend: one}
  - {match: {model_name: "churn-?"}, backend: two}
""")
    )
    first, second = settings.route("churn-10", "buyer"), settings.route("churn-1", "seller")
    assert first is not None
    assert second is not None
    assert (first.backend, second.backend) == ("one", "two")
    assert settings.route("churn-10", "seller") is None
    assert settings.route("Churn-1", "seller") is None


BASE = "backends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: mock}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("listen: [", "given.yaml is not YAML"),
        ("- a list", "expected a map of settings, found list"),
        ("models: [{backend: mock}]", "backends: Field required"),
        ("backends: {mock: {addresses: []}}\nmodels: [{backend: mock}]", "backends.mock.addresses: "),
        (
            "backends: {mock: {addresses: ['h']}}\nmodels: [{backend: mock}]",
            "backends.mock.addresses.0: 'h' is not HOST:PORT",
        ),
        (
            "backends: {mock: {addresses: ['dns://8.8.8.8/h:1']}}\nmodels: [{backend: mock}]",
            "backends.mock.addresses.0: 'dns://8.8.8.8/h:1' is not dns:///NAME:PORT",
        ),
        ("backends: {mock: {addresses: ['dns:///h']}}\nmodels: [{backend: mock}]", "'h' is not HOST:PORT"),
        ("backends: {mock: {addresses: ['dns:///h:0']}}\nmodels: [{backend: mock}]", "names no port to connect to"),
        ("backends: {mock: {addresses: ['file:']}}\nmodels: [{backend: mock}]", "names no file; it is file:PATH"),
        ("backends: {mock: {addresses: ['h:1'], ejection_s: 0}}\nmodels: [{backend: mock}]", "mock.ejection_s: "),
        (
            "backends: {mock: {addresses: ['h:1'], probe_interval_s: -1}}\nmodels: [{backend: mock}]",
            "probe_interval_s: ",
        ),
        (
            "backends: {mock: {addresses: ['h:1'], resolve_interval_s: 0}}\nmodels: [{backend: mock}]",
            "resolve_interval",
        ),
        (
            "backends: {mock: {addresses: ['h:1'], max_in_flight_total: 0}}\nmodels: [{backend: mock}]",
            "in_flight_total",
        ),
        ("backends: {mock: {addresses: ['h:99999']}}\nmodels: [{backend: mock}]", "no port from 0 to 65535"),
        (
            "backends: {mock: {addresses: ['h:1'], protocol: rest}}\nmodels: [{backend: mock}]",
            "backends.mock.protocol: ",
        ),
        ("backends: {mock: {addresses: ['h:1'], max_in_flight: -1}}\nmodels: [{backend: mock}]", "max_in_flight: "),
        (
            "backends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: other}]",
            "models.0.backend: no backend 'other', there are: mock",
        ),
        ("backends: {mock: {addresses: ['h:1']}}\nmodels: []", "models: "),
        (BASE + "listen: 127.0.0.1:1\nlisten: 127.0.0.1:2", "'listen' stands there more than once"),
        ("backends: {GPU: {addresses: ['h:1']}}\nmodels: [{backend: GPU}]", "backends.GPU.[key]: String should match"),
        ("backends: {mock: {addresses: ['h:1', 'h:1']}}\nmodels: [{backend: mock}]", "h:1 more than once"),
        ("backends: {mock: {addresses: ['h:0']}}\nmodels: [{backend: mock}]", "'h:0' names no port to connect to"),
        (BASE + "limits: {max_message_bytes: 2147483648}", "limits.max_message_bytes: "),
        (BASE + "limits: {max_backend_message_bytes: 8388608}", "models.0.max_batch_bytes: 8388608 does not fit into"),
        (BASE + "lisen: 127.0.0.1:1", "lisen: Extra inputs are not permitted"),
        (BASE + "default_timeout_s: 0", "default_timeout_s: Input should be greater than 0"),
        (BASE + "max_timeout_s: .nan", "max_timeout_s: "),
        (BASE + "limits: {max_keys: 0}", "limits.max_keys: "),
        (BASE + "limits: {max_tenant_rows: 0}", "limits.max_tenant_rows: "),
        (BASE + "tenant_weights: {gold: 0}", "tenant_weights.gold: "),
        (BASE + "tenant_weights: {gold: .inf}", "tenant_weights.gold: "),
        (BASE + "limits: {max_kees: 1}", "limits.max_kees: "),
        (BASE + "log_requests: some", "log_requests: "),
        (
            "backends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: mock, max_batch_size: 0}]",
            "models.0.max_batch_size: ",
        ),
        (
            "backends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: mock, max_queue_delay_s: -1}]",
            "models.0.max_queue_delay_s: ",
        ),
        (
            "backends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: mock, max_batch_sise: 1}]",
            "models.0.max_batch_sise: ",
        ),
    ],
)
def test_a_wrong_setting_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        load(write(text))
    assert message in str(wrong.value)


def test_a_file_of_comments_changes_nothing() -> None:
    assert load(write("# nothing yet")) == load()


def test_metrics_can_be_turned_off_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_METRICS", "null")
    assert load().metrics is None


def test_variables_that_name_no_setting_are_told() -> None:
    names = ["ROUTER_LISTN", "ROUTER_LISTEN", "ROUTER_LIMITS__MAX_KEYS", "PATH", "ROUTER_SERVICE_HOST"]
    assert unknown_variables(names) == ["ROUTER_LISTN", "ROUTER_SERVICE_HOST"]


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load(Path("nowhere.yaml"))


def test_broken_json_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_BACKENDS", "{")
    with pytest.raises(ConfigError, match="backends"):
        load()


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as wrong:
        load(write(BASE + "listen: x\nmetrics: y"))
    assert len(str(wrong.value).splitlines()) == 2


def test_answers_are_kept_only_where_equal_rows_have_equal_answers() -> None:
    text = "backends: {x: {addresses: [h:2]}}\nmodels: [{backend: x, cache_ttl_s: 5%s}]"
    with pytest.raises(ConfigError) as refused:
        load(write(text % ""))
    assert str(refused.value) == "models.0: cache_ttl_s: answers may be kept only where deterministic is true"
    model = load(write(text % ", deterministic: true")).route("any", "thing")
    assert model is not None
    assert (model.cache_ttl_s, model.cache_max_bytes) == (5, 16 * 1024 * 1024)
