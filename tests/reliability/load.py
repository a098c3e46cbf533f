"""Callers: those who come whatever happens, and those who ask again when they are answered."""

import asyncio
import random
from collections.abc import Callable

from tests.reliability.ledger import Call


async def open_loop(rate: float, seconds: float, rng: random.Random, ask: Callable[[], object]) -> None:
    """Poisson arrivals, `rate` calls a second. What is due while the loop sleeps is asked at once when it wakes."""
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    due_s = rng.expovariate(rate)
    while due_s < seconds:
        await asyncio.sleep(max(due_s - (loop.time() - begun_at), 0.0))
        while due_s <= loop.time() - begun_at and due_s < seconds:
            ask()
            due_s += rng.expovariate(rate)
    await asyncio.sleep(max(seconds - (loop.time() - begun_at), 0.0))


async def closed_loop(callers: int, seconds: float, ask: Callable[[], Call]) -> None:
    """Each asks again as soon as he is answered."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + seconds

    async def call_again_and_again() -> None:
        while loop.time() < ends_at:
            await ask().ended

    await asyncio.gather(*(call_again_and_again() for _ in range(callers)))
