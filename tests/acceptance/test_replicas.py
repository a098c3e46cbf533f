"""Replicas that freeze, are slow, fail half of the time, come and go, as whole processes under load.

The load is a few callers in a closed loop; each row's answer is checked against the mock's function, so that no late or
foreign answer can pass.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc as pb_grpc
from tests.acceptance.processes import Program, running

CALLERS = 8
PATIENCE_S = 60.0


class Load:
    """Callers in a closed loop; what they saw."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._is_over = threading.Event()
        self._answered = threading.Condition()
        self.answers = 0
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, answers: int) -> None:
        """Until so many more rows are answered."""
        with self._answered:
            target = self.answers + answers
            assert self._answered.wait_for(lambda: self.answers >= target, PATIENCE_S), f"{self.answers} of {target}"

    def _call(self, number: int) -> None:
        with grpc.insecure_channel(self._address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = pb_grpc.InferenceRouterServiceStub(channel)
            at = 0
            while not self._is_over.is_set():
                at += 1
                self._infer(stub, [float(number), float(at)])

    def _infer(self, stub: "pb_grpc.InferenceRouterServiceStub", row: list[float]) -> None:
        request = pb.PredictRequest(agents={"one": pb.Agent(model_name="churn", vector=row)})
        try:
            (answer,) = stub.Predict(request, timeout=PATIENCE_S).results["one"].output
        except grpc.RpcError as error:
            self.faults.append(str(error))
            return
        (truth,) = expected("churn", "", np.array([row], "<f4"))
        if answer != truth:
            self.faults.append(f"{row} was answered {answer}, not {truth}")
        with self._answered:
            self.answers += 1
            self._answered.notify_all()


@contextmanager
def mock(*arguments: str, listen: str = "127.0.0.1:0") -> Iterator[tuple[Program, str]]:
    with running("mock_nn", "--listen", listen, *arguments) as program:
        yield program, program.wait_for(r"listening on (\S+)")[1]


@contextmanager
def router(path: Path, addresses: list[str], **backend: object) -> Iterator[tuple[Program, Load]]:
    """A router under load that must end without a fault."""
    settings = {
        "listen": "127.0.0.1:0",
        "metrics": None,
        "drain_delay_s": 0,
        "backends": {"mock": {"addresses": addresses, **backend}},
        "models": [{"backend": "mock", "max_batch_size": 4, "retries": 10}],
    }
    config = path / "router.yaml"
    config.write_text(yaml.safe_dump(settings))
    with running("router", "--config", str(config)) as program:
        load = Load(program.wait_for(r"router listens on ([\d.:]+)")[1])
        load.start()
        try:
            yield program, load
        finally:
            load.stop()
        assert load.faults == []


def test_the_rows_of_a_frozen_process_run_elsewhere_and_it_is_back_when_it_wakes(tmp_path: Path) -> None:
    with ExitStack() as stack:
        (frozen, address), (_, other) = (stack.enter_context(mock("--latency", "0.05")) for _ in range(2))
        program, load = stack.enter_context(router(tmp_path, [address, other], probe_interval_s=1, max_in_flight=1))
        load.wait_for_more(100)
        frozen.send(signal.SIGSTOP)
        program.wait_for(f"backend {address} gives no sign of life: its [1-9]")
        load.wait_for_more(100)
        frozen.send(signal.SIGCONT)
        program.wait_for(f"backend {address} answers again")
        load.wait_for_more(100)


def test_a_slow_replica_is_ejected_and_returns_after_the_cure(tmp_path: Path) -> None:
    with ExitStack() as stack:
        good = [stack.enter_context(mock("--latency", "0.05"))[1] for _ in range(2)]
        with mock("--latency", "0.3") as (_, address):
            program, load = stack.enter_context(router(tmp_path, [*good, address], ejection_s=1, max_in_flight=1))
            program.wait_for(f"backend {address} ejected for 1 s: .* times as slow as its peers")
        with mock("--latency", "0.05", listen=address):
            program.wait_for(f"backend {address} is back")
            load.wait_for_more(100)


def test_a_replica_that_fails_half_of_its_batches_is_ejected_and_no_row_is_lost(tmp_path: Path) -> None:
    with ExitStack() as stack:
        good = [stack.enter_context(mock("--latency", "0.02"))[1] for _ in range(2)]
        _, address = stack.enter_context(mock("--latency", "0.02", "--fault", "drop:rate=0.5", "--seed", "5"))
        program, load = stack.enter_context(router(tmp_path, [*good, address], ejection_s=1, max_in_flight=1))
        program.wait_for(f"backend {address} ejected for 1 s")
        load.wait_for_more(200)


@pytest.mark.parametrize("is_atomic", [True, False])
def test_the_file_of_addresses_changes_under_load_and_nothing_is_lost(tmp_path: Path, is_atomic: bool) -> None:
    listed = tmp_path / "replicas"

    def write(*addresses: str) -> None:
        target = tmp_path / "next" if is_atomic else listed
        target.write_text("# replicas\n" + "\n".join(addresses) + "\n")
        if is_atomic:
            target.rename(listed)

    with ExitStack() as stack:
        addresses = [stack.enter_context(mock("--latency", "0.05"))[1] for _ in range(3)]
        write(addresses[0])
        program, load = stack.enter_context(router(tmp_path, [f"file:{listed}"]))
        load.wait_for_more(50)
        write(*addresses[1:])
        program.wait_for(f"backend {addresses[0]} left")
        load.wait_for_more(50)
        listed.write_text("no address\n")
        program.wait_for("replicas: line 1: 'no address' is not HOST:PORT; the 2 addresses known of it stay")
        load.wait_for_more(50)
        write(*addresses)
        program.wait_for(f"backend {addresses[0]} connected")
        load.wait_for_more(50)
