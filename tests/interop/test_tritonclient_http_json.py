"""tritonclient, HTTP JSON."""

import pytest

from tests.interop.cases import FaultCases, InferCases, ServerCases

pytestmark = pytest.mark.anyio

KIND = "HTTP JSON"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    pass


class TestFaults(FaultCases):
    pass


class TestServer(ServerCases):
    pass
