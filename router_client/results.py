"""The answer for all agents of a request: each one's result by name, and one error that speaks for them. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Self

from router_client.blocks import AgentResult
from router_client.errors import AgentError, RouterError, error_of

PRECEDENCE = (
    "INTERNAL",
    "UNAVAILABLE",
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "NOT_FOUND",
    "INVALID_ARGUMENT",
)
"""Where agents failed for different reasons, the first of these speaks, as for an answer over REST."""


class Results(Mapping[str, AgentResult]):
    """Every agent's result under its name, in the order of the request. Each has an output, or an error."""

    def __init__(self, results: Mapping[str, AgentResult]) -> None:
        self._results = dict(results)

    def __getitem__(self, name: str) -> AgentResult:
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"Results({self._results!r})"

    @property
    def outputs(self) -> dict[str, list[float]]:
        """The outputs of the agents that were answered."""
        return {name: result.output for name, result in self._results.items() if result.error is None}

    @property
    def errors(self) -> dict[str, AgentError]:
        """The errors of the others."""
        return {name: result.error for name, result in self._results.items() if result.error is not None}

    def raise_for_errors(self) -> Self:
        """Return the results when every agent was answered.

        Raises:
            RouterError: of the class of the gravest error; ``agents`` holds all of them.
        """
        errors = self.errors
        if errors:
            raise self._speaker(errors)
        return self

    def raise_for_failure(self) -> Self:
        """Return the results unless every agent has failed.

        Raises:
            RouterError: as `raise_for_errors`.
        """
        return self if self.outputs or not self._results else self.raise_for_errors()

    def _speaker(self, errors: Mapping[str, AgentError]) -> RouterError:
        gravest = min((error.code for error in errors.values()), key=_rank)
        speakers = [error for error in errors.values() if error.code == gravest]
        return error_of(
            gravest,
            self._summary(speakers, errors),
            retry_after_s=longest_s(speakers),
            agents=errors,
        )

    def _summary(self, speakers: list[AgentError], errors: Mapping[str, AgentError]) -> str:
        messages = {error.message for error in speakers}
        if len(messages) == 1 and len(speakers) == len(errors) == len(self._results):
            return messages.pop()
        name = next(name for name, error in errors.items() if error is speakers[0])
        return f"{len(errors)} of {len(self._results)} agents failed, {name!r} so: {speakers[0].message}"


def retry_after_s(error: AgentError) -> float | None:
    """Return the push-back time of an agent's error in seconds, None where nobody named one."""
    return None if error.retry_pushback_ms is None else error.retry_pushback_ms / 1000


def longest_s(errors: Iterable[AgentError]) -> float | None:
    """Return the longest push-back time in seconds, None where nobody named one."""
    return max((after_s for error in errors if (after_s := retry_after_s(error)) is not None), default=None)


def _rank(code: str) -> int:
    return PRECEDENCE.index(code) if code in PRECEDENCE else PRECEDENCE.index("UNKNOWN")
