"""The command: arguments, table, picture, advice."""

import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from router.simulate.__main__ import main
from router.simulate.report import advice, table
from router.simulate.scenario import Answer, Figures, Scenario, Service, Traffic, parse_service

QUICK = ["--seconds", "60", "--service", "0.5", "--jobs", "1"]


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("5", Service(5, 5)),
        ("3-7", Service(3, 7)),
        ("lognormal:5:0.2", Service(5, 5, 0.2)),
        ("0.005 + 0.00035*rows", Service(0.005, 0.005, 0, 0.00035)),
    ],
)
def test_a_service_time_is_read_and_written(text: str, service: Service) -> None:
    assert parse_service(text) == service
    assert str(service) == text.replace(" ", "")


@pytest.mark.parametrize("text", ["", "five", "7-3", "0", "-1", "5+rows", "lognormal:5"])
def test_what_is_no_service_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"call takes|is not like"):
        parse_service(text)


def test_it_compares_and_advises(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    arguments = ["--rate", "40", "--replicas", "1,2", "--max-batch-size", "8,64", "--p99-s", "1", "--svg", str(picture)]
    assert main([*QUICK, *arguments]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split()[:3] == ["replicas", "batch", "policy"]
    assert [line.split()[2] for line in lines[1:9]] == ["plain", "full"] * 4
    assert "The least that answers 99 of 100 rows within 1 s: 1 replicas, max_batch_size 64 (full" in said
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


def test_it_says_when_nothing_meets_the_goal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--rate", "40", "--p99-s", "0.4"]) == 1
    assert "None of these" in capsys.readouterr().out


def test_it_replays_a_trace_with_several_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s,rows,key\n" + "".join(f"{number / 10},2,{'ab'[number % 2]}\n" for number in range(600)))
    assert main(["--trace", str(trace), "--service", "0.5", "--jobs", "1", "--policies", "full"]) == 0
    cells = capsys.readouterr().out.splitlines()[1].split()
    assert float(cells[3]) == pytest.approx(20, rel=0.05)


def test_a_bad_trace_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--trace", str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.startswith("simulate: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rate", "0"],
        ["--rate", "1", "--replicas", "0"],
        ["--rate", "1", "--policies", "best"],
        ["--rate", "1", "--service", "soon"],
        ["--callers", "1", "--pause-s", "2-1"],
        ["--rate", "1", "--trace", "x"],
    ],
)
def test_a_bad_argument_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    capsys.readouterr()


def answer(replicas: int, size: int, policy: str, p99_s: float, refused: float = 0.0) -> Answer:
    scenario = Scenario(Traffic(rate=10), Service(1, 1), policy, replicas, max_batch_size=size)
    return Answer(scenario, Figures(10, 10, 10, 0, refused, p99_s / 2, p99_s / 2, p99_s, 4, 1, 8))


def test_the_advice_is_the_cheapest_that_turns_nobody_away() -> None:
    answers = [
        answer(1, 64, "full", 1.0, refused=0.01),
        answer(2, 8, "full", 2.1),
        answer(2, 16, "plain", 1.9),
        answer(2, 16, "full", 1.95),
        answer(4, 8, "full", 1.2),
    ]
    assert "2 replicas, max_batch_size 16 (full: p99 1.95 s)" in advice(answers, 2.0)
    assert advice(answers, 1.0).startswith("None of these")
    assert [line.split()[-1] for line in table(answers, 2.0).splitlines()[1:]] == ["no", "no", "yes", "yes", "yes"]


def test_figures_without_an_answer_are_dashes() -> None:
    empty = Answer(Scenario(Traffic(rate=1), Service(1, 1)), Figures(1, 0, 0, 0, 1, *[math.nan] * 6))
    assert table([empty]).splitlines()[1].split()[5:] == ["-", "1.50", "-", "-", "-", "-", "0.0", "0.0%", "100.0%"]
