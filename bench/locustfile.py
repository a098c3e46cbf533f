"""Load on the REST gateway: callers who ask as soon as they are answered, and who read every answer.

`make load-rest` runs it without a window and against programs of its own. With locust's page, against `make run`:

    .venv-load/bin/python -m locust -f bench/locustfile.py
"""

import random

from locust import FastHttpUser, constant

from bench.load_rest import draw_agents, draw_kind, find_fault


def predict(caller: "Caller") -> None:
    """One request of some kind; failed unless every agent of it is answered."""
    kind = draw_kind(caller.rng)
    agents = draw_agents(kind.agents, caller.rng)
    with caller.client.post(
        "/predict", json={"agents": agents}, headers={"Accept": kind.accept}, name=kind.title, catch_response=True
    ) as response:
        fault = find_fault(kind, response.status_code, response.content or b"", agents)
        if fault:
            response.failure(fault)


class Caller(FastHttpUser):  # type: ignore[misc]  # locust is not in .venv
    """A caller on a connection of its own."""

    host = "http://127.0.0.1:8000"
    wait_time = constant(0)
    network_timeout = 60.0
    tasks = [predict]  # noqa: RUF012 -- as locust wants it

    def on_start(self) -> None:
        """Draw other numbers than the other callers."""
        self.rng = random.Random()
