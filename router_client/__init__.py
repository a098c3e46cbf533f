"""The Python client of the inference router: one stream, shared by all callers of a process.

async with RouterClient("127.0.0.1:50051") as client:
    results = await client.predict({"ann": Agent("model", [0.1, 0.2])}, timeout_s=30)
"""

from router_client.blocks import Agent, AgentError, AgentResult, Explanation, Roster, Row, group, pack, spread
from router_client.client import RouterClient

__all__ = [
    "Agent",
    "AgentError",
    "AgentResult",
    "Explanation",
    "Roster",
    "RouterClient",
    "Row",
    "group",
    "pack",
    "spread",
]
