"""The results of all agents, and the error that speaks for them."""

import pytest

from router_client import AgentError, AgentResult, ModelFailed, ResourceExhausted, Results, RouterError

OUTPUT = AgentResult([1.0])


def failed(code: str, message: str = "why", pushback_ms: int | None = None) -> AgentResult:
    return AgentResult([], AgentError(code, message, pushback_ms))


def test_results_are_a_mapping_in_the_order_of_the_request() -> None:
    results = Results({"b": OUTPUT, "a": failed("NOT_FOUND")})
    assert list(results) == ["b", "a"]
    assert results["b"].output == [1.0]
    assert (results.outputs, list(results.errors), len(results)) == ({"b": [1.0]}, ["a"], 2)


def test_answered_agents_raise_nothing() -> None:
    results = Results({"a": OUTPUT})
    assert results.raise_for_errors() is results
    assert Results({}).raise_for_errors().raise_for_failure() == {}


def test_one_failed_agent_raises_only_when_asked_for() -> None:
    results = Results({"a": OUTPUT, "b": failed("RESOURCE_EXHAUSTED", "full", 1500)})
    assert results.raise_for_failure() is results
    with pytest.raises(ResourceExhausted, match="1 of 2 agents failed, 'b' so: full") as caught:
        results.raise_for_errors()
    assert caught.value.agents == results.errors
    assert caught.value.retry_after_s == 1.5


def test_when_all_failed_alike_their_own_words_are_told() -> None:
    with pytest.raises(RouterError) as caught:
        Results({"a": failed("UNKNOWN", "too large"), "b": failed("UNKNOWN", "too large")}).raise_for_failure()
    assert (type(caught.value), caught.value.message) == (ModelFailed, "too large")


def test_the_gravest_error_speaks_and_its_latest_time_counts() -> None:
    results = {
        "a": failed("INVALID_ARGUMENT"),
        "b": failed("RESOURCE_EXHAUSTED", "one", 2000),
        "c": failed("RESOURCE_EXHAUSTED", "two", 3000),
    }
    with pytest.raises(ResourceExhausted, match="3 of 3 agents failed, 'b' so: one") as caught:
        Results(results).raise_for_failure()
    assert caught.value.retry_after_s == 3.0


def test_a_code_that_nobody_knows_ranks_as_the_models_own() -> None:
    with pytest.raises(RouterError) as caught:
        Results({"a": failed("NOT_FOUND"), "b": failed("DATA_LOSS")}).raise_for_errors()
    assert caught.value.code == "DATA_LOSS"
