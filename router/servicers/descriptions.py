"""What is known of models as messages of the Open Inference Protocol. Pure; what nobody tells stays empty."""

from collections.abc import Iterable

from protos.open_inference import open_inference_pb2 as pb
from router.core.model_info import IndexEntry, ModelInfo, ModelReport, ModelState, TensorInfo
from router.errors import NotFound
from router.models import Model

READY = "READY"

_NOTHING = ModelInfo("")


def check_there(name: str, version: str, report: ModelReport) -> None:
    """Raise NotFound when no backend has the model."""
    if report.state is ModelState.ABSENT:
        raise NotFound(f"no model {name!r}" + (f", version {version!r}" if version else ""))


def to_metadata(name: str, version: str, report: ModelReport) -> pb.ModelMetadataResponse:
    """A model's metadata under the name that it was asked for. Raises NotFound."""
    check_there(name, version, report)
    info = report.info or _NOTHING
    return pb.ModelMetadataResponse(
        name=name,
        versions=info.versions,
        platform=info.platform,
        inputs=[_tensor(tensor) for tensor in info.inputs],
        outputs=[_tensor(tensor) for tensor in info.outputs],
    )


def _tensor(tensor: TensorInfo) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def to_config(name: str, model: Model) -> pb.ModelConfig:
    """Triton's ModelConfig. `max_batch_size`: rows of a call of ours; a request may have more, and is split."""
    info = model.info or _NOTHING
    return pb.ModelConfig(
        name=name,
        platform=info.platform,
        max_batch_size=model.max_batch_rows if model.is_batched else 0,
        input=[pb.ModelInput(name=tensor.name, optional=tensor.is_optional) for tensor in info.inputs],
    )


def to_index(entries: Iterable[IndexEntry], *, are_ready: bool) -> pb.RepositoryIndexResponse:
    """The models, or only those that are ready."""
    chosen = [entry for entry in entries if entry.state == READY or not are_ready]
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponse.ModelIndex(
                name=entry.name, version=entry.version, state=entry.state, reason=entry.reason
            )
            for entry in chosen
        ]
    )
