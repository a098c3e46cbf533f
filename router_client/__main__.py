"""`python -m router_client`: the same as `inference-router`, without an installed project.

`health ADDRESS` is a container's probe, asked every few seconds: it must not wait for the libraries of the others.
"""

import importlib
import sys
from collections.abc import Sequence

from router_client import health


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, ``sys.argv`` by default, and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["health"]:
        return health.main(given)
    return int(importlib.import_module("router_client.cli.app").main(given))


if __name__ == "__main__":
    sys.exit(main())
