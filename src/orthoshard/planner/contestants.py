"""The rows of a plan: what they are called, what the optimizer is told, and what the calculator is.

May import `even`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from orthoshard.planner.even import Row


@dataclass(frozen=True)
class Contestant:
    """``options`` of the rule and of the optimizer; None: a formula, for the library does not work so.
    ``own_gradients``: the optimizer averages over replicas, in place of the gradients' own all-reduce."""

    name: str
    row: Row
    options: dict[str, Any] | None = field(default_factory=dict)

    @property
    def own_gradients(self) -> bool:
        return self.row.replicas == "factors"


def contestants(dp: int, ranks: Sequence[Fraction], formulas: bool) -> list[Contestant]:
    """``dp`` replicas; ``formulas``: also what the library does not do."""
    rows = [Contestant("AdamW", Row("adamw"))]
    if formulas:
        rows.append(Contestant("Muon, every rank all matrices", Row("muon", replicas="repeat", form="redundant"), None))
    rows += _ways("Muon", "muon", 1.0, {}, dp)
    if formulas:
        rows.append(Contestant("Muon, distributed Gram", Row("muon", replicas="repeat", form="gram"), None))
    for name, rule in (("Dion", "dion"), ("DionTail", "dion_tail")):
        for rank in ranks:
            rows += _ways(f"{name} {rank}", rule, float(rank), {"rank_fraction": float(rank)}, dp)
    return rows


def _ways(name: str, rule: str, rank: float, options: dict[str, Any], dp: int) -> list[Contestant]:
    """What replicas may do: all repeat the work, or share it; each keep its part of the state; average factors."""
    if dp == 1:
        return [Contestant(name, Row(rule, rank), options)]
    ways: list[tuple[str, str, dict[str, Any]]] = []
    if rule == "muon":
        ways += [("repeated at replicas", "repeat", {"replica_compute": "repeat"})]
        ways += [("shared by replicas", "split", {"replica_compute": "split"})]
    else:
        ways += [("", "auto", {})]
    if rule != "dion_tail":  # whose update takes every entry of a momentum and a gradient
        ways += [("state at owners", "own", {"shard_state": "zero1"})]
    if rule == "dion":
        ways += [("factors averaged", "factors", {"replica_sync": "factors"})]
    return [
        Contestant(f"{name}, {words}" if words else name, Row(rule, rank, replicas), {**options, **more})
        for words, replicas, more in ways
    ]
