"""Latencies are seeded, per model, and exactly zero when they should be."""

from random import Random

from mock_nn.config import LatencyRange, MockConfig
from mock_nn.latency import Latencies


def draws(config: MockConfig, *model_names: str) -> list[float]:
    latencies = Latencies(config, Random(config.seed))
    return [latencies.draw_s(model_name) for model_name in model_names]


def test_the_default_is_three_to_seven_seconds() -> None:
    seconds = draws(MockConfig(), *["m"] * 1000)
    assert 3 <= min(seconds) < 3.1
    assert 6.9 < max(seconds) <= 7


def test_a_seed_gives_the_same_latencies_again_and_another_one_others() -> None:
    assert draws(MockConfig(seed=1), "m", "m") == draws(MockConfig(seed=1), "m", "m")
    assert draws(MockConfig(seed=1), "m", "m") != draws(MockConfig(seed=2), "m", "m")


def test_a_model_has_its_own_latency() -> None:
    config = MockConfig(latency=LatencyRange(0, 0), model_latencies={"slow": LatencyRange(2, 2)})
    assert draws(config, "m", "slow", "m") == [0, 2, 0]


def test_a_fixed_latency_leaves_the_sequence_alone() -> None:
    config = MockConfig(model_latencies={"fixed": LatencyRange(1, 1)})
    assert draws(config, "m", "fixed", "m")[::2] == draws(config, "m", "m")
