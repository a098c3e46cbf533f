"""What the router's metrics say, read as Prometheus does."""

import asyncio

import httpx

# A machine under load may be late by seconds; a router that forgets never gets there.
PATIENCE_S = 30


async def until(metrics_url: str, name: str, value: float) -> None:
    """Return once the gauge has the value."""
    async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(PATIENCE_S):
        while read((await http.get(metrics_url)).text, name) != value:
            pass


def read(text: str, name: str) -> float:
    """The value of a metric without labels."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.removeprefix(name))
