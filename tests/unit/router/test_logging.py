"""Text logs: one line a record."""

import logging

from router.__main__ import OneLine


def test_line_breaks_and_escapes_from_outside_stay_inside_their_line() -> None:
    record = logging.LogRecord("router", logging.INFO, "", 0, "model said %s", ("a\nb\x1b[31m é",), None)
    record.request_id = "x\ny"
    line = OneLine().format(record)
    assert line.endswith("INFO router: model said a\\nb\\x1b[31m é request_id=x\\ny")
    assert "\n" not in line
