"""What `make check` says about requirement files that have gone their own way."""

import pytest

from tools.check_requirements import find_differences, find_problems

PYPROJECT = """
[project]
dependencies = ["Alpha-One>=1.2,<2", "beta"]
[dependency-groups]
dev = ["gamma==3.0"]
far = ["delta<2"]
"""
ALPHA = "alpha-one==1.5 \\\n    --hash=sha256:00\n    # via inference-router (pyproject.toml)\n"
BETA = (
    "beta[extra]==0.9 ; python_version < '3.12' \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\n"
    "    # via alpha-one\n"
    "beta[extra]==1.0 ; python_version >= '3.12' \\\n    --hash=sha256:02\n    # via alpha-one\n"
)
GAMMA = "gamma==3.0 \\\n    --hash=sha256:00\n    # via inference-router (pyproject.toml:dev)\n"
DELTA = "delta==1.0 \\\n    --hash=sha256:00\n    # via inference-router (pyproject.toml:far)\n"


def test_files_that_fit_have_no_problem() -> None:
    assert list(find_problems(PYPROJECT, ALPHA + BETA, ("project",))) == []
    assert list(find_problems(PYPROJECT, ALPHA + BETA + GAMMA, ("project", "dev"))) == []
    assert list(find_problems(PYPROJECT, DELTA, ("far",))) == []
    assert list(find_differences(ALPHA + BETA, ALPHA + BETA + GAMMA)) == []


@pytest.mark.parametrize(
    ("lock", "problem"),
    [
        (BETA, "alpha-one is not pinned"),
        (ALPHA.replace("1.5", "2.0") + BETA, "alpha-one==2.0 does not satisfy Alpha-One<2,>=1.2"),
        (ALPHA + BETA + GAMMA, "gamma is pinned for pyproject.toml, which does not ask for it"),
        (ALPHA + "beta==1.0\n    # via alpha-one\n", "beta has no hash"),
        ("--index-url https://packages.example/simple\n" + ALPHA + BETA, "line 1 names a package index"),
        (ALPHA + BETA + "#    uv pip compile --index-url=https://packages.example\n", "line 11 names a package index"),
    ],
)
def test_each_kind_of_misfit_is_told(lock: str, problem: str) -> None:
    assert list(find_problems(PYPROJECT, lock, ("project",))) == [problem]


def test_a_file_of_a_group_pins_what_the_group_asks_for() -> None:
    assert list(find_problems(PYPROJECT, DELTA.replace("1.0", "2.0"), ("far",))) == [
        "delta==2.0 does not satisfy delta<2"
    ]


def test_both_files_pin_one_version() -> None:
    dev = ALPHA.replace("1.5", "1.6") + BETA
    assert list(find_differences(ALPHA + BETA, dev)) == ["alpha-one==1.5 is not what requirements-dev.txt pins"]
