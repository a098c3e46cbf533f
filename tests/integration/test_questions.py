"""What a replica finds out about its server's models, over gRPC."""

import grpc
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.core.model_info import IndexEntry, ModelInfo, ModelReport, ModelState, TensorInfo
from router.dispatch.replica import Replica
from router.errors import StreamLost
from tests.open_inference_server import OpenInferenceServer, ServedModel, metadata

pytestmark = pytest.mark.anyio

TOLD = metadata("m", [("x", "FP32", (-1, 4)), ("mask", "BOOL", (-1, 4))], [("y", "FP64", (-1,))])
CONFIG = pb.ModelConfig(
    name="m",
    max_batch_size=16,
    input=[pb.ModelInput(name="x"), pb.ModelInput(name="mask", optional=True)],
    model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    sequence_batching=pb.ModelSequenceBatching(),
)
INPUTS = (TensorInfo("x", "FP32", (-1, 4)), TensorInfo("mask", "BOOL", (-1, 4)))
INFO = ModelInfo("m", "test", ("1",), INPUTS, (TensorInfo("y", "FP64", (-1,)),))


async def ask(server: OpenInferenceServer, name: str = "m") -> ModelReport:
    replica = Replica(server.address, batch_timeout_s=5, max_message_bytes=2**20, max_in_flight=1)
    replica.start(lambda: None)
    try:
        return await replica.describe((name, ""))
    finally:
        await replica.aclose()


async def test_metadata_comes_as_it_is_told() -> None:
    async with OpenInferenceServer({"m": ServedModel(TOLD)}) as server:
        assert await ask(server) == ModelReport(ModelState.READY, INFO)


async def test_tritons_configuration_tells_of_batches_sequences_answers_and_optional_inputs() -> None:
    async with OpenInferenceServer({"m": ServedModel(TOLD, config=CONFIG)}) as server:
        info = (await ask(server)).info
    assert info is not None
    assert (info.max_batch_size, info.is_decoupled, info.is_sequence) == (16, True, True)
    assert [tensor.is_optional for tensor in info.inputs] == [False, True]


async def test_a_model_may_be_there_and_not_ready() -> None:
    async with OpenInferenceServer({"m": ServedModel(TOLD, is_ready=False)}) as server:
        assert await ask(server) == ModelReport(ModelState.UNREADY, INFO)


async def test_a_model_may_be_absent() -> None:
    async with OpenInferenceServer({}) as server:
        assert await ask(server) == ModelReport(ModelState.ABSENT)


@pytest.mark.parametrize("methods", [frozenset[str](), frozenset({"ModelReady"})])
async def test_a_server_may_tell_nothing(methods: frozenset[str]) -> None:
    async with OpenInferenceServer({"m": ServedModel(TOLD)}, methods=methods) as server:
        assert await ask(server) == ModelReport(ModelState.READY)


async def test_silence_is_a_loss() -> None:
    async with OpenInferenceServer({}) as server:
        pass
    with pytest.raises(StreamLost):
        await ask(server)


async def test_an_unready_model_whose_metadata_is_refused_is_not_ready() -> None:
    """Triton answers UNAVAILABLE then, which otherwise is the way to the server that is gone."""

    model = ServedModel(TOLD, is_ready=False)
    async with OpenInferenceServer({"m": model}, refusals={"ModelMetadata": grpc.StatusCode.UNAVAILABLE}) as server:
        assert await ask(server) == ModelReport(ModelState.UNREADY)


async def test_the_index_lists_the_models() -> None:
    async with OpenInferenceServer({"m": ServedModel(TOLD), "n": ServedModel(is_ready=False)}) as server:
        replica = Replica(server.address, batch_timeout_s=5, max_message_bytes=2**20, max_in_flight=1)
        replica.start(lambda: None)
        try:
            index = await replica.index()
        finally:
            await replica.aclose()
    assert index == (IndexEntry("m", "1", "READY"), IndexEntry("n", "1", "UNAVAILABLE"))
