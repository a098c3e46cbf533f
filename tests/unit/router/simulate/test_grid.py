"""The grid: a part of it, and what is said of it."""

import pytest

from router.simulate import heat
from router.simulate.grid import Cell, Change, compare, grid, table, verdict, worst

# Of each kind of model and traffic one cell, with replicas and loads mixed.
PART = [
    Cell("5", "poisson", 4, 0.7),
    Cell("5", "bursts", 8, 0.3),
    Cell("5", "on-off", 4, 0.5),
    Cell("3-7", "poisson", 8, 0.9),
    Cell("3-7", "bursts", 4, 0.5),
    Cell("3-7", "on-off", 2, 0.2),
    Cell("lognormal:5:0.2", "poisson", 2, 0.6),
    Cell("lognormal:5:0.2", "bursts", 8, 0.8),
    Cell("lognormal:5:0.2", "on-off", 4, 0.1),
    Cell("0.005+0.00035*rows", "poisson", 8, 0.3),
    Cell("0.005+0.00035*rows", "bursts", 2, 0.5),
    Cell("0.005+0.00035*rows", "on-off", 1, 0.7),
]


@pytest.mark.parametrize("cell", PART, ids=str)
def test_a_cell_of_the_grid_is_not_served_worse(cell: Cell) -> None:
    change = compare(cell)
    assert not change.is_worse, change


def test_the_grid_has_every_kind() -> None:
    cells = grid()
    assert len(cells) == len(set(cells)) == 4 * 3 * 4 * 11
    assert set(PART) <= set(cells)


GOOD, BAD = Cell("5", "poisson", 4, 0.5), Cell("5", "poisson", 4, 0.9)
CHANGES = {GOOD: Change(-0.2, 0.03), BAD: Change(0.0101, 0.0)}


def test_a_cell_at_the_limit_is_not_worse_and_one_past_it_is() -> None:
    assert verdict(CHANGES).startswith("1 of 2 cells are worse by more than 1% in the mean or 3% in the p99: 4 x 5")
    assert verdict({GOOD: CHANGES[GOOD]}) == "0 of 1 cells are worse by more than 1% in the mean or 3% in the p99."


def test_the_table_has_a_line_per_kind_and_a_column_per_load() -> None:
    head, line = table(CHANGES, "mean").splitlines()
    assert head.split() == ["mean", "latency,", "change", "in", "%", "50%", "90%"]
    assert line.split() == ["4", "x", "5,", "poisson", "-20.0", "+1.0"]


def test_the_worst_are_named_first() -> None:
    mean, p99 = worst(CHANGES).splitlines()
    assert mean.startswith(f"worst mean: {BAD} +1.0 %; {GOOD}")
    assert p99.startswith(f"worst p99: {GOOD} +3.0 %; {BAD}")


def test_the_picture_colours_better_and_worse_apart() -> None:
    picture = heat.draw([heat.Panel("panel", ["4 x"], ["50%", "90%", "95%"], [[-0.3, 0.05, 0.0]])], "title")
    assert all(text in picture for text in ("title", "panel", "-30.0", "+5.0", "#0072b2", "#d55e00", "#ffffff"))
