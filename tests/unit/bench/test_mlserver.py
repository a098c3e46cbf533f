"""Which of MLServer's lines the router is compared with."""

from bench.figures import Figures
from bench.mlserver import compare
from bench.plan import Case, Group, Setting
from bench.results import GroupResult, Result


def found(**figures: tuple[float, float]) -> GroupResult:
    """(requests/s, p99 in ms) by system."""
    cases = {name: Case(name.replace("_", " "), "S1", 64) for name in figures}
    group = Group("mlserver", "", Setting(), list(cases.values()), rounds=1, warm_s=0, seconds=1)
    results = [Result(cases[name], (), Figures(rate, rate, p99_ms=p99)) for name, (rate, p99) in figures.items()]
    return GroupResult(group, results)


def test_each_figure_is_compared_with_the_best_that_mlserver_has_in_it() -> None:
    lines = found(router=(1200, 80), own_1_ms=(600, 100), own_20_ms=(800, 200))
    assert compare(lines) == (
        "With the router 1.50 times the requests/s of MLServer's best (own 20 ms), "
        "and 0.80 of its lowest p99 (own 1 ms)."
    )


def test_a_line_without_an_answer_is_no_best() -> None:
    dead = found(router=(1200, 80), own_1_ms=(100, 100))
    dead = GroupResult(dead.group, [*dead.results, Result(Case("own 5 ms", "S1", 64), (), Figures(0, 0, failed=9))])
    assert compare(dead).endswith("and 0.80 of its lowest p99 (own 1 ms).")
