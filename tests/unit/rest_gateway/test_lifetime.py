"""Who may end a request's work, and what the work sees of it."""

import asyncio
import gc
import weakref

import pytest
from starlette.types import Message

from rest_gateway.errors import ClientGoneError, ShuttingDownError
from rest_gateway.routes.lifetime import OpenRequests

pytestmark = pytest.mark.anyio


class Client:
    """The receiving end of ASGI: bodies at once, the disconnect when the test says so."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def work(requests: OpenRequests, client: Client) -> None:
    """Never ends by itself."""
    with requests.open() as lifetime:
        lifetime.watch(client.receive)
        await asyncio.Event().wait()


async def test_a_client_that_leaves_ends_the_work() -> None:
    requests, client = OpenRequests(), Client({"type": "http.request"})
    client.leaves.set()
    with pytest.raises(ClientGoneError):
        await work(requests, client)
    assert len(requests) == 0


async def test_work_that_is_done_first_knows_nothing_of_the_leaving() -> None:
    requests, client = OpenRequests(), Client()
    with requests.open() as lifetime:
        lifetime.watch(client.receive)
        await asyncio.sleep(0)
        assert len(requests) == 1
    client.leaves.set()
    await asyncio.sleep(0)
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "disconnect-watcher"] == []


async def test_end_all_ends_everyone_with_the_shutdown() -> None:
    requests = OpenRequests()
    tasks = [asyncio.create_task(work(requests, Client())) for _ in range(3)]
    await asyncio.sleep(0)
    assert len(requests) == 3
    requests.end_all()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ShuttingDownError] * 3


async def test_a_cancellation_from_outside_passes_through() -> None:
    requests = OpenRequests()
    task = asyncio.create_task(work(requests, Client()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(requests) == 0


async def test_an_ended_task_goes_on_uncancelled() -> None:
    requests = OpenRequests()
    asyncio.get_running_loop().call_soon(requests.end_all)
    asyncio.get_running_loop().call_soon(requests.end_all)
    with pytest.raises(ShuttingDownError):
        await work(requests, Client())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_request_whose_client_left_is_freed_without_the_garbage_collector() -> None:
    """The error once referred to itself through its traceback, and with it to the request's body."""

    class Body:
        pass

    async def hold(requests: OpenRequests, client: Client, body: Body) -> Body:
        with requests.open() as lifetime:
            lifetime.watch(client.receive)
            await asyncio.Event().wait()
        return body

    requests, client, body = OpenRequests(), Client(), Body()
    freed = weakref.ref(body)
    client.leaves.set()
    gc.disable()
    try:
        task = asyncio.create_task(hold(requests, client, body))
        del body
        await asyncio.wait([task])
        assert isinstance(task.exception(), ClientGoneError)
        del task
        await asyncio.sleep(0)
        assert freed() is None
    finally:
        gc.enable()
