"""When settings are loaded again, and what becomes of good and bad ones; real files, virtual time."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from router.config import ConfigError, LimitSettings, Settings, changes, check_same_process, load
from router.metrics import Metrics
from router.reload import Looks, Reloader

GOOD = "backends: {x: {addresses: ['h:1']}}\nmodels: [{backend: x, max_batch_size: %d}]\n"
ONE, TWO = (1, 1, 1, 1), (1, 2, 1, 1)


def test_a_file_is_read_when_two_looks_have_found_the_same_new_one() -> None:
    looks = Looks(ONE)
    assert [looks.is_due(stamp) for stamp in (ONE, TWO, TWO, TWO, ONE, TWO, TWO)] == [False, False, True, *[False] * 4]


def test_a_file_that_vanishes_is_looked_for_once_and_read_when_it_is_back() -> None:
    looks = Looks(ONE)
    assert [looks.is_due(stamp) for stamp in (None, None, None, ONE, ONE)] == [False, True, False, False, True]


def test_a_file_that_was_read_because_somebody_asked_is_not_read_again() -> None:
    looks = Looks(ONE)
    looks.is_due(TWO)
    looks.has_read(TWO)
    assert not looks.is_due(TWO)


def test_changes_are_told_by_the_names_of_the_fields() -> None:
    def settings(**model: object) -> Settings:
        return Settings(
            backends={"x": {"addresses": ["h:1"]}, **({"y": {"addresses": ["h:2"]}} if model else {})},  # type: ignore[dict-item]
            models=[{"backend": "x", **model}],  # type: ignore[list-item]
        )

    told = [str(change) for change in changes(settings(), settings(max_batch_size=8, vector_output="out"))]
    assert told[:2] == ["models.0.max_batch_size: 64 -> 8", 'models.0.vector_output: null -> "out"']
    assert 'backends.y.addresses: null -> ["h:2"]' in told
    assert changes(settings(), settings()) == []


def test_what_cannot_change_while_running_is_refused_by_name(path: Path) -> None:
    before = load(path)
    after = before.model_copy(
        update={"listen": "127.0.0.1:1", "metrics": None, "limits": LimitSettings(max_message_bytes=5, max_agents=5)}
    )
    with pytest.raises(ConfigError) as refused:
        check_same_process(before, after)
    assert str(refused.value).splitlines() == [
        'listen: "127.0.0.1:50051" -> "127.0.0.1:1": needs a restart',
        'metrics: "127.0.0.1:9091" -> null: needs a restart',
        "limits.max_message_bytes: 16777216 -> 5: needs a restart",
    ]


class Watched:
    """A reloader over a file, and what it applied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Metrics()
        self.applied: list[Settings] = []
        self.settings = load(path)
        self.reloader = Reloader(path, self.settings, self._apply, self.metrics)

    def _apply(self, settings: Settings) -> None:
        check_same_process(self.settings, settings)
        self.applied.append(settings)

    def write(self, text: str | None) -> None:
        """Change the file, or take it away."""
        if text is None:
            self.path.unlink()
        else:
            self.path.write_text(text)

    @property
    def sizes(self) -> list[int]:
        return [settings.models[0].max_batch_size for settings in self.applied]

    def counts(self) -> dict[str, float]:
        value = self.metrics.registry.get_sample_value
        outcomes = ("applied", "unchanged", "refused")
        return {one: count for one in outcomes if (count := value("router_config_reloads_total", {"outcome": one}))}


@asynccontextmanager
async def watching(path: Path) -> AsyncIterator[Watched]:
    watched = Watched(path)
    task = asyncio.create_task(watched.reloader.run())
    await asyncio.sleep(0.5)  # looks are at full seconds
    yield watched
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(GOOD % 1)
    return path


@pytest.mark.anyio
async def test_a_changed_file_is_applied_after_a_second_of_rest(path: Path) -> None:
    async with watching(path) as watched:
        watched.write(GOOD % 22)
        await asyncio.sleep(1)
        assert watched.sizes == []
        await asyncio.sleep(1)
        assert watched.sizes == [22]
        await asyncio.sleep(60)
        assert watched.counts() == {"applied": 1}


@pytest.mark.anyio
async def test_a_file_swapped_by_rename_and_by_a_link_is_seen(path: Path, tmp_path: Path) -> None:
    """As editors and Kubernetes do: `..data` is a link to a directory of files, and is turned by a rename."""
    for version in (2, 3):
        (tmp_path / f"v{version}").mkdir()
        (tmp_path / f"v{version}" / "given.yaml").write_text(GOOD % version)
    data, mounted = tmp_path / "..data", tmp_path / "mounted.yaml"
    data.symlink_to("v2")
    mounted.symlink_to("..data/given.yaml")
    async with watching(path) as watched, watching(mounted) as linked:
        (tmp_path / "new.yaml").write_text(GOOD % 5)
        (tmp_path / "new.yaml").rename(path)
        (tmp_path / "..new").symlink_to("v3")
        (tmp_path / "..new").rename(data)
        await asyncio.sleep(3)
        assert (watched.sizes, linked.sizes) == ([5], [3])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: [", "is not YAML"),
        ("models: " + "[" * 3000 + "]" * 3000, "is not YAML that can be read: RecursionError"),
        ("trust_tenant: !!bool maybe", "is not YAML that can be read: KeyError"),
        ("listen: !!timestamp now", "is not YAML that can be read: AttributeError"),
        (GOOD % 0, "models.0.max_batch_size: Input should be greater than or equal to 1"),
        (GOOD % 5 + "listen: 127.0.0.1:1", 'listen: "127.0.0.1:50051" -> "127.0.0.1:1": needs a restart'),
        (None, "No such file"),
        ("", "given.yaml is empty"),  # whoever writes it anew begins so; it meant the built-in defaults
    ],
)
async def test_a_file_that_cannot_be_used_is_refused_once_and_the_old_settings_stay(
    path: Path, text: str | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(path) as watched:
        watched.write(text)
        await asyncio.sleep(10)
        (message,) = [record.getMessage() for record in caplog.records if record.name == "router.reload"]
        assert message.startswith("settings refused, the old ones stay: ")
        assert told in message
        assert watched.applied == []
        watched.write(GOOD % 7)
        await asyncio.sleep(3)
        assert watched.sizes == [7]
        assert watched.counts() == {"refused": 1, "applied": 1}


@pytest.mark.anyio
async def test_whoever_asks_gets_a_look_at_once_also_without_a_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with watching(path) as watched:
        watched.write(GOOD % 9)
        watched.reloader.ask()
        await asyncio.sleep(0.01)
        assert watched.sizes == [9]
        assert "settings changed: models.0.max_batch_size: 1 -> 9" in caplog.text
        watched.reloader.ask()
        await asyncio.sleep(5)
        assert watched.counts() == {"applied": 1, "unchanged": 1}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    metrics = Metrics()
    reloader = Reloader(None, load(), lambda _: None, metrics)
    task = asyncio.create_task(reloader.run())
    reloader.ask()
    await asyncio.sleep(5)
    task.cancel()
    assert metrics.registry.get_sample_value("router_config_reloads_total", {"outcome": "unchanged"}) == 1


@pytest.mark.anyio
async def test_the_environment_wins_over_a_changed_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "ROUTER_MAX_TIMEOUT_S", "77")
    async with watching(path) as watched:
        watched.write(GOOD % 9 + "max_timeout_s: 5\n")
        await asyncio.sleep(3)
        assert watched.applied[0].max_timeout_s == 77
