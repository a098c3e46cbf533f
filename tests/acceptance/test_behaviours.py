"""Eight things that users of batching servers complain of, with whole processes: what happens here instead.

The model takes 0.3 s for a batch of at most 8 rows, one batch at a time. Each test has a model of its own, so none
waits for another's rows; the mock's log is the record of what was executed.
"""

import asyncio
import re
import statistics
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import grpc.aio
import httpx
import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as oip
from protos.open_inference import open_inference_pb2_grpc as oip_grpc
from tests.acceptance.processes import Program, running
from tests.reliability.cluster import Router, Server, cluster
from tests.reliability.connection import Connection
from tests.reliability.faults import Message
from tests.reliability.ledger import Call, Key, Ledger, Matrix
from tests.reliability.witness import Context, Infer, serve

pytestmark = pytest.mark.anyio

MAX_BATCH_ROWS = 8
BATCH_S = 0.3
MAX_QUEUED_ROWS = 200
POISON = 666.0


class Stack(NamedTuple):
    """A mock, a router, and a client on one stream; what all tests share."""

    mock: Server
    router: Router
    connection: Connection

    @property
    def ledger(self) -> Ledger:
        return self.connection.ledger

    def ask(self, model: str, rows: int = 1, *, timeout_s: float = 30.0, tenant: str = "") -> Call:
        key = Key(model)
        matrix = self.ledger.make_rows(rows, key.dim)
        return self.connection.ask(key, matrix, timeout_s=timeout_s, tenant=tenant, label=tenant)

    async def plug(self, model: str) -> Call:
        """Take the model's only slot, so that what comes next waits; returns when the batch is out."""
        flying = await self.router.metric("router_batch_rows_count")
        call = self.ask(model)
        await self.router.wait_until("router_batch_rows_count", flying + 1)
        return call

    async def wait_for_queued(self, rows: int) -> None:
        await self.router.wait_until("router_queued_rows", rows)

    async def executed_rows(self, model: str, batches: int) -> list[int]:
        """Rows of each batch that the mock has executed, once there are so many lines of them."""
        async with asyncio.timeout(30):
            while len(rows := self._rows_in_log(model)) < batches:  # noqa: ASYNC110 -- another process, a thread reads it
                await asyncio.sleep(0.01)
        return rows

    def _rows_in_log(self, model: str) -> list[int]:
        lines = "\n".join(self.mock.program.lines_so_far())
        return [int(rows) for rows in re.findall(rf" batch model='{model}' .*rows=(\d+) ", lines)]


@pytest.fixture(scope="module")
async def stack(anyio_backend: str) -> AsyncIterator[Stack]:
    mock = Server("--latency", f"{BATCH_S}", "--fault", f"poison:value={POISON:g}")
    models = [{"backend": "nn", "max_batch_size": MAX_BATCH_ROWS}]
    limits = {"max_queued_rows": MAX_QUEUED_ROWS}
    async with cluster(
        {"nn": [mock]}, backend={"max_in_flight": 1}, models=models, limits=limits, trust_tenant=True
    ) as router:
        connection = Connection(Ledger(), router.address)
        async with connection.running():
            yield Stack(mock, router, connection)


async def ended(calls: Sequence[Call]) -> None:
    """Until every call has its end."""
    async with asyncio.timeout(30):
        await asyncio.gather(*(call.ended for call in calls))


async def test_one_bad_row_among_eight_fails_alone(stack: Stack) -> None:
    key = Key("one bad row")
    plug = await stack.plug(key.model_name)
    bad: Matrix = np.array([[POISON, 0, 0, 0]], "<f4")
    rows = [*(stack.ledger.make_rows(1, key.dim) for _ in range(MAX_BATCH_ROWS - 1)), bad]
    calls = [stack.connection.ask(key, row) for row in rows]
    await ended([plug, *calls])
    assert (await stack.executed_rows(key.model_name, 2))[:2] == [1, MAX_BATCH_ROWS]
    assert [dict(call.codes) for call in calls[:-1]] == [{"": 1}] * (MAX_BATCH_ROWS - 1)
    assert not calls[-1].codes[""]
    assert stack.ledger.problems == []


async def test_a_request_of_20_rows_is_three_batches_and_one_answer(stack: Stack) -> None:
    call = stack.ask("large request", 20)
    await ended([call])
    assert sorted(await stack.executed_rows("large request", 3)) == [4, 8, 8]
    assert dict(call.codes) == {"": 20}
    assert stack.ledger.problems == []


