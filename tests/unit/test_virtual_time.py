"""The virtual clock itself."""

import asyncio
from typing import Any

import pytest

from tests.virtual_time import VIRTUAL_TIME


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return VIRTUAL_TIME


@pytest.mark.anyio
async def test_a_hundred_ten_minute_sleeps_take_ten_virtual_minutes() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.gather(*(asyncio.sleep(600) for _ in range(100)))
    assert loop.time() - started == 600


@pytest.mark.anyio
async def test_waiting_for_nothing_is_told_as_a_deadlock() -> None:
    loop = asyncio.get_running_loop()
    selector_timeout_of_a_loop_without_timers = None
    with pytest.raises(RuntimeError, match="deadlock"):
        loop._selector.select(selector_timeout_of_a_loop_without_timers)  # type: ignore[attr-defined]  # noqa: SLF001
