"""tritonclient, gRPC aio stream."""

import pytest

from tests.interop.cases import FaultCases, InferCases, ServerCases

pytestmark = pytest.mark.anyio

KIND = "gRPC aio stream"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    pass


class TestFaults(FaultCases):
    pass


class TestServer(ServerCases):
    pass
