"""What the callers ask: agents with vectors of 32 floats, or something about jobs. The same in every run, and the same
for every system."""

import random
from dataclasses import dataclass

DIM = 32
AGENT_TYPE = "buyer"
INPUT = "vector"  # as a tensor


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent of a request, in the words of every API."""

    name: str
    model_name: str
    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of `agents` agents, dealt out over `models` models; callers send the `variants` in turn."""

    name: str
    title: str
    agents: int
    models: int
    variants: int = 1

    def requests(self) -> list[list[AgentRow]]:
        """Each variant's agents. Variants begin with another model each."""
        rng = random.Random(self.name)
        return [
            [
                AgentRow(f"agent-{number}", f"model-{(number + variant) % self.models}", _draw(rng))
                for number in range(self.agents)
            ]
            for variant in range(self.variants)
        ]


@dataclass(frozen=True, slots=True)
class JobWorkload:
    """Requests to a gateway or to the store behind it, each about `agents` jobs: jobs take the place of vectors."""

    name: str
    title: str
    agents: int = 1
    variants: int = 1


def _draw(rng: random.Random) -> tuple[float, ...]:
    """Seven digits, as a float32 prints: what JSON costs depends on it."""
    return tuple(round(rng.uniform(-1, 1), 7) for _ in range(DIM))


S1 = Workload("S1", "one vector per request", agents=1, models=1)
S2 = Workload("S2", "16 agents over 4 models per request", agents=16, models=4)
HELD = Workload("held", "one agent per call, over 4 keys", agents=1, models=4, variants=4)

JOBS_PER_PAGE = 50  # of GET /jobs without a limit
JOBS_PER_CLAIM = 50
JOBS_PER_TURN = 64
TEXT = "The delivery was late, but the product itself is amazing!"

SUBMIT = JobWorkload("submit", "submit a text over REST")
PAGE = JobWorkload("page", f"a page of {JOBS_PER_PAGE}", JOBS_PER_PAGE, variants=3)
CLAIM = JobWorkload("claim", f"a claim of {JOBS_PER_CLAIM}", JOBS_PER_CLAIM)
CLAIM_FINISH = JobWorkload("claim-finish", f"claim {JOBS_PER_TURN}, finish them", JOBS_PER_TURN)

WORKLOADS: dict[str, Workload | JobWorkload] = {
    workload.name: workload for workload in (S1, S2, HELD, SUBMIT, PAGE, CLAIM, CLAIM_FINISH)
}
