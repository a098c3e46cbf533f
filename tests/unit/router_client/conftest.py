"""Async unit tests of the client run in virtual time."""

from typing import Any

import pytest

from tests.virtual_time import VIRTUAL_TIME


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return VIRTUAL_TIME
