"""`python -m mock_nn`: flags, log lines, signals and exit codes around one MockServer.

Exit codes: 0 drained, 1 the address cannot be had or a second signal came, 2 bad flags, 70 a crash fault.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from typing import NoReturn

import uvloop

from mock_nn.config import MockConfig, parse_config
from mock_nn.server import ListenError, MockServer

log = logging.getLogger("mock_nn")


def main() -> int:
    """Run until a signal; return the exit code."""
    config = parse_config(sys.argv[1:])
    _set_up_logging(config.log_format)
    try:
        uvloop.run(_serve(config))
    except ListenError as error:
        log.error("%s", error)  # noqa: TRY400 -- one clear line, no traceback
        return 1
    return 0


async def _serve(config: MockConfig) -> None:
    server = MockServer(config)
    is_told_to_stop = _watch_signals()
    await server.start()
    log.info("listening on %s", server.address)
    await is_told_to_stop.wait()
    log.info("draining")
    await server.drain()
    log.info("stopped")


def _watch_signals() -> asyncio.Event:
    """The first SIGTERM or SIGINT sets the event; the second leaves at once."""
    is_told_to_stop = asyncio.Event()

    def on_signal() -> None:
        if is_told_to_stop.is_set():
            _leave()
        is_told_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return is_told_to_stop


def _leave() -> NoReturn:
    log.warning("second signal, leaving at once")
    os._exit(1)


def _set_up_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMATTERS[log_format]())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _fields(record: logging.LogRecord) -> dict[str, str | int | float]:
    """What `extra={"fields": …}` brought along."""
    fields: dict[str, str | int | float] = getattr(record, "fields", {})
    return fields


class _TextFormatter(logging.Formatter):
    """`2025-01-31 12:00:00,000 INFO mock_nn batch model='m' rows=3 …`; repr() keeps odd names on the line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s mock_nn %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's name
        fields = (f" {name}={value!r}" for name, value in _fields(record).items())
        return super().formatMessage(record) + "".join(fields)


class _JsonFormatter(logging.Formatter):
    """`{"time": "…", "level": "INFO", "message": "batch", "model": "m", "rows": 3, …}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        return json.dumps(line | _fields(record))


_FORMATTERS: dict[str, type[logging.Formatter]] = {"text": _TextFormatter, "json": _JsonFormatter}


if __name__ == "__main__":
    sys.exit(main())
