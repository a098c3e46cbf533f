"""Settings: defaults, file, environment, and messages that name the field."""

from pathlib import Path

import pytest
import trustme
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import ValidationError

from router.config import BUILT_IN, ConfigError, Settings, TlsSettings, load, unknown_variables

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


@pytest.mark.parametrize(
    ("told", "batching"), [("on", "on"), ("off", "off"), ("'off'", "off"), ("auto", "auto"), ("true", "on")]
)
def test_yaml_reads_on_and_off_as_something_else_than_they_are_meant(told: str, batching: str) -> None:
    settings = load(write(f"backends: {{mock: {{addresses: ['h:1']}}}}\nmodels: [{{backend: mock, batching: {told}}}]"))
    assert settings.models[0].batching == batching
    assert load(write(settings.to_yaml())) == settings


def test_a_model_is_found_by_its_name_whatever_its_agent_type() -> None:
    settings = load(
        write("""
backends: {one: {addresses: ["h:1"]}}
models:
  - {match: {model_name: "churn", agent_type: buyer}, backend: one, max_batch_size: 1}
  - {match: {model_name: "churn", agent_type: ""}, backend: one, max_batch_size: 2}
  - {match: {model_name: "fraud", agent_type: buyer}, backend: one, max_batch_size: 3}
  - {match: {model_name: "x*", agent_type: buyer}, backend: one}
""")
    )
    found = [settings.find_model(name) for name in ("churn", "fraud", "other")]
    assert [model and model.max_batch_size for model in found] == [2, 3, None]
    assert settings.model_names() == ["churn", "fraud"]


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


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A certificate with its key, another key, an encrypted one, and a file that is none of that."""
    authority = trustme.CA()
    one, other = authority.issue_cert("a.test"), authority.issue_cert("b.test")
    contents = {
        "ca": authority.cert_pem.bytes(),
        "cert": one.cert_chain_pems[0].bytes(),
        "key": one.private_key_pem.bytes(),
        "other_key": other.private_key_pem.bytes(),
        "nothing": b"nothing",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in [*contents, "absent"]}


def with_tls(**tls: str) -> Settings:
    backend = {"addresses": ["h:1"], "tls": tls}
    return Settings(backends={"b": backend}, models=[{"backend": "b"}])  # type: ignore[dict-item, list-item]


def test_tls_is_off_and_without_files_as_the_system_has_it(files: dict[str, str]) -> None:
    assert Settings(**BUILT_IN).backends["mock"].tls is None
    assert with_tls().backends["b"].tls == TlsSettings()
    everything = with_tls(ca_file=files["ca"], cert_file=files["cert"], key_file=files["key"], server_name="a.test")
    tls = everything.backends["b"].tls
    assert tls is not None
    assert (tls.ca_file, tls.server_name) == (files["ca"], "a.test")


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ({"ca_file": "absent"}, "absent: No such file or directory"),
        ({"ca_file": "nothing"}, "nothing is no PEM of certificates"),
        ({"cert_file": "cert"}, "one is of no use without the other"),
        ({"key_file": "key"}, "one is of no use without the other"),
        ({"cert_file": "cert", "key_file": "absent"}, "absent: No such file or directory"),
        ({"cert_file": "cert", "key_file": "other_key"}, "are no PEM of a certificate and its key"),
        ({"cert_file": "nothing", "key_file": "key"}, "are no PEM of a certificate and its key"),
    ],
)
def test_certificates_that_cannot_be_used_are_refused_at_once(
    tls: dict[str, str], message: str, files: dict[str, str]
) -> None:
    with pytest.raises(ValidationError, match=message):
        with_tls(**{name: files[file] for name, file in tls.items()})


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(files: dict[str, str]) -> None:
    key = load_pem_private_key(Path(files["key"]).read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    Path(files["key"]).write_bytes(locked)
    with pytest.raises(ValidationError, match="a key with a password cannot be read"):
        with_tls(cert_file=files["cert"], key_file=files["key"])
