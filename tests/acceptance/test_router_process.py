"""The router as a process: settings, exit codes, signals, logs."""

import json
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from tests.acceptance.processes import Program, running

REQUEST = pb.PredictRequest(agents={"alice": pb.Agent(model_name="churn", vector=[1, 2])})


@contextmanager
def router(*arguments: str, backend: str = "127.0.0.1:1", **environment: str) -> Iterator[Program]:
    given = {
        "ROUTER_LISTEN": "127.0.0.1:0",
        "ROUTER_METRICS": "127.0.0.1:0",
        "ROUTER_BACKENDS__MOCK__ADDRESSES": json.dumps([backend]),
        "ROUTER_DRAIN_DELAY_S": "0",
    }
    with running("router", *arguments, **{**given, **environment}) as program:
        yield program


@contextmanager
def stub_of(address: str) -> Iterator["pb_grpc.InferenceRouterServiceStub"]:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield pb_grpc.InferenceRouterServiceStub(channel)


def listening(program: Program) -> str:
    return program.wait_for(r"router listens on ([\d.:]+)")[1]


def test_check_config_prints_what_is_in_effect(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text("default_timeout_s: 7\nbackends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: mock}]")
    with running("router", "--config", str(path), "--check-config", ROUTER_MAX_TIMEOUT_S="8") as program:
        assert program.wait() == 0
        shown = yaml.safe_load(program.stdout())
    assert (shown["default_timeout_s"], shown["max_timeout_s"]) == (7, 8)


def test_a_wrong_setting_is_named_in_a_line_and_ends_the_router_with_2(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text("lisen: 127.0.0.1:1\nbackends: {mock: {addresses: ['h:1']}}\nmodels: [{backend: mock}]")
    with running("router", "--config", str(path)) as program:
        assert program.wait() == 2
        assert program.lines == ["router: lisen: Extra inputs are not permitted"]


@pytest.mark.parametrize("setting", ["ROUTER_LISTEN", "ROUTER_METRICS"])
def test_a_port_in_use_is_told_in_a_line_and_ends_the_router_with_1(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with router(**{setting: address}) as program:
            assert program.wait() == 1
            (line,) = [line for line in program.lines if line.startswith("router: ")]
            assert address in line
            assert "Address already in use" in line
            assert not any("Traceback" in line for line in program.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_router_answer_what_it_accepted(number: signal.Signals) -> None:
    with running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "1") as mock:
        backend = mock.wait_for(r"listening on (\S+)")[1]
        with router(backend=backend) as program, stub_of(listening(program)) as stub:
            answer = stub.Predict.future(REQUEST)
            program.wait_for("connected")
            _wait_for_an_open_call(program)
            program.send(number)
            program.wait_for("draining")
            assert len(answer.result(timeout=10).results["alice"].output) == 1
            assert program.wait() == 0


def _wait_for_an_open_call(program: Program) -> None:
    (line,) = [line for line in program.lines if "metrics on" in line]
    while _metric(line.split("metrics on ")[1], "router_open_calls") < 1:
        pass  # each look is a request of its own


def _metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url) as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def test_a_second_signal_leaves_at_once() -> None:
    with router(ROUTER_DRAIN_DELAY_S="600") as program:
        listening(program)
        program.send(signal.SIGTERM)
        program.wait_for("draining")
        program.send(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM


def test_metrics_tell_of_requests_rows_and_batches() -> None:
    with running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "0") as mock:
        backend = mock.wait_for(r"listening on (\S+)")[1]
        with router(backend=backend) as program:
            url = program.wait_for(r"metrics on (\S+)")[1]
            with stub_of(listening(program)) as stub:
                stub.Predict(REQUEST)
            assert _metric(url, "router_rows_total") == 1
            assert _metric(url, "router_queued_rows") == 0
            assert _metric(url, 'router_requests_total{code="OK",method="Predict"}') == 1
            assert _metric(url, 'router_batches_total{backend="mock",outcome="answered"}') == 1
            assert _metric(url, 'router_batch_rows_sum{backend="mock"}') == 1
            assert _metric(url, 'router_ready_replicas{backend="mock"}') == 1


BAD = pb.PredictRequest(agents={"a": pb.Agent(model_name="m")})


@pytest.mark.parametrize(("log_requests", "lines"), [("off", 0), ("errors", 1), ("all", 2)])
def test_requests_are_logged_as_asked_with_their_id(log_requests: str, lines: int) -> None:
    with running("mock_nn", "--listen", "127.0.0.1:0", "--latency", "0") as mock:
        backend = mock.wait_for(r"listening on (\S+)")[1]
        with router(backend=backend, ROUTER_LOG_FORMAT="json", ROUTER_LOG_REQUESTS=log_requests) as program:
            with stub_of(listening(program)) as stub:
                stub.Predict(REQUEST, metadata=(("x-request-id", "good"),))
                with pytest.raises(grpc.RpcError):
                    stub.Predict(BAD, metadata=(("x-request-id", "bad"),))
            program.send(signal.SIGTERM)
            assert program.wait() == 0
            records = [json.loads(line) for line in program.lines]
            told = [record for record in records if record["name"] == "router.access"]
            assert [(record["request_id"], record["code"]) for record in told] == [
                ("good", "OK"),
                ("bad", "INVALID_ARGUMENT"),
            ][2 - lines :]


def test_a_text_log_tells_the_request_id_at_the_end_of_its_line() -> None:
    with router() as program:
        with stub_of(listening(program)) as stub, pytest.raises(grpc.RpcError):
            stub.Predict(BAD, metadata=(("x-request-id", "my id"),))
        program.wait_for(r"router\.access: Predict INVALID_ARGUMENT, 1 rows in .*: vector is empty request_id=my id$")


def test_a_client_that_pings_every_five_seconds_is_not_sent_away() -> None:
    """gRPC ignores options that it does not know: with one misspelt, idle clients met "too many pings" after 30 s."""
    options = [("grpc.keepalive_time_ms", 5_200), ("grpc.http2.max_pings_without_data", 0)]
    with router() as program, grpc.insecure_channel(listening(program), options=options) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest())
        next(watch)
        is_over = threading.Event()
        watch.add_callback(is_over.set)
        assert not is_over.wait(timeout=20)  # three pings; the third is one too many where 300 s are asked for
        watch.cancel()
