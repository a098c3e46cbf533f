"""Models: what requests meet under a model's name: its settings, and what its backend tells of it."""

from dataclasses import dataclass

from router.config import ModelSettings, Settings
from router.core.model_info import IndexEntry, ModelInfo, ModelReport, ModelState
from router.errors import NotFound


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


class Models:
    """The models of a router."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, model_name: str, model_version: str, agent_type: str) -> Model:  # noqa: ARG002 (known to backends)
        """The model that rows go to.

        Raises:
            NotFound: no settings match, or the backend has no such model.
            Unlearned: nobody knows yet.
        """
        settings = self._settings.route(model_name, agent_type)
        if settings is None:
            raise NotFound(f"no model {model_name!r} for agent type {agent_type!r}")
        return Model(settings, None, is_batched=True, max_batch_rows=settings.max_batch_size)

    async def learn(
        self, model_name: str, model_version: str, agent_type: str, *, rows: int, nbytes: int, deadline: float
    ) -> None:
        """Return once `find` knows. Raises RouterError."""

    async def report(self, model_name: str, model_version: str) -> ModelReport:
        """What is known of a model."""
        self.find(model_name, model_version, "")
        return ModelReport(ModelState.READY)

    async def index(self) -> tuple[IndexEntry, ...]:
        """The models that settings name."""
        names = dict.fromkeys(model.match.model_name for model in self._settings.models)
        return tuple(IndexEntry(name, "", "READY") for name in names if not set(name) & set("*?["))

    def apply(self, settings: Settings) -> None:
        """Go on by other settings."""
        self._settings = settings
