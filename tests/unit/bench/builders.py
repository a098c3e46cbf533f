"""Groups and figures with what a test does not care about filled in."""

from collections.abc import Sequence

from bench.figures import Figures
from bench.plan import Case, Group, Setting


def group(*cases: Case, name: str = "zero", rounds: int = 1, setting: Setting | None = None) -> Group:
    return Group(name, "A title", setting or Setting(), cases, rounds, warm_s=0.1, seconds=1.0)


def figures(requests_per_s: float, **known: float) -> Figures:
    return Figures(requests_per_s, requests_per_s, **known)  # type: ignore[arg-type]  # `failure` is not among them


def rates(*requests_per_s: float) -> Sequence[Figures]:
    return [figures(rate) for rate in requests_per_s]
