"""The gateway's settings, from environment variables that begin with GATEWAY_, and the logging they ask for.

Knows no web framework. Units stand in the names; a bad value becomes a ConfigError of one line that names the variable.
"""

import logging
import textwrap
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "GATEWAY_"


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


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Every setting with its default; the variable of `listen` is GATEWAY_LISTEN. An empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

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
    log_format: Literal["text", "json"] = Field(default="text", description="text or json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_requests: Literal["off", "errors", "all"] = Field(
        default="errors", description="off, errors (requests that failed, wholly or in part) or all"
    )
    trust_tenant: bool = Field(default=False, description="pass the X-Tenant header on to the router")


def load_settings() -> Settings:
    """The settings of this process's environment. Raises ConfigError: one line, every bad variable."""
    try:
        return Settings()
    except ValidationError as exc:
        raise ConfigError("; ".join(map(_fault_line, exc.errors()))) from exc


def _fault_line(error: ErrorDetails) -> str:
    """`GATEWAY_MAX_AGENTS='many': Input should be a valid integer, …`."""
    variable = PREFIX + "_".join(map(str, error["loc"])).upper()
    return f"{variable}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}"


def describe_variables() -> str:
    """The table of `--help`: each variable, its default, its meaning."""
    rows = [
        f"{PREFIX + name.upper():<26}{field.description} (default {field.default})"
        for name, field in Settings.model_fields.items()
    ]
    return textwrap.indent("\n".join(rows), "  ")


class OneLineFormatter(logging.Formatter):
    """Text logs, one line per record: a traceback's line breaks are written as backslash-n."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def logging_config(settings: Settings) -> dict[str, Any]:
    """For `logging.config.dictConfig`: everything on stderr; of uvicorn only what is wrong. Workers tell their pid."""
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
        "loggers": {"uvicorn": {"level": "WARNING"}},
        "root": {"level": settings.log_level, "handlers": ["stderr"]},
    }
