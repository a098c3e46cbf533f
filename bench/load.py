"""A load process: `python -m bench.load`. It takes orders on stdin and reports on stdout until stdin ends (orders.py).

The bench starts as many as it needs, once, and they live as long as it does; each order has connections of its own.
"""

import asyncio
import gc
import sys
import time

import uvloop

from bench.clients import Client, make_client
from bench.orders import Order, Ready, Report, Window, from_line, to_line
from bench.workloads import WORKLOADS

FAILURE_PAUSE_S = 0.05
TICK_S = 0.001


class Load:
    """The callers of one order inside of one window."""

    def __init__(self, client: Client, order: Order, window: Window) -> None:
        self._client = client
        self._order = order
        self._window = window
        self._variants = WORKLOADS[order.workload].variants
        self._report = Report()
        self._failures: list[str] = []

    async def run(self) -> Report:
        """Return when the window is over and everything that was asked is answered."""
        if self._order.rate_per_s:
            await self._arrive()
        else:
            await asyncio.gather(*(self._call_again_and_again(number) for number in range(self._order.callers)))
        failure = self._failures[0] if self._failures else ""
        return Report(self._report.latencies_us, len(self._failures), failure)

    async def _call_again_and_again(self, number: int) -> None:
        while (asked := time.monotonic()) < self._window.end:
            if await self._is_answered(number % self._variants):
                answered = time.monotonic()
                if self._window.begin <= answered < self._window.end:
                    self._report.latencies_us.append(round((answered - asked) * 1e6))
            else:
                await asyncio.sleep(FAILURE_PAUSE_S)
            if self._order.pause_s:
                await asyncio.sleep(self._order.pause_s)

    async def _arrive(self) -> None:
        """Begin each call when it is due; the wait for the next one is 1 ms, so calls begin in bunches of a few."""
        async with asyncio.TaskGroup() as calls:
            begun = 0
            while (now := time.monotonic()) < self._window.end:
                due = int((now - self._window.begin) * self._order.rate_per_s)
                for number in range(begun, due):
                    calls.create_task(self._call_once(number), name=f"call {number}")
                begun = max(begun, due)
                await asyncio.sleep(TICK_S)

    async def _call_once(self, number: int) -> None:
        asked = time.monotonic()
        if await self._is_answered(number % self._variants):
            self._report.latencies_us.append(round((time.monotonic() - asked) * 1e6))

    async def _is_answered(self, variant: int) -> bool:
        try:
            await self._client.ask(variant)
        except Exception as exc:  # noqa: BLE001 -- whatever it is, it is a failed request and part of the result
            self._failures.append(f"{type(exc).__name__}: {exc}")
            return False
        return True


def main() -> int:
    """Serve orders; 0 when there are no more."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        while line := sys.stdin.readline():
            _serve(runner, from_line(Order, line))
    return 0


def _serve(runner: asyncio.Runner, order: Order) -> None:
    """Between two steps the loop stands still; nothing is on its way then."""
    client = runner.run(_connected(order))
    try:
        _say(Ready())
        window = from_line(Window, sys.stdin.readline())
        gc.collect()
        _say(runner.run(Load(client, order, window).run()))
    finally:
        runner.run(client.aclose())


async def _connected(order: Order) -> Client:
    client = make_client(order)
    await client.open()
    return client


def _say(message: Ready | Report) -> None:
    sys.stdout.write(to_line(message))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
