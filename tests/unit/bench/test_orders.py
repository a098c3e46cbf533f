"""What bench and load processes tell each other."""

import pytest

from bench.orders import Order, Report, from_line, to_line


def test_a_message_survives_its_way_as_one_line() -> None:
    report = Report([1200, 900], failed=1, failure="line one\nline two")
    line = to_line(report)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert from_line(Report, line.encode()) == report


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError):
        from_line(Order, to_line(Report()))
