"""Whole processes and gRPC in the tests themselves: one loop, for the reason told in tests/integration."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.lasting_loop import LASTING_LOOP


@pytest.fixture(scope="package")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return LASTING_LOOP


@pytest.fixture(scope="package", autouse=True)
async def _one_loop(anyio_backend: tuple[str, dict[str, Any]]) -> AsyncIterator[None]:
    """AnyIO keeps the loop for as long as an async fixture of this scope lives."""
    yield  # noqa: PT022 -- a fixture that returns would not keep it
