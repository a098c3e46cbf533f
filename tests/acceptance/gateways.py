"""Gateways as a user starts them, read by their log lines."""

import asyncio
import contextlib
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import httpx

from tests.acceptance.databases import NO_DATABASE, new_database


class Gateway:
    """A running gateway; its log is read line by line."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = ""

    async def read_until(self, text: str) -> str:
        """The next line that holds the text."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode().rstrip("\n"))
            if text in self.log[-1]:
                return self.log[-1]
        raise AssertionError(f"the process ended without a line with {text!r}: {self.log}")

    async def exit_status(self) -> int:
        assert self.process.stderr is not None
        self.log += (await self.process.stderr.read()).decode().splitlines()
        return await self.process.wait()

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, trust_env=False)


def environment(**variables: str) -> dict[str, str]:
    """The test's own environment without its gateway, with these GATEWAY_ variables and a database of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    inherited["DATABASE_URL"] = NO_DATABASE if "WORKERS" in variables else new_database()
    quick = {"LISTEN": "127.0.0.1:0", "DRAIN_DELAY_S": "0", "ROUTER": "127.0.0.1:1", "ROUTER_WAIT_S": "0.1"}
    return inherited | {f"GATEWAY_{name}": value for name, value in (quick | variables).items()}


async def start(*arguments: str, **variables: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rest_gateway", *arguments, env=environment(**variables), stdout=PIPE, stderr=PIPE
    )


@contextlib.asynccontextmanager
async def gateway_with(**variables: str) -> AsyncIterator[Gateway]:
    gateway = Gateway(await start(**variables))
    try:
        line = await gateway.read_until("listening on ")
        gateway.url = re.findall(r"http://[^\s,\"]+", line)[0]
        yield gateway
    finally:
        if gateway.process.returncode is None:
            gateway.process.kill()
        await gateway.process.communicate()