async def test_a_full_queue_refuses_at_once_with_a_time_to_come_back(stack: Stack) -> None:
    """The median of many refusals, each asked when the last was answered: a machine that does other things as well
    makes some of them slow, and not the half of them."""
    reason = 'router_refusals_total{reason="queue_rows"}'
    before = (await stack.router.metrics()).get(reason, 0)
    waiting = [await stack.plug("full queue")]
    waiting += [stack.ask("full queue", MAX_BATCH_ROWS) for _ in range(MAX_QUEUED_ROWS // MAX_BATCH_ROWS)]
    await stack.wait_for_queued(MAX_QUEUED_ROWS)
    refused = []
    for _ in range(21):
        refused.append(stack.ask("full queue", MAX_BATCH_ROWS))
        await ended(refused)
    for call in waiting:
        stack.connection.cancel(call)
    assert [dict(call.codes) for call in refused] == [{"RESOURCE_EXHAUSTED": MAX_BATCH_ROWS}] * len(refused)
    assert all(call.pushback_ms[0] > 0 for call in refused)
    assert statistics.median(call.latency_s for call in refused) < 0.005
    assert (await stack.router.metrics())[reason] - before == len(refused) * MAX_BATCH_ROWS
    await stack.wait_for_queued(0)


async def test_a_short_deadline_behind_a_long_batch_is_answered_in_time_and_never_executed(stack: Stack) -> None:
    plug = await stack.plug("short deadline")
    hasty = stack.ask("short deadline", timeout_s=BATCH_S / 4)
    patient = stack.ask("short deadline")
    await ended([plug, hasty, patient])
    assert dict(hasty.codes) == {"DEADLINE_EXCEEDED": 1}
    assert hasty.latency_s < BATCH_S / 2
    assert dict(patient.codes) == {"": 1}
    assert await stack.executed_rows("short deadline", 2) == [1, 1]
    assert stack.ledger.problems == []


class Scaling:
    """A model whose answer is each row times the parameter `scale` of its batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, int]] = []

    async def infer(self, request: oip.ModelInferRequest, _context: Context) -> list[Message]:
        await asyncio.sleep(BATCH_S / 3)
        scale = request.parameters["scale"].double_param
        values = np.frombuffer(request.raw_input_contents[0], "<f4") * np.float32(scale)
        self.batches.append((scale, len(values)))
        response = oip.ModelInferResponse(id=request.id, raw_output_contents=[values.tobytes()])
        response.outputs.add(name="output", datatype="FP32", shape=[len(values)])
        return [Message(infer_response=response)]


class Here(Server):
    """A model server in this process."""

    def __init__(self, infer: Infer) -> None:
        super().__init__()
        self._infer = infer
        self.server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self.server = await serve(self.addresses[0], self._infer)


def scaling_request(value: float, scale: float) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="scaling", raw_input_contents=[np.array([value], "<f4").tobytes()])
    request.inputs.add(name="vector", datatype="FP32", shape=[1, 1])
    request.parameters["scale"].double_param = scale
    return request


async def test_parameters_of_requests_that_wait_together_never_leak() -> None:
    model = Scaling()
    here = Here(model.infer)
    settings = [{"backend": "nn", "max_batch_size": MAX_BATCH_ROWS, "send_agent_type": False}]
    asked = [(float(value), float(value % 2 + 1)) for value in range(1, 17)]
    async with (
        cluster({"nn": [here]}, backend={"max_in_flight": 1}, models=settings) as router,
        grpc.aio.insecure_channel(router.address, options=[("grpc.enable_http_proxy", 0)]) as channel,
    ):
        stub: oip_grpc.GRPCInferenceServiceAsyncStub = oip_grpc.GRPCInferenceServiceStub(channel)
        answers = await asyncio.gather(*(stub.ModelInfer(scaling_request(*one)) for one in asked))
    assert here.server
    await here.server.stop(None)
    outputs = [float(np.frombuffer(answer.raw_output_contents[0], "<f4")[0]) for answer in answers]
    assert outputs == [value * scale for value, scale in asked]
    assert sum(rows for _, rows in model.batches) == len(asked)
    assert len(model.batches) < len(asked), "nothing was merged, so nothing was shown"


async def test_a_cancelled_caller_leaves_its_neighbours_unharmed(stack: Stack) -> None:
    """One of eight gives up while they wait, another one while they are in one batch."""
    plug = await stack.plug("cancelled neighbour")
    calls = [stack.ask("cancelled neighbour") for _ in range(MAX_BATCH_ROWS)]
    await stack.wait_for_queued(MAX_BATCH_ROWS)
    stack.connection.cancel(calls[2])
    await ended([plug])
    await stack.wait_for_queued(0)
    stack.connection.cancel(calls[5])
    await ended(calls)
    assert [dict(call.codes) for call in calls] == [{} if number in (2, 5) else {"": 1} for number in range(8)]
    assert await stack.executed_rows("cancelled neighbour", 2) == [1, MAX_BATCH_ROWS - 1]
    assert stack.ledger.problems == []


async def test_two_tenants_that_offer_ten_to_one_are_served_one_to_one_while_both_wait(stack: Stack) -> None:
    plug = await stack.plug("two tenants")
    ends: list[str] = []
    stack.ledger.on_end = lambda call: ends.append(call.label)
    many = [stack.ask("two tenants", tenant="many") for _ in range(80)]
    few = [stack.ask("two tenants", tenant="few") for _ in range(8)]
    await ended([plug, *few])
    stack.ledger.on_end = lambda _: None
    for call in many:
        stack.connection.cancel(call)
    # Half of each of two batches; the plug's end is the first.
    first_two_batches = ends[1 : 1 + 2 * MAX_BATCH_ROWS]
    assert first_two_batches.count("few") == first_two_batches.count("many") == MAX_BATCH_ROWS
    assert stack.ledger.problems == []


async def test_a_cancelled_job_stays_cancelled(stack: Stack) -> None:
    """While its row is at the model. That a killed gateway's jobs are claimed again and end once:
    `test_jobs_chaos.py`."""
    with running("rest_gateway", GATEWAY_LISTEN="127.0.0.1:0", GATEWAY_ROUTER=stack.router.address) as gateway:
        address = await asyncio.to_thread(_listening, gateway)
        sent = await stack.router.metric("router_batch_rows_count")
        async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
            path = (await client.post("/predict", json={"text": "Well done!"})).headers["location"]
            await stack.router.wait_until("router_batch_rows_count", sent + 1)
            assert (await client.post(f"{path}/cancel")).status_code == 200
            # The text's batch is over, with or without anybody to answer.
            await stack.router.left_over()
            job = (await client.get(path)).json()
    assert (job["status"], job["result"]) == ("cancelled", None)


def _listening(gateway: Program) -> str:
    return gateway.wait_for(r"listening on (http://[\d.:]+)")[1]
