"""A real Triton behind the router, as backend of streams and of calls."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from router_client import Agent, RouterClient
from tests.acceptance.processes import fixed_ports
from tests.interop.asking import Asked, Client, Given, GrpcAio
from tests.interop.cases import error_of
from tests.interop.report import NOTE
from tests.interop.stack import started_router
from tests.interop.triton import started_triton, why_not
from tests.interop.values import Array, vectors

pytestmark = pytest.mark.anyio

SYSTEM = "Triton"
# What Triton takes; the router would send more.
MAX_BATCH = 16
BAD_NUMBER = 666.0
BAD_ROW = "this row is beyond me"
PATIENCE_S = 60
# By agent type: which backend.
PROTOCOLS = ("stream", "unary")


@dataclass
class Served:
    """A Triton that can be ended, and the router before it."""

    ports: list[int]
    workspace: Path
    router: str = ""
    process: ExitStack = field(default_factory=ExitStack)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def start(self, *models: str) -> None:
        self.process.enter_context(started_triton(self.ports, self.workspace, *models))

    def stop(self) -> None:
        self.process.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if reason := why_not():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("triton")
    with ExitStack() as stack:
        server = Served(fixed_ports(3), directory / "workspace")
        stack.callback(server.stop)
        server.start()
        backends = {name: {"addresses": [server.address], "protocol": name, "max_in_flight": 1} for name in PROTOCOLS}
        models = [{"match": {"agent_type": name}, "backend": name} for name in PROTOCOLS]
        server.router, _ = stack.enter_context(started_router(directory, backends, [*models, {"backend": "stream"}]))
        yield server


@pytest.fixture(scope="module", params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
async def client(served: Served) -> AsyncIterator[Client]:
    async with tritonclient.grpc.aio.InferenceServerClient(served.router) as through_router:
        yield through_router


@pytest.fixture(scope="module")
async def triton(served: Served) -> AsyncIterator[Client]:
    async with tritonclient.grpc.aio.InferenceServerClient(served.address) as direct:
        yield direct


def by(protocol: str, model: str, **inputs: Given) -> Asked:
    return Asked(model, inputs, (), {"parameters": {"agent_type": protocol}})


def scaled(protocol: str, rows: Array) -> Asked:
    return by(protocol, "scale", features=Given("FP32", rows))


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
async def test_requests_of_any_size_are_cut_to_what_triton_takes(client: Client, protocol: str, rows: int) -> None:
    given = vectors(rows, dim=4)
    outputs = (await GrpcAio(client).infer(scaled(protocol, given))).outputs
    assert outputs["scores"].tobytes() == (2 * given).tobytes()
    assert outputs["sums"].tolist() == given.sum(axis=1, keepdims=True).tolist()


async def test_the_answer_is_triton_s_own(client: Client, triton: Client, protocol: str) -> None:
    asked = scaled(protocol, vectors(3, dim=4))
    through, direct = await GrpcAio(client).infer(asked), await GrpcAio(triton).infer(asked)
    assert through.outputs.keys() == direct.outputs.keys()
    assert all(through.outputs[name].tobytes() == direct.outputs[name].tobytes() for name in direct.outputs)


async def test_texts_come_back_in_capitals(client: Client, protocol: str) -> None:
    texts = np.array([[f"text {number}".encode()] for number in range(20)], np.object_)
    outputs = (await GrpcAio(client).infer(by(protocol, "loud", text=Given("BYTES", texts)))).outputs
    assert outputs["loud"].tolist() == [[text.upper()] for (text,) in texts.tolist()]


async def test_a_model_without_batches_gets_whole_requests(client: Client, protocol: str) -> None:
    """Its first dimension is variable, too: only the configuration tells that it is none of rows."""
    ask = GrpcAio(client)
    asked = [by(protocol, "total", matrix=Given("FP32", np.ones((rows, 3), np.float32))) for rows in (1, 2, 5)]
    answers = await asyncio.gather(*map(ask.infer, asked))
    assert [answer.outputs["total"].tolist() for answer in answers] == [[3.0], [6.0], [15.0]]


async def test_a_decoupled_model_is_refused_in_words(client: Client, protocol: str) -> None:
    error = await error_of(GrpcAio(client), by(protocol, "stepwise", x=Given("FP32", np.ones(1, np.float32))))
    assert (error.status(), "decoupled" in error.message()) == ("StatusCode.UNIMPLEMENTED", True)


async def test_a_bad_row_fails_alone(client: Client, protocol: str) -> None:
    given = [vectors(1, dim=4, seed=number) for number in range(8)]
    given[5][0, 0] = BAD_NUMBER
    ask = GrpcAio(client)
    answers = await asyncio.gather(*(ask.infer(scaled(protocol, rows)) for rows in given), return_exceptions=True)
    (error,) = [answer for answer in answers if isinstance(answer, InferenceServerException)]
    assert (error.status(), BAD_ROW in error.message(), answers.index(error)) == ("StatusCode.UNKNOWN", True, 5)


async def test_native_agents_reach_its_tensors_by_their_metadata(served: Served, protocol: str) -> None:
    async with RouterClient(served.router) as ours:
        results = await ours.predict({"me": Agent("scale", [1.0, 2.0, 3.0, 4.0], protocol)})
    assert results["me"].output == [2.0, 4.0, 6.0, 8.0]


async def test_rows_of_64_callers_share_triton_s_executions(
    client: Client, triton: Client, protocol: str, record_property: Callable[[str, object], None]
) -> None:
    async def counted() -> tuple[int, int]:
        (told,) = (await triton.get_inference_statistics("scale", as_json=True))["model_stats"]
        return int(told["inference_count"]), int(told["execution_count"])

    before = await counted()
    ask = GrpcAio(client)
    given = [vectors(1, dim=4, seed=number) for number in range(256)]
    answers = await asyncio.gather(*(ask.infer(scaled(protocol, rows)) for rows in given))
    assert all(
        answer.outputs["scores"].tobytes() == (2 * rows).tobytes() for answer, rows in zip(answers, given, strict=True)
    )
    after = await counted()
    rows, executions = after[0] - before[0], after[1] - before[1]
    record_property(NOTE, f"{protocol}: {rows} rows in {executions} executions")
    assert (rows, rows / executions > MAX_BATCH / 2) == (256, True)


async def test_metadata_are_triton_s_own(client: Client, triton: Client) -> None:
    for model in ("scale", "loud", "total"):
        through = await client.get_model_metadata(model, as_json=True)
        direct = await triton.get_model_metadata(model, as_json=True)
        assert (through["inputs"], through["outputs"]) == (direct["inputs"], direct["outputs"])


async def test_a_model_that_is_unloaded_is_not_ready(client: Client, triton: Client) -> None:
    assert await client.is_model_ready("loud") is True
    await triton.unload_model("loud")
    assert await client.is_model_ready("loud") is False
    index = (await client.get_model_repository_index(as_json=True))["models"]
    assert {entry["name"]: entry["state"] for entry in index}["scale"] == "READY"


# What callers may be told while the only server stops and starts.
GONE = ("StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE")


async def test_callers_outlive_a_triton_that_is_started_again(
    client: Client, served: Served, record_property: Callable[[str, object], None]
) -> None:
    """It goes while they ask. Who has heard three times that it stops is told UNAVAILABLE, which clients try again, and
    its last words are that it has no model; else whoever asked in between has waited.

    The new one keeps its index to itself, as PyTriton does by default.
    """
    ask = GrpcAio(client)
    is_back = asyncio.Event()
    told: list[str] = []

    async def caller(number: int) -> None:
        is_last = False
        while not is_last:
            is_last = is_back.is_set()
            given = vectors(1, dim=4, seed=number)
            try:
                outputs = (await ask.infer(scaled(PROTOCOLS[number % 2], given))).outputs
            except InferenceServerException as error:
                if is_last or error.status() not in GONE:
                    raise
                told.append(error.status())
                await until_served(ask)
            else:
                assert outputs["scores"].tobytes() == (2 * given).tobytes()
                told.append("answered")

    callers = [asyncio.ensure_future(caller(number)) for number in range(8)]
    await asyncio.to_thread(served.stop)
    while_it_stopped = len(told)
    await asyncio.to_thread(served.start, "scale")
    await until_served(ask)
    is_back.set()
    await asyncio.gather(*callers)
    assert told[while_it_stopped:].count("answered") >= len(callers)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(Counter(told).items()))
    record_property(NOTE, f"restart: {counts}")


async def until_served(ask: GrpcAio) -> None:
    """By both backends: each asks for itself what Triton has."""
    async with asyncio.timeout(PATIENCE_S):
        for protocol in PROTOCOLS:
            while await is_unknown(ask, protocol):
                pass


async def is_unknown(ask: GrpcAio, protocol: str) -> bool:
    try:
        await ask.infer(scaled(protocol, vectors(1, dim=4)))
    except InferenceServerException as error:
        if error.status() not in GONE:
            raise
        return True
    return False
