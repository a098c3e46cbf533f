"""Models: what requests meet under a model's name: its settings, and what its backend tells of it."""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router.config import ModelSettings, Settings
from router.core import model_rules as rules
from router.core.model_info import IndexEntry, ModelInfo, ModelReport, ModelState
from router.core.types import DEFAULT_TENANT, TensorSpec
from router.errors import NotFound, Unsupported


class Unlearned(Exception):
    """Nobody has asked the backend about the model yet: `await Models.learn(*model)`, then try again."""

    def __init__(self, model: tuple[str, str, str]) -> None:
        super().__init__(f"the backend was not asked about {model} yet")
        self.model = model


@dataclass(frozen=True, slots=True)
class Model:
    """One model for one agent type. `info` None: its backend does not tell, and only the settings count.

    `is_batched`: whether rows of several requests may share a call; if not, each request goes as it stands.
    `max_batch_rows`: of one call.
    """

    settings: ModelSettings
    info: ModelInfo | None
    is_batched: bool
    max_batch_rows: int

    def check_inputs(self, specs: Sequence[TensorSpec]) -> None:
        """Compare a request's inputs with the model's. Raises InvalidArgument."""
        rules.check_inputs(self.info, specs, is_batched=self.is_batched)

    def check_outputs(self, wanted: Iterable[str]) -> None:
        """Compare the outputs that a request asks for with the model's. Raises InvalidArgument."""
        rules.check_outputs(self.info, wanted)

    def vector_spec(self, dim: int) -> TensorSpec:
        """The input that a native row is sent as. Raises InvalidArgument when the model takes no such row."""
        name, datatype = self.settings.vector_input, self.settings.vector_datatype
        return rules.native_spec(self.info, name, datatype, dim, is_batched=self.is_batched)

    def vector_output(self) -> tuple[str | None, tuple[str, ...]]:
        """The output of native rows (None: `output`, else the first), and what to ask for so that it comes.

        Raises InvalidArgument when the model has no such output.
        """
        output = rules.native_output(self.info, self.settings.vector_output)
        return output, rules.to_ask_for(self.info, output)


class Models:
    """The models of a router."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, model_name: str, model_version: str, agent_type: str) -> Model:  # noqa: ARG002 (known to backends)
        """The model that rows go to.

        Raises:
            NotFound: no settings match, or the backend has no such model.
            Unsupported: it is of a kind that the router cannot serve.
            Unlearned: nobody knows yet.
        """
        settings = self._settings.route(model_name, agent_type)
        if settings is None:
            raise NotFound(f"no model {model_name!r} for agent type {agent_type!r}")
        return _make_model(settings, None, model_name)

    async def learn(
        self,
        model_name: str,
        model_version: str,
        agent_type: str,
        *,
        rows: int,
        nbytes: int,
        deadline: float,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        """Return once `find` knows. Raises RouterError."""

    async def report(self, model_name: str, model_version: str) -> ModelReport:  # noqa: ARG002 (known to backends)
        """What is known of a model."""
        is_there = any(fnmatch.fnmatchcase(model_name, model.match.model_name) for model in self._settings.models)
        return ModelReport(ModelState.READY if is_there else ModelState.ABSENT)

    async def index(self) -> tuple[IndexEntry, ...]:
        """The models that settings name."""
        names = dict.fromkeys(model.match.model_name for model in self._settings.models)
        return tuple(IndexEntry(name, "", "READY") for name in names if not set(name) & set("*?["))

    def apply(self, settings: Settings) -> None:
        """Go on by other settings."""
        self._settings = settings


def _make_model(settings: ModelSettings, info: ModelInfo | None, name: str) -> Model:
    is_batched = rules.takes_batches(settings.batching, info)
    why = rules.why_unsupported(info, is_batched=is_batched)
    if why:
        raise Unsupported(f"model {name!r} cannot be served: {why}")
    return Model(settings, info, is_batched, rules.most_rows(info, settings.max_batch_size, is_batched=is_batched))
