"""`python -m rest_gateway.worker`: one of several gateway processes on one port. Only the supervisor starts it.

It serves as a gateway alone does, on a listening socket that it was born with. What differs:

* A signal drains it, further ones change nothing: a signal to the whole group and the supervisor's own SIGTERM are one
  wish. It never sees a SIGINT, which the supervisor has blocked for it. Who wants it gone at once sends SIGKILL.
* Draining, it closes no more than its own copy of the socket. The others go on, or the supervisor shuts the door.
* The lifeline, a socket to the supervisor, ends with the supervisor, however that dies. Then the worker closes the port
  at once, for the next supervisor to take it, and answers what was accepted; in the midst of a drain it leaves.
"""

import asyncio
import contextlib
import functools
import logging.config
import os
import socket
import sys
from types import FrameType

from fastapi import FastAPI

from rest_gateway.app import CannotStart, Server, run
from rest_gateway.config import Settings, load_settings, logging_config
from rest_gateway.metrics import join_workers
from rest_gateway.routes.lifetime import OpenRequests

logger = logging.getLogger("rest_gateway.worker")  # not __main__


class WorkerServer(Server):
    """A server that shares its listening socket."""

    def __init__(
        self, app: FastAPI, settings: Settings, open_requests: OpenRequests, *, lifeline: socket.socket
    ) -> None:
        super().__init__(app, settings, open_requests)
        self._lifeline = lifeline
        self._is_orphan = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells the supervisor when it serves."""
        await super().startup(sockets)
        self._lifeline.setblocking(False)
        asyncio.get_running_loop().add_reader(self._lifeline, self._on_orphaned)
        with contextlib.suppress(OSError):  # a supervisor that is gone is noticed by the reader
            self._lifeline.send(b"!")

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """However often: drain."""
        self._loop.call_soon_threadsafe(self.start_drain)

    def refuse_new(self) -> None:
        """The socket is the other workers' too, unless all are about to leave."""
        if self._is_orphan:
            super().refuse_new()

    def _on_orphaned(self) -> None:
        """The supervisor sends nothing: there is something to read when it is gone."""
        asyncio.get_running_loop().remove_reader(self._lifeline)
        if self.is_draining:
            os._exit(1)
        logger.error("the supervisor is gone")
        self._is_orphan = True
        self.start_drain(delay_s=0)


def main() -> int:
    """Arguments: the worker's number, and the file descriptors of the listening socket and of the lifeline."""
    number, listener, lifeline = map(int, sys.argv[1:])
    settings = load_settings()
    logging.config.dictConfig(logging_config(settings))
    join_workers(number)
    server = functools.partial(WorkerServer, lifeline=socket.socket(fileno=lifeline))
    try:
        run(settings, socket.socket(fileno=listener), server)
    except CannotStart as exc:
        logger.critical("cannot start: %s", exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
