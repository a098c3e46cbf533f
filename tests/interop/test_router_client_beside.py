"""router_client and tritonclient in one process, whichever is imported first.

Both bring the protocol's messages; in one descriptor pool they would clash ("duplicate symbol"). So each order gets an
interpreter of its own, which then asks by both.
"""

import subprocess
import sys

import pytest

from tests.acceptance.processes import ROOT
from tests.interop.stack import Stack

SYSTEM = "router_client beside tritonclient"
PATIENCE_S = 60

OURS = "from router_client import Agent, RouterClient"
THEIRS = "import tritonclient.grpc, tritonclient.grpc.aio, tritonclient.http"
# The sync client runs while ours has a loop: in a thread, as a user would.
ASK = """
import asyncio, sys
import numpy as np

def tensor(make):
    given = make("vector", [1, 2], "FP32")
    given.set_data_from_numpy(np.array([[1, 2]], np.float32))
    return [given]

def sync(router):
    with tritonclient.grpc.InferenceServerClient(router) as client:
        return client.infer("churn", tensor(tritonclient.grpc.InferInput)).as_numpy("output")[0]

async def main(router):
    async with RouterClient(router) as ours, tritonclient.grpc.aio.InferenceServerClient(router) as theirs:
        results, answer, other = await asyncio.gather(
            ours.predict({"me": Agent("churn", [1.0, 2.0])}),
            theirs.infer("churn", tensor(tritonclient.grpc.InferInput)),
            asyncio.to_thread(sync, router),
        )
    assert np.float32(results["me"].output[0]) == answer.as_numpy("output")[0] == other, (results, answer, other)
    print("equal")

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_answer_alike_whichever_is_imported_first(stack: Stack, first: str) -> None:
    imports = [OURS, THEIRS] if first == "ours" else [THEIRS, OURS]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join([*imports, ASK]), stack.router],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "equal\n"), ended.stderr


def test_the_messages_of_both_are_the_same_on_the_wire() -> None:
    """In this process, where both are loaded: what one writes, the other reads."""
    from tritonclient.grpc import service_pb2  # noqa: PLC0415 -- the test is about importing it

    from protos.open_inference import open_inference_pb2 as pb  # noqa: PLC0415

    for name in ("ModelInferRequest", "ModelInferResponse"):
        ours, theirs = getattr(pb, name)(id="☃"), getattr(service_pb2, name)(id="☃")
        ours.parameters["priority"].uint64_param = theirs.parameters["priority"].uint64_param = 2**64 - 1
        assert ours.SerializeToString() == theirs.SerializeToString()
        assert type(ours) is not type(theirs)
