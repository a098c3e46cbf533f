"""tritonclient.grpc.aio's stream, one per request."""

import pytest

from tests.interop.cases import FaultCases, InferCases

pytestmark = pytest.mark.anyio

KIND = "gRPC aio stream"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    pass


class TestFaults(FaultCases):
    pass
