"""Clients and servers of others. Each module says in SYSTEM which, and the end of the run lists them."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.interop.asking import Ask, asking
from tests.interop.report import PROPERTY, name_of
from tests.interop.stack import Stack, serving
from tests.lasting_loop import LASTING_LOOP


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say of each test here whose it is; the property travels with its reports, also from other processes."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.user_properties.append((PROPERTY, name_of(item.module)))


@pytest.fixture(scope="package")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return LASTING_LOOP


@pytest.fixture(scope="package", autouse=True)
async def _one_loop(anyio_backend: tuple[str, dict[str, Any]]) -> AsyncIterator[None]:
    """AnyIO keeps the loop for as long as an async fixture of this scope lives; gRPC wants one loop per process."""
    yield  # noqa: PT022 -- a fixture that returns would not keep it


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serving(tmp_path_factory.mktemp("stack")) as started:
        yield started


@pytest.fixture(scope="module")
async def ask(request: pytest.FixtureRequest, stack: Stack) -> AsyncIterator[Ask]:
    """The client that the module names in KIND."""
    async with asking(request.module.KIND, stack.router, stack.gateway) as client:
        yield client
