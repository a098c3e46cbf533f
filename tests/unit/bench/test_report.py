"""The benchmark's tables and its JSON."""

import json
import re
from dataclasses import replace

from bench.figures import Figures
from bench.plan import Case, Setting
from bench.report import align, document, tables
from bench.results import collect
from tests.unit.bench.builders import figures, group


def test_text_stands_on_the_left_and_numbers_on_the_right() -> None:
    table = align(["system", "rate", "note"], [["echo", "5", ""], ["stream", "49,000", "fast"]], [True, False, True])
    assert table.splitlines() == [
        "system    rate  note",
        "echo         5",
        "stream  49,000  fast",
    ]


def test_a_table_has_only_columns_that_somebody_fills() -> None:
    echo, stream = Case("echo", "S1", 64), Case("stream", "S1", 64)
    rounds = {
        echo: [figures(5_000, p50_ms=12.5)],
        stream: [figures(40_000, p50_ms=1.5, router_us_per_vector=11.04, batch_rows=64)],
    }
    title, _, head, first, second = tables([collect(group(echo, stream), rounds)]).splitlines()
    assert title == "A title: one vector per request"
    assert head.split("  ")[-1] == "target"
    assert "gateway" not in head
    assert first.split() == ["64", "echo", "5,000", "5,000", "12.50", "1.00", "1"]
    assert second.split()[:9] == ["64", "stream", "40,000", "40,000", "1.50", "8.00", "11.0", "64.0", "1"]
    assert second.endswith("≥ 25,000 requests/s, router ≤ 20 µs")


def test_each_workload_has_a_table() -> None:
    cases = [Case("echo", "S1"), Case("echo", "S2")]
    text = tables([collect(group(*cases), {case: [figures(1)] for case in cases})])
    assert text.index("one vector per request") < text.index("16 agents over 4 models")


def test_held_calls_are_reported_with_what_was_added_to_the_models_time() -> None:
    held = Case("stream", "held", 10_000, rate_per_s=2_000)
    found = collect(
        group(held, name="held", setting=Setting(latency_s=5.0)), {held: [figures(2_000, p50_ms=5_016, p99_ms=5_041)]}
    )
    head, row = tables([found]).splitlines()[-2:]
    assert "added p50  added p99" in head
    assert row.split()[:7] == ["stream", "2,000", "2,000", "5,016.00", "5,041.00", "16.0", "41.0"]


def test_failed_requests_are_told_below_the_table() -> None:
    unary = Case("unary", "S1", 16)
    found = collect(group(unary), {unary: [Figures(1, 1, failed=3, failure="UNAVAILABLE: gone")]})
    last = tables([found]).splitlines()[-1]
    assert last == "unary S1, 16 callers: 3 requests failed, the first with: UNAVAILABLE: gone"


def test_jobs_have_one_table_which_tells_what_could_not_be_measured() -> None:
    submit, page = Case("sqlite", "submit", 256), Case("sqlite-store", "page", pause_s=0.01)
    missing = Case("postgresql", "submit", 256)
    jobs = replace(group(submit, page, name="jobs"), left_out=[missing], left_out_reason="no initdb here")
    rounds = {submit: [figures(1_500, p50_ms=150.0)], page: [figures(90, p50_ms=1.5, p99_ms=2.5)]}
    text = tables([collect(jobs, rounds, "A write takes 1 ms.")])
    title, _, head, first, second, third = text.splitlines()
    assert title == "A title. A write takes 1 ms."
    assert head.split()[:4] == ["what", "database", "asked", "by"]
    assert re.split("  +", first) == [
        *("submit a text over REST", "sqlite", "256 callers", "1,500", "150.00", "1", "≥ 1,000 jobs/s")
    ]
    assert re.split("  +", second) == [
        *("submit a text over REST", "postgresql", "256 callers", "not measured: no initdb here")
    ]
    assert re.split("  +", third) == ["a page of 50", "sqlite", "1 caller", "1.50", "2.50", "1", "< 20 ms"]


def test_the_document_tells_what_was_left_out() -> None:
    missing = Case("postgresql", "submit", 256)
    found = collect(replace(group(name="jobs"), left_out=[missing], left_out_reason="no initdb here"), {})
    [jobs] = json.loads(json.dumps(document([found], {})))["groups"]
    assert jobs["cases"] == []
    assert [case["system"] for case in jobs["left_out"]] == ["postgresql"]
    assert jobs["left_out_reason"] == "no initdb here"


def test_the_document_has_surroundings_settings_cases_rounds_and_medians() -> None:
    unary = Case("unary", "S2", 16)
    found = collect(group(unary, rounds=2), {unary: [figures(10), figures(30)]})
    content = json.loads(json.dumps(document([found], {"command": "python -m bench"})))
    assert content["command"] == "python -m bench"
    [zero] = content["groups"]
    assert zero["setting"] == {
        "latency_s": 0.0,
        "max_in_flight": 4,
        "max_queue_delay_s": 0.002,
        "replicas": 1,
        "job_rows": 0,
    }
    [case] = zero["cases"]
    assert (case["system"], case["workload"], case["callers"], case["agents"]) == ("unary", "S2", 16, 16)
    assert [one["requests_per_s"] for one in case["rounds"]] == [10, 30]
    assert case["median"]["requests_per_s"] == 20
