"""Comparison with the bare echo."""

from bench.plan import Case
from bench.results import collect
from tests.unit.bench.builders import group, rates


def test_ratios_are_taken_within_a_round_against_the_echo_of_the_same_load() -> None:
    echo, other_echo, unary = Case("echo", "S1", 64), Case("echo", "S1", 16), Case("unary", "S1", 64)
    rounds = {echo: rates(1000, 2000, 4000), other_echo: rates(1, 1, 1), unary: rates(500, 1800, 1600)}
    found = collect(group(echo, other_echo, unary), rounds)

    assert [result.case for result in found.results] == [echo, other_echo, unary]
    assert [figures.ratio_to_echo for figures in found.results[2].rounds] == [0.5, 0.9, 0.4]
    assert found.results[2].median.ratio_to_echo == 0.5  # of the ratios, not 1600 / 2000
    assert found.results[0].median.ratio_to_echo == 1.0


def test_without_an_echo_there_is_no_ratio() -> None:
    unary = Case("unary", "S1", 64)
    [result] = collect(group(unary), {unary: rates(500)}).results
    assert result.median.ratio_to_echo is None
