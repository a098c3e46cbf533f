"""Whole processes and gRPC in the tests themselves: one loop, for the reason told in tests/integration."""

from collections.abc import AsyncIterator

import pytest


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package", autouse=True)
async def _one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """AnyIO keeps the loop for as long as an async fixture of this scope lives."""
    yield  # noqa: PT022 -- a fixture that returns would not keep it
