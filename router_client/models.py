"""Which models there are: `RepositoryIndex` of the router, or of any other server that has it. Knows no streams."""

from dataclasses import dataclass

from grpc import aio

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router_client.errors import RouterError, Unavailable, error_of

OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
_NOT_A_ROUTER = "the server at {} keeps no index of models: {}"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the index. ``state`` is READY or UNAVAILABLE, as a rule; ``reason`` says why, where that is told."""

    name: str
    version: str
    state: str
    reason: str

    @property
    def is_ready(self) -> bool:
        """True when it takes requests."""
        return self.state == "READY"


async def ask_models(target: str, *, only_ready: bool, timeout_s: float) -> list[ModelEntry]:
    """Return the index of the server at ``target``, by name and version.

    Raises:
        RouterError: there is no answer within ``timeout_s`` seconds.
    """
    request = pb.RepositoryIndexRequest(ready=only_ready)
    async with aio.insecure_channel(target, OPTIONS) as channel:
        try:
            answer = await pb_grpc.GRPCInferenceServiceStub(channel).RepositoryIndex(request, timeout=timeout_s)
        except aio.AioRpcError as exc:
            raise _translated(exc, target) from exc
    entries = [ModelEntry(model.name, model.version, model.state, model.reason) for model in answer.models]
    return sorted(entries, key=lambda entry: (entry.name, entry.version))


def _translated(error: aio.AioRpcError, target: str) -> RouterError:
    code, details = error.code().name, " ".join((error.details() or "").split())
    if code == "UNAVAILABLE":
        return Unavailable(f"no router at {target}: {details}")
    return error_of(code, _NOT_A_ROUTER.format(target, details) if code == "UNIMPLEMENTED" else details)
