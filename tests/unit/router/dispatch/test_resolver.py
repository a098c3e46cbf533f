"""Which addresses a backend has, as its sources change; sources are fakes, time is virtual."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from router.dispatch.resolver import FileSource, Resolver, Source, open_source, parse

pytestmark = pytest.mark.anyio

ENTRY = "dns:///models:1"


class FakeSource:
    """A Source that finds what the test has put there."""

    def __init__(self) -> None:
        self.interval_s = 5.0
        self.found: Sequence[str] | Exception = []
        self.looks = 0

    async def find(self) -> Sequence[str]:
        self.looks += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Following:
    """A resolver, its fake sources and what it told."""

    def __init__(self, *entries: str) -> None:
        self.sources: dict[str, FakeSource] = {}
        self.told: list[list[str]] = []
        self.resolver = Resolver(lambda addresses: self.told.append(list(addresses)), self._open)
        self.resolver.follow(entries)

    def _open(self, entry: str) -> Source | None:
        return self.sources.setdefault(entry, FakeSource()) if ":/" in entry else None


async def test_addresses_are_told_at_once_and_sources_when_they_are_known() -> None:
    following = Following("b:1", ENTRY, "a:1")
    assert following.told == [["b:1", "a:1"]]
    following.sources[ENTRY].found = ["10.0.0.1:1", "a:1"]
    following.resolver.start()
    await asyncio.sleep(0.1)
    assert following.told[1:] == [["b:1", "10.0.0.1:1", "a:1"]]
    await following.resolver.aclose()


async def test_a_change_is_found_at_the_next_look_and_no_change_is_not_told() -> None:
    following = Following(ENTRY)
    source = following.sources[ENTRY]
    source.found = ["10.0.0.1:1"]
    following.resolver.start()
    await asyncio.sleep(12.0)
    assert (source.looks, following.told) == (3, [[], ["10.0.0.1:1"]])
    source.found = ["10.0.0.2:1"]
    await asyncio.sleep(2.9)
    assert len(following.told) == 2
    await asyncio.sleep(0.2)
    assert following.told[2:] == [["10.0.0.2:1"]]
    await following.resolver.aclose()
    await asyncio.sleep(60)
    assert source.looks == 4


async def test_a_failed_look_keeps_what_was_known_and_says_so_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    following = Following(ENTRY)
    source = following.sources[ENTRY]
    source.found = ["10.0.0.1:1", "10.0.0.2:1"]
    following.resolver.start()
    await asyncio.sleep(1)
    source.found = OSError("no name server")
    await asyncio.sleep(30)
    assert len(following.told) == 2
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["dns:///models:1: no name server; the 2 addresses known of it stay"]
    source.found = ValueError("nonsense")
    await asyncio.sleep(30)
    source.found = ["10.0.0.1:1", "10.0.0.2:1"]
    await asyncio.sleep(30)
    source.found = ValueError("nonsense")
    await asyncio.sleep(30)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 3
    assert len(following.told) == 2
    await following.resolver.aclose()


async def test_other_entries_can_be_followed_and_those_that_stay_keep_what_is_known() -> None:
    following = Following(ENTRY, "dns:///old:1", "a:1")
    following.sources[ENTRY].found = ["10.0.0.1:1"]
    following.sources["dns:///old:1"].found = ["10.0.0.9:1"]
    following.resolver.start()
    await asyncio.sleep(0.1)
    following.resolver.follow(["b:1", "dns:///new:1", ENTRY])
    assert following.told[-1] == ["b:1", "10.0.0.1:1", "10.0.0.9:1", "a:1"]
    following.sources["dns:///new:1"].found = ["10.0.0.5:1"]
    await asyncio.sleep(0.1)
    assert following.told[-1] == ["b:1", "10.0.0.5:1", "10.0.0.1:1"]
    looks = following.sources["dns:///old:1"].looks
    await asyncio.sleep(60)
    assert following.sources["dns:///old:1"].looks == looks
    await following.resolver.aclose()


async def test_nobody_leaves_for_entries_that_were_never_found(caplog: pytest.LogCaptureFixture) -> None:
    # From fixed addresses to a name: all replicas left before the name was looked up, and every row waited for it.
    following = Following("a:1", "b:1")
    following.resolver.start()
    following.resolver.follow([ENTRY, "file:/later", "b:1"])
    one, later = following.sources[ENTRY], following.sources["file:/later"]
    one.found, later.found = OSError("no name server"), OSError("no file")
    assert following.told[-1] == ["b:1", "a:1"]
    await asyncio.sleep(12.0)
    assert "no name server" in caplog.text
    assert following.told[-1] == ["b:1", "a:1"]
    one.found = ["10.0.0.1:1"]
    await asyncio.sleep(5.0)
    assert following.told[-1] == ["10.0.0.1:1", "b:1", "a:1"]
    later.found = ["10.0.0.2:1"]
    await asyncio.sleep(5.0)
    assert following.told[-1] == ["10.0.0.1:1", "10.0.0.2:1", "b:1"]
    one.found = OSError("gone again")
    following.resolver.follow([ENTRY])
    assert following.told[-1] == ["10.0.0.1:1"]
    await following.resolver.aclose()


def test_a_file_has_an_address_a_line_and_comments() -> None:
    assert parse(
        ["# replicas\n", "\n", " 10.0.0.1:50061 \n", "model-1:1  # the first\n", "[::1]:2\n", "model-1:1\n"]
    ) == [
        "10.0.0.1:50061",
        "model-1:1",
        "[::1]:2",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a:1", "b"], "line 2: 'b' is not HOST:PORT"),
        (["a:0"], "line 1: 'a:0' names no port"),
        (["file:other"], "line 1: "),
        (["# none"], "no address in it"),
        ([], "no address in it"),
    ],
)
def test_a_wrong_file_is_refused_as_a_whole(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(lines)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_file_is_read_again_when_it_was_written_replaced_or_linked_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "replicas"
    source = FileSource(str(path))
    with pytest.raises(FileNotFoundError):
        await source.find()
    path.write_text("a:1")
    assert await source.find() == ["a:1"]
    path.write_text("a:1\nb:1")
    assert await source.find() == ["a:1", "b:1"]
    (tmp_path / "next").write_text("c:1")
    (tmp_path / "next").rename(path)
    assert await source.find() == ["c:1"]
    link = FileSource(str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(path)
    assert await link.find() == ["c:1"]
    (tmp_path / "other").write_text("d:1")
    (tmp_path / "swap").symlink_to(tmp_path / "other")
    (tmp_path / "swap").rename(tmp_path / "link")
    assert await link.find() == ["d:1"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "replicas"
    path.write_text("a:1")
    os.utime(path, ns=(0, 0))
    source = FileSource(str(path))
    await source.find()
    path.write_text("b:1")
    os.utime(path, ns=(0, 0))  # as if nothing had happened
    assert await source.find() == ["a:1"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_every_record_of_a_name_is_an_address() -> None:
    source = open_source("dns:///localhost:50061", 5.0)
    assert source is not None
    found = await source.find()
    assert "127.0.0.1:50061" in found
    assert set(found) <= {"127.0.0.1:50061", "[::1]:50061"}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_numeric_name_is_its_own_address() -> None:
    source = open_source("dns:///[::1]:50061", 5.0)
    assert source is not None
    assert await source.find() == ["[::1]:50061"]
