"""The Python client of the inference router: one connection, shared by all callers of a process.

async with RouterClient("127.0.0.1:50051") as client:
    results = await client.predict({"ann": Agent("model", [0.1, 0.2])}, timeout_s=30)
    outputs = await client.infer_tensors("sentiment", [bytes_tensor("text", [b"Well done!"])], timeout_s=30)
"""

from router_client.blocks import Agent, AgentError, AgentResult, Explanation, Roster, Row, group, pack, spread
from router_client.client import RouterClient
from router_client.tensors import InferError, Tensor, bytes_tensor, from_response, read_bytes

__all__ = [
    "Agent",
    "AgentError",
    "AgentResult",
    "Explanation",
    "InferError",
    "Roster",
    "RouterClient",
    "Row",
    "Tensor",
    "bytes_tensor",
    "from_response",
    "group",
    "pack",
    "read_bytes",
    "spread",
]
