"""Random questions that `orthoshard plan` and the calculator can both answer: meshes that divide every matrix."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from orthoshard.planner import hardware
from orthoshard.planner.estimate import Job
from orthoshard.planner.make import Planned, make
from orthoshard.planner.subject import subject

# 16, 32, 32 and 32 layers, so that owners get equal numbers of matrices; and the most shards that divide their experts.
MODELS = {"llama3.2-1b": 32, "llama3-8b": 32, "mistral-7b": 32, "mixtral-8x7b": 8}
known = cache(subject)


@dataclass(frozen=True)
class Question:
    model: str
    mesh: dict[str, int]
    hardware: str
    rank: int
    """The rank fraction is 1 / 2^rank."""
    tokens_per_step: float
    tokens: float
    utilization: float
    price: float

    def job(self) -> Job:
        ranks = self.mesh["dp"] * self.mesh["fsdp"] * self.mesh["tp"]
        active = known(self.model).active
        return Job(active, ranks, self.tokens_per_step, self.tokens, self.utilization, self.price)

    def planned(self) -> Planned:
        """By the planner, on the real model."""
        sizes = {axis: size for axis, size in self.mesh.items() if size > 1}
        return make(known(self.model), sizes, hardware.find(self.hardware), self.job(), [Fraction(1, 2**self.rank)])


def question(seed: int) -> Question:
    pick = random.Random(seed)
    model, most = pick.choice(list(MODELS.items()))
    mesh = {"dp": 2 ** pick.randrange(5), "fsdp": min(most, 2 ** pick.randrange(1, 6)), "tp": 2 ** pick.randrange(4)}
    return Question(
        model,
        mesh,
        pick.choice(["a100", "h100", "h200", "b200"]),
        pick.randrange(7),
        round(10 ** pick.uniform(5, 8)),
        round(10 ** pick.uniform(10, 14)),
        round(pick.uniform(0.05, 0.7), 4),
        round(pick.uniform(0.1, 12), 2),
    )
