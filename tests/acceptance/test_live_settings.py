"""The router's settings change under load, by SIGHUP and by a changed file: nothing is lost, nothing is mixed up."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client import RouterClient
from tests.acceptance.processes import Program, running
from tests.integration.stack import block, floats, truth

pytestmark = pytest.mark.anyio

CALLERS = 24
ROWS = 3


class Load:
    """Callers in a closed loop; every row is another, and every answer is compared with the mock's function."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client
        self._rows = 0
        self.answered = 0
        self.faults: list[object] = []
        self._progress = asyncio.Condition()
        self._is_over = False

    async def call(self) -> None:
        """Until `end`."""
        while not self._is_over:
            rows = [[float(self._rows + number), 1.0] for number in range(ROWS)]
            self._rows += ROWS
            self._judge(rows, await self._client.infer([block("churn", rows)], timeout_s=30))
            async with self._progress:
                self.answered += 1
                self._progress.notify_all()

    def _judge(self, rows: Sequence[Sequence[float]], answers: Sequence[pb.Answer]) -> None:
        right, seen = truth("churn", rows), [False] * ROWS
        for answer in answers:
            places = range(answer.first_row, answer.first_row + answer.rows)
            if answer.HasField("error") or floats(answer.outputs) != [right[place] for place in places]:
                self.faults.append(answer)
            for place in places:
                seen[place] = True
        if not all(seen):
            self.faults.append(answers)

    async def more(self, calls: int = 4 * CALLERS) -> None:
        """Return when so many more calls are answered."""
        goal = self.answered + calls
        async with asyncio.timeout(60), self._progress:
            await self._progress.wait_for(lambda: self.answered >= goal)

    def end(self) -> None:
        self._is_over = True


@asynccontextmanager
async def load_on(address: str) -> AsyncIterator[Load]:
    async with RouterClient(address) as client:
        load = Load(client)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS):
                tasks.create_task(load.call())
            try:
                yield load
            finally:
                load.end()


class File:
    """The router's file; a change is written beside it and renamed over it."""

    def __init__(self, path: Path, addresses: Sequence[str]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "metrics": None,
            "drain_delay_s": 0,
            "backends": {"mock": {"addresses": list(addresses), "max_in_flight": 2}},
            "models": [{"backend": "mock", "max_batch_size": 8}],
        }
        self.write()

    def write(self, text: str | None = None) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(yaml.safe_dump(self.content) if text is None else text)
        beside.rename(self.path)


async def told(program: Program, pattern: str) -> str:
    """The next line of the router's log that matches."""
    return (await asyncio.to_thread(program.wait_for, pattern)).string


@pytest.mark.parametrize("how", ["SIGHUP", "the changed file alone"])
async def test_settings_change_under_load_and_no_row_is_lost(how: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        mocks = [
            stack.enter_context(running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "0.02")) for _ in range(3)
        ]
        one, two, three = [(await told(mock, r"listening on \S+")).split()[-1] for mock in mocks]
        file = File(tmp_path / "router.yaml", [one])
        router = stack.enter_context(running("router", "--config", str(file.path)))
        address = (await told(router, "router listens on")).split()[-1]

        async def change(pattern: str, text: str | None = None) -> str:
            file.write(text)
            if how == "SIGHUP":
                router.send(signal.SIGHUP)
            return await told(router, pattern)

        async with load_on(address) as load:
            await load.more()
            mock = file.content["backends"]["mock"]
            mock["addresses"] = [one, two]
            line = await change("settings changed")
            assert f'backends.mock.addresses: ["{one}"] -> ["{one}", "{two}"]' in line
            await load.more()
            assert "settings refused, the old ones stay: models: Field required" in await change(
                "settings refused", "backends: {mock: {addresses: ['127.0.0.1:1']}}"
            )
            await load.more()
            file.content["listen"] = "127.0.0.1:1"
            assert 'listen: "127.0.0.1:0" -> "127.0.0.1:1": needs a restart' in await change("settings refused")
            file.content["listen"] = "127.0.0.1:0"
            mock["addresses"] = [two]
            mock["max_in_flight"] = 4
            file.content["models"][0] |= {"max_batch_size": 16, "retries": 1}
            await change("settings changed")
            await load.more()
            mocks[0].send(signal.SIGTERM)  # nothing is there any more
            file.content["backends"]["other"] = {"addresses": [three]}
            file.content["models"][0]["backend"] = "other"
            await change("settings changed")
            await load.more()
            del file.content["backends"]["mock"]
            await change("settings changed")
            await told(router, "backend mock: the replicas it had before are closed")
            mocks[1].send(signal.SIGTERM)
            await load.more()
        assert load.faults == []
        router.send(signal.SIGTERM)
        assert await asyncio.to_thread(router.wait) == 0
        assert not any("Traceback" in line for line in router.lines)
        print(f"{how}: {load.answered} calls of {ROWS} rows over 5 changes and 2 refusals, 0 lost")


async def test_logs_change_with_the_settings(tmp_path: Path) -> None:
    file = File(tmp_path / "router.yaml", ["127.0.0.1:1"])
    with running("router", "--config", str(file.path)) as router:
        await told(router, "router listens on")
        file.content["log_format"] = "json"
        file.write()
        router.send(signal.SIGHUP)
        assert '"message": "settings changed: log_format: \\"text\\" -> \\"json\\""' in await told(router, "log_format")
        router.send(signal.SIGTERM)
        assert await asyncio.to_thread(router.wait) == 0


async def test_sighup_without_a_file_changes_nothing(tmp_path: Path) -> None:
    with running("router", ROUTER_LISTEN="127.0.0.1:0", ROUTER_METRICS="null") as router:
        await told(router, "router listens on")
        router.send(signal.SIGHUP)
        await told(router, "settings were read again; nothing has changed")
        router.send(signal.SIGTERM)
        assert await asyncio.to_thread(router.wait) == 0
