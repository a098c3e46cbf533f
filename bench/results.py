"""What a run has found, case by case, compared with the bare echo. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.figures import Figures, median_of, ratio
from bench.plan import Case, Group


@dataclass(frozen=True, slots=True)
class Result:
    """A case's figures, round by round and as their median."""

    case: Case
    rounds: Sequence[Figures]
    median: Figures


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What a group has found, in the order of its cases, and what is to be known of the place where it ran."""

    group: Group
    results: Sequence[Result]
    remark: str = ""


def collect(group: Group, rounds: Mapping[Case, Sequence[Figures]], remark: str = "") -> GroupResult:
    """Take the ratios within each round, then the medians over the rounds."""
    results = []
    for case in group.cases:
        compared = _with_ratios(case, rounds)
        results.append(Result(case, compared, median_of(compared)))
    return GroupResult(group, results, remark)


def _with_ratios(case: Case, rounds: Mapping[Case, Sequence[Figures]]) -> Sequence[Figures]:
    echo = next((other for other in rounds if other.system == "echo" and other.load == case.load), None)
    if echo is None:
        return rounds[case]
    return [
        replace(own, ratio_to_echo=ratio(own.requests_per_s, base.requests_per_s))
        for own, base in zip(rounds[case], rounds[echo], strict=True)
    ]
