"""Run the router: `python -m router [--config FILE] [--check-config]`."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop
from pythonjsonlogger.json import JsonFormatter

from router.config import ConfigError, Settings, load, unknown_variables
from router.reload import Reloader
from router.server import RouterServer, StartError

logger = logging.getLogger("router")


class OneLine(logging.Formatter):
    """Text, one line a record, whatever a caller's request id or a model's error holds."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its request id, if it has one; tracebacks follow on lines of their own."""
        request_id = getattr(record, "request_id", None)
        text = record.getMessage() + (f" request_id={request_id}" if request_id else "")
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {text}"
        if not line.isprintable():
            line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(settings: Settings) -> None:
    """One handler on stderr, as text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    json_fields = "{asctime}{levelname}{name}{message}"
    handler.setFormatter(JsonFormatter(json_fields, style="{") if settings.log_format == "json" else OneLine())
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)


async def serve(settings: Settings, path: Path | None) -> None:
    """Run until the first SIGTERM or SIGINT, then drain and end the process; a second one ends it at once.

    SIGHUP, or a change of the file at `path`, loads the settings anew.
    """
    server = RouterServer(settings)
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if leave.is_set():
            os._exit(128 + number)
        leave.set()

    def apply(changed: Settings) -> None:
        server.apply(changed)
        configure_logging(changed)

    reloader = Reloader(path, settings, apply, server.metrics)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, reloader.ask)
    try:
        await server.start()
        reloading = loop.create_task(reloader.run(), name="reload")
        await leave.wait()
        reloading.cancel()
        await server.drain()
    except BaseException:
        await server.stop()
        raise
    await server.leave()
    logging.shutdown()
    os._exit(0)


def main() -> None:
    """Parse the command line, read the settings, run."""
    parser = argparse.ArgumentParser(prog="python -m router", description="The inference router.")
    parser.add_argument("--config", type=Path, help="YAML file (default: ./router.yaml if it is there)")
    parser.add_argument("--check-config", action="store_true", help="print the effective settings and exit")
    arguments = parser.parse_args()
    try:
        settings = load(arguments.config)
        if arguments.check_config:
            print(settings.to_yaml(), end="")
            return
        configure_logging(settings)
        for name in unknown_variables(os.environ):
            logger.warning("environment variable %s names no setting and is ignored", name)
        run(settings, arguments.config)
    except ConfigError as error:
        sys.exit(_complain(str(error), 2))
    except StartError as error:
        sys.exit(_complain(str(error), 1))


def run(settings: Settings, path: Path | None) -> None:
    """Serve on uvloop: a fifth less CPU."""
    _calm_garbage_collector()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, path))


def _calm_garbage_collector() -> None:
    """Leave out what was imported, and look less often: 64 calls alone make more objects than the default of 700.

    Nothing of ours is in a cycle once a call is answered. gRPC leaves one of 15 objects for each RPC that is no call of
    a stream, some 4 KiB with its request, so with 20,000 megabytes would wait to be collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 20, 20)


def _complain(text: str, status: int) -> int:
    for line in text.splitlines():
        print(f"router: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
