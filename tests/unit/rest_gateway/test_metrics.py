"""The metrics of several workers in one directory; workers of this process stand for processes."""

import os
from pathlib import Path

import pytest
from prometheus_client import values

from rest_gateway.metrics import DIRECTORY, Metrics, forget_process, join_workers, metrics_of


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # is put back
    return str(tmp_path)


def worker(number: int) -> Metrics:
    join_workers(number)
    return metrics_of(2)


def lines(metrics: Metrics) -> list[str]:
    return metrics.render().decode().splitlines()


def own_lines(metrics: Metrics) -> list[str]:
    """Without the processes', which change between two looks."""
    return [line for line in lines(metrics) if line.startswith("gateway_")]


def test_every_worker_tells_of_all(directory: str) -> None:
    one, two = worker(1), worker(2)
    one.count_request("/predict", "POST", 200, 0.02)
    two.count_request("/predict", "POST", 200, 0.2)
    two.count_agents("OK", 3)
    two.in_flight.inc()
    assert own_lines(one) == own_lines(two)
    assert 'gateway_requests_total{method="POST",route="/predict",status="200"} 2.0' in lines(one)
    assert 'gateway_request_duration_seconds_bucket{le="0.025",route="/predict"} 1.0' in lines(one)
    assert 'gateway_request_duration_seconds_count{route="/predict"} 2.0' in lines(one)
    assert 'gateway_agents_total{code="OK"} 3.0' in lines(one)
    assert "gateway_requests_in_flight 1.0" in lines(one)


def test_every_living_process_is_told_by_its_pid(directory: str) -> None:
    metrics = worker(1)
    Path(directory, "2.pid").write_text(str(os.getppid()))
    cpu = [line for line in lines(metrics) if line.startswith("process_cpu_seconds_total{")]
    assert [line.split("}")[0] for line in cpu] == [
        f'process_cpu_seconds_total{{pid="{pid}"' for pid in (os.getpid(), os.getppid())
    ]


def test_of_the_dead_the_counts_stay_and_their_replacement_goes_on_counting(directory: str) -> None:
    one, two = worker(1), worker(2)
    two.count_agents("OK", 3)
    two.in_flight.inc()
    forget_process(directory, 2)
    forget_process(directory, 2)  # it may have ended before it had a file
    assert 'gateway_agents_total{code="OK"} 3.0' in lines(one)
    assert "gateway_requests_in_flight 0.0" in lines(one)
    worker(2).count_agents("OK", 4)
    assert 'gateway_agents_total{code="OK"} 7.0' in lines(one)
    assert sorted(path.name for path in Path(directory).glob("counter_*")) == ["counter_1.db", "counter_2.db"]


def test_the_names_are_those_of_a_gateway_alone_but_for_the_garbage_collector(directory: str) -> None:
    def names(metrics: Metrics) -> set[str]:
        metrics.count_request("/predict", "POST", 200, 0.02)
        metrics.count_agents("OK", 1)
        metrics.count_job("text", "completed")
        return {line.split()[2] for line in lines(metrics) if line.startswith("# TYPE")}

    alone, shared = names(Metrics()), names(worker(1))
    assert {name for name in alone - shared if not name.endswith("_created")} == {
        "python_gc_objects_collected_total",
        "python_gc_objects_uncollectable_total",
        "python_gc_collections_total",
    }
    assert shared < alone
