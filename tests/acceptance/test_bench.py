"""The benchmark as `make bench` runs it, only much smaller: what it prints and writes, and that it leaves nothing."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree as ET

import pytest

from bench.processes import running
from tests.acceptance.processes import ROOT

TINY = ["--quick", "--callers", "1", "--seconds", "0.2", "--held-calls", "200", "--held-latency-s", "0.5"]
SYSTEMS = ("echo", "unary", "stream", "rest")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc, as the figures of CPU and memory do")


@pytest.fixture
def databases() -> Iterator[pathlib.Path]:
    """A place that PostgreSQL's own user may enter, when root runs the tests; `tmp_path` is not."""
    with tempfile.TemporaryDirectory(prefix="jobs-") as directory:
        path = pathlib.Path(directory)
        path.chmod(0o711)
        yield path


@contextmanager
def bench(scratch: pathlib.Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Everything it writes is below `scratch`, where its programs live."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *TINY, "--output", str(scratch / "out"), *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch), "ROUTER_LISTEN": "not an address", "http_proxy": "http://nowhere"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def programs_in(scratch: pathlib.Path) -> list[str]:
    """The command lines of the processes that live below `scratch`."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(scratch):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has gone meanwhile
            continue
    return found


def test_every_case_is_measured_printed_and_written_and_nothing_stays(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path, "--groups", "zero,lone,slot,full,held") as run:
        printed, progress = run.communicate(timeout=100)
    assert run.returncode == 0, progress
    assert "left: zero: starting echo, unary, stream, rest, infer" in progress
    for title in ("one vector per request", "16 agents over 4 models", "The lone request", "50 ms slot", "Held open"):
        assert title in printed

    [path] = (tmp_path / "out").glob("*.json")
    content = json.loads(path.read_text())
    assert content["command"].startswith("python -m bench --quick")
    assert content["machine"]["cores"] >= 1
    assert "grpcio" in content["versions"]
    cases = {
        (group["name"], case["system"], case["workload"], case["callers"]): case["median"]
        for group in content["groups"]
        for case in group["cases"]
    }
    assert set(cases) == {
        *(("zero", system, workload, 1) for system in SYSTEMS for workload in ("S1", "S2")),
        ("zero", "infer", "S1", 1),
        *(("lone", system, "S1", 1) for system in SYSTEMS),
        *(("slot", system, "S1", 64) for system in ("unary", "stream")),
        ("full", "stream", "S1", 512),
        ("held", "stream", "held", 200),
    }
    answered = {name: median for name, median in cases.items() if median["requests_per_s"] > 0}
    assert len(answered) >= len(cases) - 2  # a busy machine may stand still for the whole 0.2 s of a case
    for name, median in cases.items():
        assert (median["failed"], median["failure"]) == (0, ""), name
    for name, median in answered.items():
        assert 0 < median["p50_ms"] <= median["p99_ms"], name
        assert median["router_us_per_vector"] > 0, name
        assert 10 < median["router_rss_mb"] < 1000, name
        assert (median["gateway_us_per_vector"] is not None) == (name[1] == "rest"), name
        assert (median["batch_rows"] is not None) == (name[1] != "echo"), name
    assert {case["batch_rows"] for name, case in answered.items() if name == ("zero", "stream", "S2", 1)} <= {4}
    assert cases["held", "stream", "held", 200]["p50_ms"] > 500

    [picture] = (tmp_path / "out").glob("*.svg")
    assert ET.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert programs_in(tmp_path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_jobs_are_measured_on_both_databases_and_no_database_stays(
    tmp_path: pathlib.Path, databases: pathlib.Path
) -> None:
    small = ("--groups", "jobs", "--job-rows", "5000", "--seconds", "0.05", "--job-databases", str(databases))
    with bench(tmp_path, *small) as run:
        printed, progress = run.communicate(timeout=100)
    assert run.returncode == 0, progress
    assert f"Databases in {databases}, where a write of 8 KiB with its fsync takes" in printed
    assert "not measured" not in printed

    [path] = (tmp_path / "out").glob("*.json")
    [jobs] = json.loads(path.read_text())["groups"]
    medians = {(case["system"], case["workload"], case["rate_per_s"]): case["median"] for case in jobs["cases"]}
    assert set(medians) == {
        *((name, "submit", rate) for name in ("sqlite", "postgresql") for rate in (0, 200)),
        *(
            (f"{name}-store", asked, 0)
            for name in ("sqlite", "postgresql")
            for asked in ("claim-finish", "claim", "page")
        ),
    }
    for name, median in medians.items():
        assert (median["failed"], median["failure"]) == (0, ""), name
    assert programs_in(tmp_path) == programs_in(databases) == []
    assert list(databases.iterdir()) == []


def test_a_signal_ends_it_with_everything_it_has_started(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path, "--groups", "held", "--held-latency-s", "60") as run:
        assert run.stderr is not None
        while "round 1" not in run.stderr.readline():
            pass
        assert len(programs_in(tmp_path)) == 3  # load, mock, router
        run.send_signal(signal.SIGINT)
        _, rest = run.communicate(timeout=30)
    assert run.returncode == 130
    assert rest.splitlines()[-1] == "bench: interrupted"
    assert programs_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_its_postgresql_also_while_the_rest_is_being_started(
    tmp_path: pathlib.Path, databases: pathlib.Path
) -> None:
    with bench(tmp_path, "--groups", "jobs", "--job-databases", str(databases)) as run:
        while not any("postgres" in program for program in programs_in(databases)):
            assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        _, rest = run.communicate(timeout=30)
    assert run.returncode == 130
    assert rest.splitlines()[-1] == "bench: interrupted"
    assert programs_in(tmp_path) == programs_in(databases) == []
    assert list(tmp_path.iterdir()) == list(databases.iterdir()) == []


def test_a_program_that_does_not_start_is_named_with_its_own_words(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path, "--groups", "held", "--set", "ROUTER_DRAIN_DELAY_S=never") as run:
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "bench: router of stream ended by itself (exit code 2)" in errors
    assert "drain_delay_s" in errors
    assert "Traceback" not in errors
    assert programs_in(tmp_path) == []


def test_a_bad_argument_is_refused_before_anything_starts(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path, "--groups", "zero,fast") as run:
        _, errors = run.communicate(timeout=30)
    assert run.returncode == 2
    assert "no group fast; there are zero, lone, slot, full, held, jobs" in errors


@pytest.mark.anyio
async def test_what_a_program_uses_is_told_while_its_threads_come_and_go(tmp_path: pathlib.Path) -> None:
    """Bug: a thread of gRPC that ended between two looks into /proc passed for the end of its process."""
    threads = ("import threading", "thread = threading.Thread(target=int); thread.start(); thread.join()")
    arguments = ("timeit", "-n", "1000000", "-s", *threads)
    async with running("threads", *arguments, environment=dict(os.environ), directory=tmp_path) as program:
        usages = [program.usage() for _ in range(5000)]
        assert usages[0] is not None
        assert usages[-1] is not None
        assert usages[0].cpu_s < usages[-1].cpu_s
        assert usages[-1].rss_bytes > 1_000_000
