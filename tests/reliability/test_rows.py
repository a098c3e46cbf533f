"""A small part of every row of the reliability plan; `make soak` runs the full counts."""

import pytest

from tests.reliability.__main__ import SEED
from tests.reliability.plan import PLAN

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", PLAN)
async def test_the_router_stands(name: str) -> None:
    report = await PLAN[name].run(SEED, **PLAN[name].small)
    print(report)
    assert report.passes, str(report)
