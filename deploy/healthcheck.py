"""Is the program in this container well? The image's HEALTHCHECK: `python -m deploy.healthcheck`.

One image runs every program, so this looks at what process 1 was started with, and where it listens:

| program      | asked                             | at                                          |
|--------------|-----------------------------------|---------------------------------------------|
| router       | grpc.health.v1, whether it serves | ROUTER_LISTEN                               |
| mock_nn      | the same                          | its --listen                                |
| rest_gateway | GET /healthz                      | GATEWAY_LISTEN                              |
| others       | nothing: alive is well            | they serve nobody                           |

Each says no while it drains or hangs, none because something behind it is away: that is no reason to restart it.
Prints one line; the exit code is 0 or 1, as Docker has it.
"""

import http.client
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from router_client.health import check

TIMEOUT_S = 4.0  # below the 5 s of the Dockerfile, so that it says why
VARIABLES = {"router": ("ROUTER_LISTEN", "127.0.0.1:50051"), "rest_gateway": ("GATEWAY_LISTEN", "127.0.0.1:8000")}
MOCK_LISTEN = "127.0.0.1:50061"
ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 -- read, not bound


class Probe(NamedTuple):
    """Whom to ask, and where."""

    program: str
    address: str


def choose_probe(command: Sequence[str], environment: Mapping[str, str]) -> Probe | None:
    """Read `… -m PROGRAM ARGUMENTS…`, an init in front or not. None: the program serves nobody."""
    _, *arguments = command[command.index("-m") :] if "-m" in command else [""]
    program = arguments[0] if arguments else ""
    if program == "mock_nn":
        return Probe(program, _reachable(_read_listen(arguments) or MOCK_LISTEN))
    if program in VARIABLES:
        variable, default = VARIABLES[program]
        return Probe(program, _reachable(environment.get(variable) or default))
    return None


def _read_listen(arguments: Sequence[str]) -> str | None:
    """The last `--listen ADDRESS` or `--listen=ADDRESS`, as argparse takes it."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--listen":
            found = following
        elif argument.startswith("--listen="):
            found = argument.removeprefix("--listen=")
    return found


def _reachable(address: str) -> str:
    """The address as a client in the same container writes it."""
    host, _, port = address.rpartition(":")
    return f"{ANY_HOST.get(host, host)}:{port}"


def ask(probe: Probe) -> tuple[bool, str]:
    """Whether the program is well, and its answer in a few words."""
    if probe.program != "rest_gateway":
        status = check(probe.address, TIMEOUT_S)
        return status == "SERVING", status
    # Not urllib: it would take the request to the proxy of http_proxy.
    connection = http.client.HTTPConnection(probe.address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        status_code = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        return False, f"{type(exc).__name__}: {exc}"
    finally:
        connection.close()
    return status_code == http.client.OK, str(status_code)


def main() -> int:
    """Ask process 1's program; 0 when it is well."""
    command = pathlib.Path("/proc/1/cmdline").read_text().split("\0")
    probe = choose_probe(command, os.environ)
    if probe is None:
        print("no server to ask")
        return 0
    is_well, answer = ask(probe)
    print(f"{probe.program} at {probe.address}: {answer}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
