"""Where arrivals come from, and what is said of a file that is none."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

from router.simulate.traces import ARRIVALS, BURST_ROWS, BadTrace, read


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_come_in_order_at_the_rate_and_the_same_for_a_seed(name: str) -> None:
    arrivals = list(itertools.takewhile(lambda one: one.at < 3000, ARRIVALS[name](20.0, 9.0, 1)))
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert sum(arrival.rows for arrival in arrivals) == pytest.approx(60_000, rel=0.3 if name == "on-off" else 0.05)
    assert {arrival.timeout_s for arrival in arrivals} == {9.0}
    again = list(itertools.islice(ARRIVALS[name](20.0, 9.0, 1), 100))
    assert again == arrivals[:100]


def test_bursts_come_at_one_instant() -> None:
    arrivals = itertools.islice(ARRIVALS["bursts"](20.0, math.inf, 1), 100)
    assert set(Counter(arrival.at for arrival in arrivals).values()) == {BURST_ROWS}


def test_a_file_is_read_from_its_first_arrival_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s,rows,key,timeout_s\n100.5,,,\n101,4,fraud,2.5\n")
    first, second = read(path, 9.0)
    assert (first.at, first.rows, first.key, first.timeout_s) == (0.0, 1, "", 9.0)
    assert (second.at, second.rows, second.key, second.timeout_s) == (0.5, 4, "fraud", 2.5)


def test_only_the_times_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s\n1\n2\n")
    assert [arrival.at for arrival in read(path, math.inf)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time\n1\n", "no column at_s"),
        ("at_s\n", "no arrivals"),
        ("at_s\n2\n1\n", "line 3: at_s must ascend"),
        ("at_s,rows\n1,0\n", "line 2: at_s must ascend, rows"),
        ("at_s\nsoon\n", "line 2: could not convert"),
        ("at_s\nnan\n", "line 2"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(BadTrace, match=says):
        read(path, math.inf)
