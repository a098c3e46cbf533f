"""The router's settings: one YAML file, environment variables on top, validated with messages that name the field.

`ROUTER_LISTEN=0.0.0.0:50051` and `ROUTER_BACKENDS__MOCK__ADDRESSES='["mock_nn:50061"]'` override single fields; two
underscores go one level down, lists and maps are JSON. Units stand in the names.
"""

import fnmatch
import json
import re
import ssl
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

DEFAULT_FILE = Path("router.yaml")

# What runs without a file: one local backend for every model.
BUILT_IN: dict[str, Any] = {
    "backends": {"mock": {"addresses": ["127.0.0.1:50061"]}},
    "models": [{"match": {"model_name": "*", "agent_type": "*"}, "backend": "mock"}],
}


# What holds for as long as the process lives: sockets, and what was told to each stream at its beginning.
NEED_RESTART = ("listen", "metrics", "limits.max_message_bytes")

DNS_PREFIX = "dns:///"
FILE_PREFIX = "file:"


class ConfigError(Exception):
    """The settings cannot be used; the message names every field at fault."""


def _check_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+", host):
        raise ValueError(f"{address!r} is not HOST:PORT")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} has no port from 0 to 65535")
    return address


def check_remote(address: str) -> str:
    """An address to connect to, as it is. Raises ValueError."""
    if _check_address(address).endswith(":0"):
        raise ValueError(f"{address!r} names no port to connect to")
    return address


def _check_replicas(entry: str) -> str:
    if entry.startswith(FILE_PREFIX):
        if entry == FILE_PREFIX:
            raise ValueError(f"{entry!r} names no file; it is file:PATH")
    elif entry.startswith("dns:/"):
        if not entry.startswith(DNS_PREFIX):
            raise ValueError(f"{entry!r} is not dns:///NAME:PORT; another name server cannot be asked")
        check_remote(entry.removeprefix(DNS_PREFIX))
    else:
        check_remote(entry)
    return entry


