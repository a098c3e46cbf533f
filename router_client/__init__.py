"""The Python client of the inference router.

Client and AsyncClient are for users: agents, jobs, models and status, what fails raises. RouterClient beneath them is
one native connection, shared by all callers of a process, and says everything in its answers.

with Client() as client:
    results = client.predict({"ann": Agent("model", [0.1, 0.2])}, timeout_s=30)
    job = client.wait(client.submit("This product is amazing!"), timeout_s=60)

async with RouterClient("127.0.0.1:50051") as router:
    results = await router.predict({"ann": Agent("model", [0.1, 0.2])}, timeout_s=30)
    outputs = await router.infer_tensors("sentiment", [bytes_tensor("text", [b"Well done!"])], timeout_s=30)

A name is loaded with its first use: who wants the probe of a container, or the native client alone, does not wait for
the libraries of the others.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router_client.async_client import AsyncClient
    from router_client.blocks import Agent, AgentResult, Explanation, Roster, Row, group, pack, spread
    from router_client.client import RouterClient
    from router_client.errors import (
        Aborted,
        AgentError,
        DeadlineExceeded,
        Internal,
        InvalidArgument,
        ModelFailed,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        RouterError,
        Unauthenticated,
        Unavailable,
        Unimplemented,
    )
    from router_client.jobs import Job, JobError, JobFailed
    from router_client.models import ModelEntry
    from router_client.results import Results
    from router_client.status import GatewayStatus, RouterStatus, Status
    from router_client.sync_client import Client
    from router_client.tensors import InferError, Tensor, bytes_tensor, from_response, read_bytes

_MODULES = {
    "async_client": ("AsyncClient",),
    "blocks": ("Agent", "AgentResult", "Explanation", "Roster", "Row", "group", "pack", "spread"),
    "client": ("RouterClient",),
    "errors": (
        "Aborted",
        "AgentError",
        "DeadlineExceeded",
        "Internal",
        "InvalidArgument",
        "ModelFailed",
        "NotFound",
        "PermissionDenied",
        "ResourceExhausted",
        "RouterError",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
    ),
    "jobs": ("Job", "JobError", "JobFailed"),
    "models": ("ModelEntry",),
    "results": ("Results",),
    "status": ("GatewayStatus", "RouterStatus", "Status"),
    "sync_client": ("Client",),
    "tensors": ("InferError", "Tensor", "bytes_tensor", "from_response", "read_bytes"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Aborted",
    "Agent",
    "AgentError",
    "AgentResult",
    "AsyncClient",
    "Client",
    "DeadlineExceeded",
    "Explanation",
    "GatewayStatus",
    "InferError",
    "Internal",
    "InvalidArgument",
    "Job",
    "JobError",
    "JobFailed",
    "ModelEntry",
    "ModelFailed",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Results",
    "Roster",
    "RouterClient",
    "RouterError",
    "RouterStatus",
    "Row",
    "Status",
    "Tensor",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "bytes_tensor",
    "from_response",
    "group",
    "pack",
    "read_bytes",
    "spread",
]


def __getattr__(name: str) -> object:
    """Load a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
