"""Group commit, with a writer that answers when the test says so."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from rest_gateway.jobs import commits
from rest_gateway.jobs.commits import GroupCommit
from rest_gateway.jobs.records import StoreUnavailable, TooManyJobs

pytestmark = pytest.mark.anyio


class Writer:
    """Remembers its groups; each waits for `let_go` and then answers in capitals."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.orphans: list[str] = []
        self.faults: dict[str, Exception] = {}
        self._turns = asyncio.Semaphore(0)
        self.commit = GroupCommit[str, str](self._write, _spawn, len, self._orphaned)

    def let_go(self, groups: int = 1) -> None:
        """Lets so many groups end."""
        for _ in range(groups):
            self._turns.release()

    async def _write(self, items: Sequence[str]) -> list[str | Exception]:
        self.groups.append(list(items))
        await self._turns.acquire()
        for item in items:
            if item in self.faults:
                raise self.faults[item]
        return [TooManyJobs(item) if item == "refused" else item.upper() for item in items]

    async def _orphaned(self, answer: str) -> None:
        self.orphans.append(answer)
        if answer == "LOST":
            raise StoreUnavailable("away")


def _spawn(work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
    return asyncio.create_task(work, name=name)


def call(writer: Writer, *items: str) -> list["asyncio.Task[str]"]:
    """Concurrent callers."""
    return [asyncio.create_task(_call(writer, item)) for item in items]


async def _call(writer: Writer, item: str) -> str:
    return await writer.commit(item)


async def settle() -> None:
    """Lets everybody come as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_gathers_during_one_commit_shares_the_next() -> None:
    writer = Writer()
    first = call(writer, "a")
    await settle()
    rest = call(writer, "b", "c", "d")
    await settle()
    assert writer.groups == [["a"]]
    writer.let_go(2)
    assert await asyncio.gather(*first, *rest) == ["A", "B", "C", "D"]
    assert writer.groups == [["a"], ["b", "c", "d"]]


async def test_a_group_has_bounds_in_items_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_GROUP", 3)
    monkeypatch.setattr(commits, "MAX_BYTES", 5)
    writer = Writer()
    writer.let_go(10)
    callers = call(writer, "a", "b", "c", "d", "too long for a group", "eee", "ff", "g")
    await asyncio.gather(*callers)
    assert writer.groups == [["a", "b", "c"], ["d"], ["too long for a group"], ["eee", "ff"], ["g"]]


async def test_an_answer_may_be_an_error_of_one_caller() -> None:
    writer = Writer()
    writer.let_go()
    good, refused = await asyncio.gather(*call(writer, "a", "refused"), return_exceptions=True)
    assert (good, repr(refused)) == ("A", "TooManyJobs('refused')")
    assert len(writer.groups) == 1


async def test_a_failed_group_is_repeated_one_by_one_and_only_the_culprit_fails() -> None:
    writer = Writer()
    writer.faults["bad"] = ValueError("bad")
    writer.let_go(4)
    answers = await asyncio.gather(*call(writer, "a", "bad", "c"), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["A", "bad", "C"]
    assert writer.groups == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]


async def test_when_the_database_is_away_those_who_gathered_fail_at_once_too() -> None:
    writer = Writer()
    writer.faults["a"] = StoreUnavailable("away")
    first = call(writer, "a")
    await settle()
    rest = call(writer, "b", "c")
    await settle()
    writer.let_go()
    answers = await asyncio.gather(*first, *rest, return_exceptions=True)
    assert [repr(answer) for answer in answers] == ["StoreUnavailable('away')"] * 3
    assert len(set(map(id, answers))) == 3
    assert writer.groups == [["a"]]
    writer.let_go()
    assert await writer.commit("d") == "D"


async def test_who_is_cancelled_before_the_transaction_is_not_written() -> None:
    writer = Writer()
    first = call(writer, "a")
    await settle()
    second = call(writer, "b", "c")
    await settle()
    second[0].cancel()
    await settle()
    writer.let_go(2)
    assert await asyncio.gather(*first, second[1]) == ["A", "C"]
    assert writer.groups == [["a"], ["c"]]
    assert writer.orphans == []


async def test_the_result_of_who_is_cancelled_during_the_transaction_is_an_orphan_and_neighbours_are_unharmed() -> None:
    writer = Writer()
    gone, neighbour = call(writer, "a", "b")
    await settle()
    gone.cancel()
    writer.let_go()
    assert await neighbour == "B"
    await settle()
    assert writer.orphans == ["A"]


async def test_an_orphan_that_cannot_be_given_back_harms_nobody() -> None:
    writer = Writer()
    gone, neighbour = call(writer, "lost", "b")
    await settle()
    gone.cancel()
    writer.let_go(2)
    assert await neighbour == "B"
    assert await writer.commit("c") == "C"
    assert writer.orphans == ["LOST"]


@pytest.mark.parametrize("turns", range(6))
async def test_whenever_the_caller_is_cancelled_somebody_gets_the_answer(turns: int) -> None:
    """Also between the moment when the answer is set and the caller's own turn."""
    writer = Writer()
    [caller] = call(writer, "a")
    await settle()
    writer.let_go()
    for _ in range(turns):
        await asyncio.sleep(0)
    caller.cancel()
    [answer] = await asyncio.gather(caller, return_exceptions=True)
    await settle()
    assert (answer == "A") != (writer.orphans == ["A"])