def _switch(value: object) -> object:
    """YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Address = Annotated[str, AfterValidator(_check_address)]
# HOST:PORT, or where addresses come from: dns:///NAME:PORT, file:PATH.
Replicas = Annotated[str, AfterValidator(_check_replicas)]
# Environment variables have no case, so what they name has none either.
BackendName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# Further apart, and who has the least would wait for its turn for a thousand rounds.
Weight = Annotated[float, Field(ge=0.001, le=1000)]
# Triton's ModelStreamInfer, or one ModelInfer for each batch.
ProtocolName = Literal["stream", "unary"]
# gRPC counts message bytes in an int32.
MessageBytes = Annotated[int, Field(ge=1, lt=2**31)]
# What a batch's message holds beside its rows: names, shapes, parameters.
MESSAGE_OVERHEAD_BYTES = 16 * 1024


class Section(BaseModel):
    """A part of the settings; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsSettings(Section):
    """TLS towards a backend.

    `ca_file`: PEM of the authorities that its certificate may come from; null: those of the system. `cert_file` and
    `key_file`: PEM of our own certificate (with its chain) and key, for servers that ask for one. `server_name`: the
    name that its certificate bears, where that is not the host of its address; the replicas of a `dns:///` entry are IP
    addresses.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if (self.cert_file is None) is not (self.key_file is None):
            raise ValueError("cert_file and key_file: one is of no use without the other")
        check_certificates(self)
        return self


def check_certificates(tls: TlsSettings) -> None:
    """Whether the files can be read and fit together. Raises ValueError."""
    for file in (tls.ca_file, tls.cert_file, tls.key_file):
        _check_readable(file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if tls.ca_file:
            context.load_verify_locations(tls.ca_file)
    except OSError as error:
        raise ValueError(f"ca_file: {tls.ca_file} is no PEM of certificates: {error}") from error
    try:
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file, password=_refuse_password)
    except OSError as error:
        what = f"{tls.cert_file} and {tls.key_file} are no PEM of a certificate and its key"
        raise ValueError(f"cert_file, key_file: {what}: {error}") from error


def _check_readable(file: str | None) -> None:
    try:
        if file is not None:
            Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error


def _refuse_password() -> str:
    """Without it OpenSSL asks at the terminal."""
    raise ValueError("key_file: a key with a password cannot be read")


class BackendSettings(Section):
    """A pool of replicas. `max_in_flight`: batches at a time per replica and model; 0: no limit.

    `protocol`: `stream`, Triton's ModelStreamInfer, or `unary`, one ModelInfer for each batch, which every server has.
    `max_in_flight_total`: as `max_in_flight`, over all models; each batch has a stream or a call, and servers commonly
    allow no more.
    `tls`: null: plaintext; `{}`: TLS, as the system's authorities have it.
    `ejection_s`: how long a replica that fails, or is three times as slow as its peers, gets no batch the first time.
    `probe_interval_s`: how often a replica is asked whether it lives and is ready; 0: never.
    `resolve_interval_s`: how often names among the addresses are looked up again.
    `model_interval_s`: how often it is asked again about the models that are in use; 0: only once about each.
    """

    addresses: list[Replicas] = Field(min_length=1)
    protocol: ProtocolName = "stream"
    tls: TlsSettings | None = None
    max_in_flight: int = Field(4, ge=0)
    max_in_flight_total: Count = 1024
    ejection_s: PositiveSeconds = 30
    probe_interval_s: Seconds = 4
    resolve_interval_s: PositiveSeconds = 5
    model_interval_s: Seconds = 5

    @model_validator(mode="after")
    def _check_addresses(self) -> Self:
        twice = {address for address in self.addresses if self.addresses.count(address) > 1}
        if twice:
            raise ValueError(f"addresses: {', '.join(sorted(twice))} more than once")
        return self


class MatchSettings(Section):
    """Shell-style patterns, `*`, `?` and `[...]`, case-sensitive."""

    model_name: str = "*"
    agent_type: str = "*"


class ModelSettings(Section):
    """How the rows of the models that match are batched, sent and read."""

    match: MatchSettings = MatchSettings()
    backend: str
    max_batch_size: Count = 64
    max_batch_bytes: Count = 8 * 1024 * 1024
    max_queue_delay_s: Seconds = 0.002
    # Rows of class batch have the seats that interactive rows leave; after so long an eighth of the seats is theirs.
    batch_class_patience_s: Seconds = 30
    # Further attempts of a row whose batch was lost or refused; 0, for models with side effects: nothing is sent twice,
    # and a bad row takes its batch with it.
    retries: int = Field(2, ge=0, le=10)
    # Whether rows of several requests share a call; auto: as the backend tells of the model.
    batching: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    # The input tensor that native rows arrive in and its datatype (null: the model's only input, else `vector`, FP32),
    # and the output they are read from (null: `output`, else the first).
    vector_input: Annotated[str, Field(min_length=1)] | None = None
    vector_datatype: Literal["FP32", "FP64", "FP16"] | None = None
    vector_output: str | None = None
    send_agent_type: bool = True
    # Parameters of Open Inference requests, by name or pattern, that change no answer: rows share batches whatever they
    # are, and the model does not see them.
    ignore_parameters: list[Annotated[str, Field(min_length=1)]] = []
    # False: rows whose answer holds NaN or infinity fail.
    allow_nan: bool = True
    # Equal rows have equal answers: those that wait or are in flight at the same time are computed once, and answers
    # may be kept for a while, so many bytes of them per key.
    deterministic: bool = False
    cache_ttl_s: Seconds = 0
    cache_max_bytes: Count = 16 * 1024 * 1024

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache_ttl_s and not self.deterministic:
            raise ValueError("cache_ttl_s: answers may be kept only where deterministic is true")
        return self

    def matches(self, model_name: str, agent_type: str) -> bool:
        """Whether rows of this model and agent type fall under these settings."""
        return fnmatch.fnmatchcase(model_name, self.match.model_name) and fnmatch.fnmatchcase(
            agent_type, self.match.agent_type
        )


class LimitSettings(Section):
    """What one caller may ask for and what may wait; past each limit stands a clear error.

    What may wait is bounded by key (`max_queued_rows`, `max_key_bytes`), for the whole process (`max_process_rows`,
    `max_queued_bytes`) and by tenant over all keys (`max_tenant_rows`, `max_tenant_bytes`); null: no bound of its own.
    """

    max_agents: Count = 1024
    max_vector_length: Count = 65_536
    max_name_length: Count = 256
    max_message_bytes: MessageBytes = 16 * 1024 * 1024
    max_backend_message_bytes: MessageBytes = 64 * 1024 * 1024
    max_open_calls: Count = 16_384
    max_queued_rows: Count = 65_536
    max_queued_bytes: Count = 256 * 1024 * 1024
    max_key_bytes: Count | None = None
    max_process_rows: Count | None = 1_048_576
    max_tenant_rows: Count | None = None
    max_tenant_bytes: Count | None = None
    max_keys: Count = 10_000
    key_idle_s: PositiveSeconds = 600


class Settings(BaseSettings):
    """Everything the router can be told."""

    model_config = SettingsConfigDict(
        env_prefix="ROUTER_",
        env_nested_delimiter="__",
        env_parse_none_str="null",
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    listen: Address = "127.0.0.1:50051"
    # Where Prometheus scrapes; null turns it off.
    metrics: Address | None = "127.0.0.1:9091"
    backends: dict[BackendName, BackendSettings] = Field(min_length=1)
    models: list[ModelSettings] = Field(min_length=1)
    default_timeout_s: PositiveSeconds = 60
    max_timeout_s: PositiveSeconds = 600
    batch_timeout_s: PositiveSeconds = 60
    drain_delay_s: Seconds = 3
    drain_timeout_s: Seconds = 30
    # Whether callers may say whose their rows are; if not, all are of one tenant.
    trust_tenant: bool = False
    # Shares of the seats while several tenants wait; 1 for who is not named.
    tenant_weights: dict[str, Weight] = {}
    limits: LimitSettings = LimitSettings()
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    # Which requests get a line of their own.
    log_requests: Literal["off", "errors", "all"] = "errors"

    @model_validator(mode="after")
    def _check_backends(self) -> Self:
        for number, model in enumerate(self.models):
            if model.backend not in self.backends:
                known = ", ".join(sorted(self.backends))
                raise ValueError(f"models.{number}.backend: no backend {model.backend!r}, there are: {known}")
            if model.max_batch_bytes + MESSAGE_OVERHEAD_BYTES > self.limits.max_backend_message_bytes:
                limit = f"limits.max_backend_message_bytes = {self.limits.max_backend_message_bytes}"
                raise ValueError(f"models.{number}.max_batch_bytes: {model.max_batch_bytes} does not fit into {limit}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the hook's signature)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over what the file (passed as arguments) says."""
        built_in = InitSettingsSource(settings_cls, init_kwargs=BUILT_IN)
        says_nothing = isinstance(init_settings, InitSettingsSource) and not init_settings.init_kwargs
        return (env_settings, init_settings, built_in) if says_nothing else (env_settings, init_settings)

    def route(self, model_name: str, agent_type: str) -> ModelSettings | None:
        """The settings of a model's rows; the first match wins. None: the model is not served."""
        return next((model for model in self.models if model.matches(model_name, agent_type)), None)

    def find_model(self, model_name: str) -> ModelSettings | None:
        """The settings of a model for some agent type: for none, if they match that, else for the first that do."""
        by_name = (model for model in self.models if fnmatch.fnmatchcase(model_name, model.match.model_name))
        return self.route(model_name, "") or next(by_name, None)

    def model_names(self) -> list[str]:
        """The models that are named as they are, without a pattern."""
        names = (model.match.model_name for model in self.models)
        return list(dict.fromkeys(name for name in names if not set("*?[") & set(name)))

    def to_yaml(self) -> str:
        """The effective settings as a file that would give the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def find_file() -> Path | None:
    """The file that is read when none is named."""
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def load(path: Path | None = None) -> Settings:
    """Read the file (None: ./router.yaml if it is there, else the built-in defaults) and the environment.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a field is wrong.
    """
    try:
        return Settings(**_read(path or find_file()))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(one) for one in error.errors(include_url=False))) from error
    except ValueError as error:  # pydantic-settings wraps JSON that cannot be parsed
        raise ConfigError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Change:
    """One field that has another value; None where there is none."""

    field: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.field}: {_show(self.before)} -> {_show(self.after)}"


def changes(before: Settings, after: Settings) -> list[Change]:
    """The fields that differ, by their names in a file."""
    old, new = dict(_fields(before.model_dump(mode="json"))), dict(_fields(after.model_dump(mode="json")))
    names = [*old, *(name for name in new if name not in old)]
    return [Change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _fields(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every field below a value, with its dotted name; a list of plain values is one field."""
    inner: Iterable[tuple[object, object]]
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        inner = enumerate(value)
    else:
        yield name, value
        return
    for step, one in inner:
        yield from _fields(one, f"{name}.{step}" if name else str(step))


def _show(value: object) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)


def check_same_process(before: Settings, after: Settings) -> None:
    """Raise ConfigError unless a running router can go on by the new settings."""
    fixed = [change for change in changes(before, after) if change.field in NEED_RESTART]
    if fixed:
        raise ConfigError("\n".join(f"{change}: needs a restart" for change in fixed))


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.load(path.read_text(), _StrictLoader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (AttributeError, LookupError, RecursionError) as error:  # of PyYAML at `!!bool x`, or a thousand brackets
        raise ConfigError(f"{path} is not YAML that can be read: {error!r}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a map of settings, found {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


class _StrictLoader(yaml.SafeLoader):
    """YAML says that keys are unique; PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} stands there more than once{node.start_mark}")
        return super().construct_mapping(node, deep)


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Variables that begin like settings but name none: typing errors, or what Kubernetes sets for a service."""
    prefix = str(Settings.model_config["env_prefix"])
    names = [name for name in environment if name.startswith(prefix)]
    return sorted(
        name for name in names if name.removeprefix(prefix).lower().partition("__")[0] not in Settings.model_fields
    )


def _describe(error: Mapping[str, Any]) -> str:
    where = ".".join(str(step) for step in error["loc"])
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text
