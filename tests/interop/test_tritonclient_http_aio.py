"""tritonclient, HTTP aio."""

import pytest

from tests.interop.cases import FaultCases, InferCases, ServerCases

pytestmark = pytest.mark.anyio

KIND = "HTTP aio"
SYSTEM = f"tritonclient {KIND}"


class TestInfer(InferCases):
    pass


class TestFaults(FaultCases):
    pass


class TestServer(ServerCases):
    pass
