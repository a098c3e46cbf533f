"""How long a batch takes: seeded, per model.

It only names seconds; whoever asks does the waiting.
"""

from random import Random

from mock_nn.config import MockConfig


class Latencies:
    """Draws the latency of each batch, in the order of asking.

    The same seed and the same order of batches give the same latencies; a fixed latency draws nothing.
    """

    def __init__(self, config: MockConfig, rng: Random) -> None:
        self._config = config
        self._rng = rng

    def draw_s(self, model_name: str) -> float:
        """Seconds that the model's next batch takes; exactly 0.0 means "do not even sleep"."""
        latency = self._config.latency_of(model_name)
        if latency.low_s == latency.high_s:
            return latency.low_s
        return self._rng.uniform(latency.low_s, latency.high_s)
