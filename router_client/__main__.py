"""The command `inference-router`; `python -m router_client` is the same without an installed project.

What a command needs takes half a second to load. A Ctrl-C meanwhile is as quiet as one later, and `python -m
router_client health`, a container's probe that is asked every few seconds, does not wait for the others' libraries.
"""

import importlib
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command of ``sys.argv`` and return its exit code."""
    try:
        return int(importlib.import_module("router_client.cli.app").main())
    except KeyboardInterrupt:
        return INTERRUPTED


def probe() -> int:
    """Run `health` alone."""
    return int(importlib.import_module("router_client.health").main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(probe() if sys.argv[1:2] == ["health"] else main())
