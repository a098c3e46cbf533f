"""`python -m mock_nn` as a user runs it: flags, log lines, signals, exit codes."""

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import numpy as np
import pytest

from mock_nn.models import expected
from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc

ROW = np.array([[1, 2, 3]], dtype=np.float32)
LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) mock_nn (?P<text>.*)$")

Responses: TypeAlias = Iterator[pb.ModelStreamInferResponse]


@dataclass
class Process:
    """A running mock; its log is read line by line."""

    popen: subprocess.Popen[str]
    address: str = ""

    def read_until(self, text: str) -> str:
        """The next line that holds the text."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if text in line:
                return line.rstrip("\n")
        raise AssertionError(f"the process ended without a line with {text!r}")

    def rest_of_log(self) -> str:
        assert self.popen.stderr is not None
        return self.popen.stderr.read()


@contextlib.contextmanager
def process_with(*flags: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "mock_nn", "--listen", "127.0.0.1:0", "--drain-delay", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        try:
            process = Process(popen)
            line = process.read_until("listening on ")
            process.address = re.findall(r"listening on ([^\s\"]+)", line)[0]
            yield process
        finally:
            popen.kill()


def run_to_end(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mock_nn", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


class OpenStream:
    """A stream that is fed by hand."""

    def __init__(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        self._requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
        self.responses: Responses = stub.ModelStreamInfer(iter(self._requests.get, None))

    def ask(self, batch_id: str) -> pb.ModelStreamInferResponse:
        self._requests.put(batch_request(batch_id))
        return next(self.responses)

    def close(self) -> None:
        self._requests.put(None)


@contextlib.contextmanager
def stub_of(process: Process) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(process.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def batch_request(batch_id: str) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROW.shape)
    return pb.ModelInferRequest(model_name="m", id=batch_id, inputs=[tensor], raw_input_contents=[ROW.tobytes()])


def test_a_batch_is_one_line_of_text() -> None:
    with process_with("--latency", "0") as process, stub_of(process) as stub:
        response = stub.ModelInfer(batch_request("b\n1"))
        found = LINE.match(process.read_until(" batch "))
    assert response.raw_output_contents[0] == expected("m", "", ROW).tobytes()
    assert found is not None
    wanted = r"batch model='m' agent_type='' rows=1 dim=3 batch_id='b\\n1' seconds=[\d.e-]+ fault=''"
    assert re.fullmatch(wanted, found["text"])
    assert found["level"] == "INFO"


def test_a_batch_is_one_line_of_json() -> None:
    with process_with("--latency", "0.001", "--log-format", "json") as process, stub_of(process) as stub:
        stub.ModelInfer(batch_request("b1"))
        fields = json.loads(process.read_until("batch_id"))
    assert fields.pop("time")
    assert 0.001 <= fields.pop("seconds") < 1
    assert fields == {
        "level": "INFO",
        "message": "batch",
        "model": "m",
        "agent_type": "",
        "rows": 1,
        "dim": 3,
        "batch_id": "b1",
        "fault": "",
    }


def test_quiet_says_where_it_listens_and_nothing_about_batches() -> None:
    with process_with("--latency", "0", "--quiet") as process, stub_of(process) as stub:
        stub.ModelInfer(batch_request("b1"))
        process.popen.terminate()
        assert process.popen.wait() == 0
        assert "batch" not in process.rest_of_log()


def test_an_idle_process_ends_with_zero_at_sigterm() -> None:
    with process_with() as process:
        process.popen.terminate()
        assert process.popen.wait() == 0
        texts = [found["text"] for line in process.rest_of_log().splitlines() if (found := LINE.match(line))]
        assert texts == ["draining", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_open_stream_served_until_its_client_closes_it(number: signal.Signals) -> None:
    with process_with("--latency", "0.01") as process, stub_of(process) as stub:
        stream = OpenStream(stub)
        stream.ask("b1")
        process.popen.send_signal(number)
        process.read_until("draining")
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        for batch_id in ("b2", "b3"):
            assert stream.ask(batch_id).infer_response.id == batch_id
        stream.close()
        assert list(stream.responses) == []
        assert process.popen.wait() == 0


def test_a_batch_in_flight_at_sigterm_is_answered() -> None:
    with process_with("--latency", "0.2") as process, stub_of(process) as stub:
        stream = OpenStream(stub)
        stream.ask("b1")
        in_flight = stub.ModelInfer.future(batch_request("b2"))
        # An answer to a later call tells that the one before it has arrived.
        stub.ServerLive(pb.ServerLiveRequest())
        process.popen.terminate()
        process.read_until("draining")
        stream.close()
        assert in_flight.result().id == "b2"
        assert process.popen.wait() == 0


def test_a_second_signal_leaves_at_once() -> None:
    with process_with("--latency", "0", "--fault", "stall:every=2") as process, stub_of(process) as stub:
        stream = OpenStream(stub)
        stream.ask("b1")
        process.popen.terminate()
        process.read_until("draining")
        process.popen.terminate()
        assert process.popen.wait() == 1


def test_the_drain_timeout_ends_a_stream_that_stays_open() -> None:
    with process_with("--latency", "0", "--drain-timeout", "0.05") as process, stub_of(process) as stub:
        stream = OpenStream(stub)
        stream.ask("b1")
        process.popen.terminate()
        assert process.popen.wait() == 0
        with pytest.raises(grpc.RpcError) as cut:
            next(stream.responses)
        assert isinstance(cut.value, grpc.Call)
        assert cut.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "drain timeout open_calls=1" in process.rest_of_log()
        stream.close()


def test_a_crash_fault_is_the_end_of_the_process() -> None:
    with process_with("--latency", "0", "--fault", "crash:value=1") as process, stub_of(process) as stub:
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(batch_request("b1"))
        assert process.popen.wait() == 70


def test_a_port_in_use_is_one_line_and_exit_code_one() -> None:
    with process_with() as process:
        ended = run_to_end("--listen", process.address)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"ERROR mock_nn cannot listen on {process.address}: Address already in use")


def test_bad_flags_are_exit_code_two_and_no_traceback() -> None:
    ended = run_to_end("--fault", "sleepy")
    assert ended.returncode == 2
    assert "unknown fault 'sleepy'" in ended.stderr
    assert "Traceback" not in ended.stderr
