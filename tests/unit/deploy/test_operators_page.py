"""What the pages for operators call metrics is what the programs call them."""

import re
from pathlib import Path

import pytest

from rest_gateway.metrics import Metrics as GatewayMetrics
from router.metrics import Metrics as RouterMetrics

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "docs/architecture.md", "deploy/README.md")


def exposed() -> set[str]:
    """The names that Prometheus sees."""
    families = [*RouterMetrics().registry.collect(), *GatewayMetrics().registry.collect()]
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_that_a_page_names_exists(page: str) -> None:
    told = re.findall(r"`((?:router|gateway)_[a-z_]+)`", (ROOT / page).read_text())
    packages = {"router_client"}
    assert set(told) - packages <= exposed()


def test_every_metric_of_the_router_is_told_to_operators() -> None:
    text = (ROOT / "deploy/README.md").read_text()
    untold = {name for name in exposed() if name.startswith("router_") and f"`{name}`" not in text}
    assert untold == set()
