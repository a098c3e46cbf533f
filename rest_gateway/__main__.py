"""`python -m rest_gateway`: read the settings, run the gateway, or several of them under a supervisor.

Exit status: 0 after a drain, 1 when the address cannot be bound or the database is not for this program, 2 for a bad
setting or argument. Under a supervisor also 1 when no worker can start, or when one got lost while it drained.
"""

import argparse
import logging.config
import socket
import sys

from rest_gateway.config import ConfigError, Settings, describe_variables, load_settings, logging_config
from rest_gateway.listener import bind
from rest_gateway.supervisor import supervise


def main(arguments: list[str] | None = None) -> int:
    """Runs until a signal; returns the exit status."""
    _parse(arguments)
    try:
        settings = load_settings()
    except ConfigError as exc:
        return _complain(f"bad setting: {exc}", 2)
    logging.config.dictConfig(logging_config(settings))
    try:
        listener = bind(settings)
    except OSError as exc:
        reason, *_ = str(exc.strerror or exc).split(" (while")  # the address again
        return _complain(f"cannot listen on {settings.listen}: {reason}", 1)
    return _supervise(settings, listener) if settings.workers > 1 else _serve(settings, listener)


def _supervise(settings: Settings, listener: socket.socket) -> int:
    try:
        return supervise(settings, listener)
    except OSError as exc:
        return _complain(f"cannot supervise {settings.workers} workers: {exc}", 1)


def _serve(settings: Settings, listener: socket.socket) -> int:
    # A supervisor must do without what this brings: 35 MB, grpc and its threads.
    from rest_gateway.app import CannotStart, run  # noqa: PLC0415

    try:
        run(settings, listener)
    except CannotStart as exc:
        return _complain(str(exc), 1)
    return 0


def _parse(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rest_gateway",
        description="The REST front of the inference router.",
        epilog="Settings are environment variables:\n" + describe_variables(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)


def _complain(text: str, status: int) -> int:
    print(f"rest_gateway: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
