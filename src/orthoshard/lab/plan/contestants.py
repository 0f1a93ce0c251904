"""The rows of a plan: their names, and the options of their optimizers. May import the standard library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

DEALT = ", dealt"  # of a row's name


@dataclass(frozen=True)
class Row:
    """What distinguishes a row.

    Args:
        rule: name of the rule, such as "dion_tail".
        rank: rank fraction.
        replicas: what replicas do: "split" or "repeat" the work, "auto" (the cheaper of these), "own" (each keeps the
            state of its own matrices), or "factors" (they average factors in place of gradients).
        shards: the option shard_compute.
    """

    rule: str
    rank: float = 1.0
    replicas: str = "auto"
    shards: str = "auto"


@dataclass(frozen=True)
class Contestant:
    """A row with its name, and ``options`` of the rule and of the optimizer."""

    name: str
    row: Row
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def own_gradients(self) -> bool:
        """Whether the optimizer averages over replicas, so that gradients need no all-reduce of their own."""
        return self.row.replicas == "factors"


def contestants(sizes: Mapping[str, int], ranks: Sequence[Fraction], others: Sequence[str] = ()) -> list[Contestant]:
    """Return the contestants on a mesh with axes of these ``sizes``. ``others`` are rules of plugins."""
    dp, cut = sizes.get("dp", 1), any(size > 1 for axis, size in sizes.items() if axis != "dp")
    rows = [Contestant("AdamW", Row("adamw")), *_ways("Muon", "muon", 1.0, {}, dp)]
    for name, rule in (("Dion", "dion"), ("DionTail", "dion_tail")):
        for rank in ranks:
            options = {"rank_fraction": float(rank)}
            rows += _ways(f"{name} {rank}", rule, float(rank), options, dp)
            if rule == "dion_tail" and cut:
                row = Row(rule, float(rank), shards="dealt")
                rows.append(Contestant(f"{name} {rank}{DEALT}", row, {**options, "shard_compute": "dealt"}))
    return [*rows, *(row for rule in others for row in _ways(rule, rule, 1.0, {}, dp))]


def _ways(name: str, rule: str, rank: float, options: dict[str, Any], dp: int) -> list[Contestant]:
    """Return a contestant for each way of replicas: repeat or share the work, share the state, average factors."""
    if dp == 1:
        return [Contestant(name, Row(rule, rank), options)]
    ways: list[tuple[str, str, dict[str, Any]]] = []
    if rule == "muon":
        ways += [("repeated at replicas", "repeat", {"replica_compute": "repeat"})]
        ways += [("shared by replicas", "split", {"replica_compute": "split"})]
    else:
        ways += [("", "auto", {})]
    ways += [("state at owners", "own", {"shard_state": "zero1"})]
    if rule == "dion":
        ways += [("factors averaged", "factors", {"replica_sync": "factors"})]
    return [
        Contestant(f"{name}, {words}" if words else name, Row(rule, rank, replicas), {**options, **more})
        for words, replicas, more in ways
    ]
