"""The gateway's settings, from DATABASE_URL and the variables that begin with GATEWAY_, and the logging they ask for.

Knows no web framework. Units stand in the names; a bad value becomes a ConfigError of one line that names the variable.
"""

import logging
import re
import textwrap
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "GATEWAY_"
# Other programs read it too, so it has no prefix.
DATABASE_URL = "DATABASE_URL"


class ConfigError(ValueError):
    """The environment holds a value that the gateway cannot use; the text names the variables."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host stands in brackets: `[::1]:8000`."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError("must be host:port, such as 127.0.0.1:8000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_address(address: str) -> str:
    split_address(address)
    return address


def _check_target(target: str) -> str:
    """gRPC takes any name for a target and looks for it for ever; what cannot be one is told at the start."""
    scheme, separator, rest = target.partition(":")
    is_uri = scheme in ("dns", "ipv4", "ipv6", "unix", "unix-abstract") and separator and rest
    if "://" in target and not is_uri:
        raise ValueError("must be host:port or a gRPC target such as dns:///name:port, not a URL")
    if not is_uri:
        split_address(target)
    return target


def _check_database_url(url: str) -> str:
    if not re.match(r"(sqlite(\+\w+)?:///.|postgres(ql)?(\+\w+)?://.)", url):
        raise ValueError("must begin with sqlite:/// (and a path) or postgresql://")
    return url


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Span = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # seconds
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Every setting with its default; the variable of `listen` is GATEWAY_LISTEN. An empty variable counts as unset."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    listen: Annotated[str, AfterValidator(_check_address)] = Field(
        default="127.0.0.1:8000", description="address to serve on"
    )
    router: Annotated[str, AfterValidator(_check_target)] = Field(
        default="127.0.0.1:50051", description="gRPC target of the router"
    )
    workers: Count = Field(default=1, description="processes that serve it; more than 1 under a supervisor")
    router_wait_s: Seconds = Field(default=2.0, description="seconds that a request waits for a router that is away")
    drain_delay_s: Seconds = Field(
        default=1.0, description="seconds between the signal and closing the listening socket"
    )
    drain_timeout_s: Seconds = Field(
        default=30.0, description="seconds after that in which accepted requests are answered"
    )
    max_body_bytes: Count = Field(default=8 * 2**20, description="bytes of a request body; past it 413")
    max_agents: Count = Field(default=1024, description="agents of a request; past it 422")
    max_vector_length: Count = Field(default=65_536, description="values of a vector; past it 422 for the agent")
    max_name_length: Count = Field(default=256, description="characters of a name, model or agent type")
    max_text_length: Count = Field(default=10_000, description="characters of a text; past it 422")
    database_url: Annotated[str, AfterValidator(_check_database_url)] = Field(
        default="sqlite:///./var/jobs.sqlite3",
        validation_alias=DATABASE_URL,
        repr=False,  # it may hold a password
        description="where jobs are kept: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME",
    )
    migrate: bool = Field(default=True, description="bring the database's tables up to date at the start")
    job_concurrency: Count = Field(default=256, description="jobs that one process runs at a time")
    job_timeout_s: Span = Field(default=3600.0, description="seconds after which a job that has not ended fails")
    job_retention_s: Span = Field(default=86_400.0, description="seconds for which a job is kept after its end")
    job_max_waiting: Count = Field(default=100_000, description="jobs that may wait; past it 429")
    log_format: Literal["text", "json"] = Field(default="text", description="text or json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_requests: Literal["off", "errors", "all"] = Field(
        default="errors", description="off, errors (requests that failed, wholly or in part) or all"
    )
    trust_tenant: bool = Field(
        default=False, description="believe the X-Tenant header: pass it on to the router, keep tenants' jobs apart"
    )

    @model_validator(mode="after")
    def _share_only_a_server(self) -> Self:
        """An SQLite file belongs to one process."""
        if self.workers > 1 and self.database_url.startswith("sqlite"):
            raise ValueError(
                f"{PREFIX}WORKERS={self.workers} needs a database that several processes can share: "
                f"set {DATABASE_URL}=postgresql://..., or {PREFIX}WORKERS=1"
            )
        return self


def load_settings() -> Settings:
    """The settings of this process's environment. Raises ConfigError: one line, every bad variable."""
    try:
        return Settings()
    except ValidationError as exc:
        raise ConfigError("; ".join(map(_fault_line, exc.errors()))) from exc


def _fault_line(error: ErrorDetails) -> str:
    """`GATEWAY_MAX_AGENTS='many': Input should be a valid integer, …`."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # what fits not together
        return message
    name = "_".join(map(str, error["loc"]))
    if name == DATABASE_URL:  # its value may hold a password
        return f"{name}: {message}"
    return f"{PREFIX}{name.upper()}={error['input']!r}: {message}"


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return DATABASE_URL if name == "database_url" else PREFIX + name.upper()


def describe_variables() -> str:
    """The table of `--help`: each variable, its default, its meaning."""
    rows = [
        f"{variable_of(name):<26}{field.description} (default {field.default})"
        for name, field in Settings.model_fields.items()
    ]
    return textwrap.indent("\n".join(rows), "  ")


class OneLineFormatter(logging.Formatter):
    """Text logs, one line per record: a traceback's line breaks are written as backslash-n."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def logging_config(settings: Settings) -> dict[str, Any]:
    """For `dictConfig`: everything on stderr; of uvicorn and Alembic only what is wrong. Workers tell their pid."""
    pid = " [%(process)d]" if settings.workers > 1 else ""
    formatters = {
        "text": {"()": OneLineFormatter, "format": f"%(asctime)s %(levelname)s{pid} %(name)s: %(message)s"},
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "format": f"%(asctime)s %(levelname)s{pid} %(name)s %(message)s",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"}
            | ({"process": "pid"} if pid else {}),
        },
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatters[settings.log_format]},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {name: {"level": "WARNING"} for name in ("uvicorn", "alembic")},
        "root": {"level": settings.log_level, "handlers": ["stderr"]},
    }
