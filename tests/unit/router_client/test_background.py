"""The loop in a thread of its own: threads, interrupts, iterators, forks."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor

import pytest

from router_client.background import BackgroundLoop, shared_loop


@pytest.fixture
def loop() -> BackgroundLoop:
    return shared_loop()


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


def test_many_threads_use_one_loop(loop: BackgroundLoop) -> None:
    assert shared_loop() is loop
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda number: loop.run(add(number, 1)), range(200))) == list(range(1, 201))
    assert [thread.name for thread in threading.enumerate()].count("router_client loop") == 1


def test_what_the_work_raises_reaches_the_caller(loop: BackgroundLoop) -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        loop.run(fail())


def test_an_interrupted_caller_cancels_its_work(loop: BackgroundLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def hang() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    interrupt(monkeypatch, begun)
    with pytest.raises(KeyboardInterrupt):
        loop.run(hang())
    assert ended.wait(10)


def test_an_interrupted_iterator_closes_its_source_when_the_step_has_ended(
    loop: BackgroundLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller saw RuntimeError instead: the generator was closed while its cancelled step was cleaning up."""
    begun, ended = threading.Event(), threading.Event()

    async def hang() -> AsyncGenerator[int, None]:
        begun.set()
        try:
            await asyncio.Event().wait()
            yield 1
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            ended.set()

    interrupt(monkeypatch, begun)
    with pytest.raises(KeyboardInterrupt):
        next(loop.iterate(hang()))
    assert ended.is_set()


def interrupt(monkeypatch: pytest.MonkeyPatch, begun: threading.Event) -> None:
    """Ctrl-C for the next to wait for the loop, once its work has begun."""
    submit = asyncio.run_coroutine_threadsafe

    class Interrupted:
        """A future whose waiter gets it."""

        def __init__(self, work: Coroutine[object, object, object], on: asyncio.AbstractEventLoop) -> None:
            monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", submit)
            self.cancel = submit(work, on).cancel

        def result(self) -> None:
            assert begun.wait(10)
            raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", Interrupted)


def test_an_iterator_that_is_left_closes_its_source(loop: BackgroundLoop) -> None:
    closed = threading.Event()

    async def count() -> AsyncGenerator[int, None]:
        try:
            for number in range(3):
                yield number
        finally:
            closed.set()

    assert list(loop.iterate(count())) == [0, 1, 2]
    assert closed.is_set()
    closed.clear()
    source = count()  # kept: the garbage collector would close it, too
    numbers = loop.iterate(source)
    assert next(numbers) == 0
    numbers.close()
    assert closed.is_set()


def test_the_loops_own_thread_may_not_wait_for_itself(loop: BackgroundLoop) -> None:
    async def call_back() -> int:
        return loop.run(add(1, 1))

    with pytest.raises(RuntimeError, match="wait for itself"):
        loop.run(call_back())


def test_a_forked_child_is_told_instead_of_waiting_for_ever(
    loop: BackgroundLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real fork of this process would take gRPC's threads along in the middle of their work.
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(RuntimeError, match="does not survive a fork"):
        loop.run(add(1, 1))
    assert BackgroundLoop().run(add(1, 1)) == 2
