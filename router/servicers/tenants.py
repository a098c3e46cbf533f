"""Whose rows a call's are: what its message tells, else the metadata of its RPC. Without trust all are one tenant's."""

from typing import Any

import grpc.aio

from router.config import Settings
from router.core.types import DEFAULT_TENANT
from router.servicers.convert import check_name

# Metadata; a stream's holds for all of its calls.
TENANT_KEY = "x-tenant"

Context = grpc.aio.ServicerContext[Any, Any]


class Tenants:
    """Finds the tenant of a call."""

    def __init__(self, settings: Settings) -> None:
        self._longest_name = settings.limits.max_name_length
        self.are_trusted = settings.trust_tenant

    def of_rpc(self, context: Context) -> str:
        """What the metadata tells; empty: nothing, or nothing that is trusted."""
        if self.are_trusted:
            for key, value in context.invocation_metadata() or ():
                if key == TENANT_KEY and isinstance(value, str):
                    return value
        return ""

    def of_call(self, told: str, of_rpc: str) -> str:
        """`told`: by the message, which is checked. Raises InvalidArgument when the metadata's is too long."""
        if not self.are_trusted:
            return DEFAULT_TENANT
        if not told:
            check_name(TENANT_KEY, of_rpc, self._longest_name)
        return told or of_rpc or DEFAULT_TENANT
