"""What a user sees."""

import io
import json
import struct
import sys
from math import inf, nan

import pytest

from router_client import AgentError, AgentResult, Explanation, ResourceExhausted, Results
from router_client.cli.output import complain, print_json, print_members, print_table, result_line, results_document

WHY = Explanation(queued_s=0.0021, backend_s=4.5, batch_id="b", batch_rows=2, replica="10.0.0.5:8001", attempts=1)
REFUSED = AgentResult([], AgentError("RESOURCE_EXHAUSTED", "too\nmuch", 1500))


def float32(value: float) -> float:
    """As it comes from the wire."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def test_a_float32_is_told_in_as_few_digits_as_tell_it_apart() -> None:
    values = [float32(value) for value in (0.14228487, 1.0, -2.5e-10, 16777217, 3.4028235e38)]
    assert result_line("ann", AgentResult(values)) == "ann: 0.14228487, 1, -2.5e-10, 16777216, 3.4028235e+38"


@pytest.mark.parametrize(("encoding", "text"), [("ascii", "größe ✓"), ("utf-8", "\ud800")])
def test_json_is_whole_on_any_stdout(encoding: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    print_json({text: 1})
    stdout.flush()
    assert json.loads(stdout.buffer.getvalue()) == {text: 1}


def test_a_line_tells_an_error_or_where_the_time_went() -> None:
    assert result_line("b\x1bob", REFUSED) == "b ob: RESOURCE_EXHAUSTED: too much"
    explained = result_line("ann", AgentResult([1.0], None, WHY))
    assert explained == "ann: 1 (queued 0.002 s, model 4.500 s, batch of 2 at 10.0.0.5:8001)"
    kept = Explanation(queued_s=0.0, backend_s=0.0, batch_id="", batch_rows=0, replica="", attempts=0)
    assert result_line("ann", AgentResult([1.0], None, kept)).endswith("kept from an earlier call)")


def test_the_document_is_that_of_the_rest_api_and_always_json() -> None:
    document = results_document(Results({"ann": AgentResult([float32(0.1), nan, inf], None, WHY), "bob": REFUSED}))
    assert json.loads(json.dumps(document, allow_nan=False)) == {
        "results": {
            "ann": {
                "output": [0.1, None, None],
                "explanation": {
                    "queued_s": 0.0021,
                    "backend_s": 4.5,
                    "batch_id": "b",
                    "batch_rows": 2,
                    "replica": "10.0.0.5:8001",
                    "attempts": 1,
                },
            }
        },
        "errors": {"bob": {"code": "RESOURCE_EXHAUSTED", "detail": "too\nmuch", "retry_after_s": 1.5}},
    }


def test_a_failure_is_one_line_on_stderr_and_with_json_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    error = ResourceExhausted("too\nmuch", retry_after_s=1.5)
    complain(error, is_json=False)
    assert capsys.readouterr() == ("", "RESOURCE_EXHAUSTED: too much (a retry may succeed in 1.5 s)\n")
    complain(error, is_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == {"error": {"code": "RESOURCE_EXHAUSTED", "detail": "too\nmuch", "retry_after_s": 1.5}}


def test_a_table_is_not_cut_where_a_program_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("ID", "TEXT"), [("1", "[red]x" * 100), ("22", ":smile:\n")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["ID  TEXT", "1   " + "[red]x" * 100, "22  :smile:"]


def test_members_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    print_members([("a", "1"), ("  long", ""), ("b", "two\nlines")])
    assert capsys.readouterr().out == "a       1\n  long\nb       two lines\n"
