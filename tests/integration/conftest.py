"""Integration tests run on the real asyncio loop, all of them on one.

gRPC keeps a single completion queue for the process. An event of a loop that is closed by then (the end of a cancelled
call, say) is handed to whichever loop is running, which fails with "Event loop is closed" in the middle of the next
test. One loop for the package leaves no such events; it is the package's and not the session's because the unit tests
have loops of their own.
"""

from collections.abc import AsyncIterator

import pytest


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package", autouse=True)
async def _one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """AnyIO keeps the loop for as long as an async fixture of this scope lives."""
    yield  # noqa: PT022 -- a fixture that returns would not keep it
