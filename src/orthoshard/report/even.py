"""The amounts of a step on a mesh that cuts everything evenly, by formulas in plain numbers: those of the calculator.

    W (m, n), d and D its shorter and longer side, r = ceil(f d); mesh dp · fsdp · tp. tp cuts rows, columns or
    nothing, as the model says; fsdp cuts the first dimension as it is stored, inside of what tp has cut of it: the
    rows, the columns of what is stored transposed, or the stack of experts, which deals whole matrices out, so that
    nothing of them is sent over it; dp replicates.

Sent by a rank, the mean over ranks, for c matrices whose pieces (of the thin factor, or of W itself) have L bytes:

    a sum over a ranks                                   2 (a - 1) / a · c L          all-reduce
    to owners and back, reduce-scatter and all-gather    2 (a - 1) / a · c L          each axis in turn; then c / a
    of what was cut along a, whole again                                              L · a
    results to the other replicas                        (a - 1) / a · c L

Only the calculator uses them, which moves its mesh without a plan; `orthoshard plan` reads the step run dry. May import
`temporaries` and ``orthoshard.planner.estimate``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orthoshard.planner.estimate import Amounts
from orthoshard.report.temporaries import IN_FLIGHT, per_bucket, temporaries

FLOAT = 4  # bytes of state, of weights and gradients, and of what is sent
HALF = 2  # bytes of what Newton-Schulz iterates on, on a GPU
DOUBLE = 8  # bytes of the numbers that ranks agree on
STEPS = 5  # of Newton-Schulz (K. Jordan, 2024)
# Newton-Schulz on Gram matrices: X Xᵀ, and the product of the polynomial and X, 4 D d² flops; twice, for rounding makes
# it necessary to start anew halfway. On (d, d) matrices a step takes Z = a + b R + c R², Q = Q Z, R = Z R Z: 8 d³, of
# which the first step of a round saves Q Z, and the last Z R Z. Muon works so where 2 D > 3 d, for it takes fewer flops
# there (orthoshard.linalg.polar).
GRAM_ROUNDS = 2
# Flops in the time in which a rank sends a byte, by which replicas choose to share work: orthoshard.cost
FLOPS_PER_BYTE = 5000.0

# Accesses an entry of W in a step: elementwise passes, and those of matrix products. Muon's are of one round, see
# `touches`.
PASSES = {"adamw": 8, "muon": 12, "dion": 4, "dion_tail": 7}
TOUCHES = {"adamw": 0, "muon": 4, "dion": 6, "dion_tail": 4}
# Of TOUCHES, those that write the weights; and of all, those by which every replica takes part where one of them keeps
# the state to read gradients and write weights.
WRITES = {"muon": 0, "dion": 2}
SURVEYED = {"muon": 4, "dion": 3}


@dataclass(frozen=True)
class Kind:
    """Matrices of one size: ``count`` of the whole model (of experts, all of them), which ``tp`` cuts along their
    "rows", "columns" or not at all (""), and ``fsdp`` along "rows", "columns" or the "stack"."""

    m: int
    n: int
    count: int
    tp: str = ""
    fsdp: str = "rows"


@dataclass(frozen=True)
class Model:
    """``scalars``: entries of parameters that are no matrices, cut by fsdp and tp, and by fsdp alone; ``tensors``: how
    many parameters these are; ``parameters``: how many there are in all."""

    kinds: tuple[Kind, ...]
    scalars: tuple[float, float]
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Row:
    """One contestant. ``rule``: adamw, muon, dion, dion_tail. ``rank``: the fraction. ``replicas``: what those that
    hold the same do: "split", "repeat", "auto" (the cheaper), "own" (each keeps the state of its own matrices), or
    "factors" (they average factors in place of gradients). ``form``: "" as the library works; of Muon also "redundant"
    (every rank gathers and does everything) and "gram" (the longer side stays cut; Gram matrices (d, d) are summed at
    owners, who iterate on them alone, and the polynomial comes back), which it does not."""

    rule: str
    rank: float = 1.0
    replicas: str = "auto"
    form: str = ""


@dataclass
class Sent:
    """Bytes by axis, added up as they are sent."""

    by_axis: dict[str, float]

    def sum(self, size: float, axes: Sequence[tuple[str, int]]) -> None:
        for name, a in axes:
            self.by_axis[name] += all_reduce(size, a)

    def deal(self, c: float, size: float, partial: Sequence[tuple[str, int]], cut: Sequence[tuple[str, int]]) -> None:
        """c pieces of ``size`` bytes, terms of a sum over ``partial``; ``cut`` axes are undone, the innermost first."""
        for name, a in partial:
            self.by_axis[name] += all_reduce(c * size, a)
            c /= a
        for name, a in cut:
            self.by_axis[name] += all_reduce(c * size, a)
            c, size = c / a, size * a


def amounts(model: Model, mesh: Mapping[str, int], row: Row) -> Amounts:
    """Of a step on one rank. ``mesh``: dp, fsdp, tp (1 where there is none)."""
    sent = Sent(dict.fromkeys(mesh, 0.0))
    synced = dict.fromkeys(mesh, 0.0)
    flops = touched = passes = state = held = 0.0
    single = 0.0
    here = 0.0  # entries of matrices on this rank
    pieces = [(kind, Piece.of(kind, mesh)) for kind in model.kinds]
    under_way = min(IN_FLIGHT, sum(math.ceil(piece.here / piece.bucket) for _, piece in pieces))
    for kind, piece in pieces:
        here += piece.entries
        if row.rule == "adamw":
            state += 2 * FLOAT * piece.entries
            passes += PASSES["adamw"] * FLOAT * piece.entries
            continue
        own = mesh["dp"] if row.replicas == "own" else 1
        one = _flops(kind, row)
        replicas = _replicas(kind, piece, mesh, row)
        even, largest = _work(kind, piece, mesh, row, one, replicas)
        flops, single = flops + even, max(single, largest)
        _send(sent, kind, piece, mesh, row, replicas)
        here_touched, here_passes = _accesses(kind, row, own)
        touched += FLOAT * here_touched * (piece.whole if row.form == "redundant" else piece.entries)
        passes += FLOAT * here_passes * piece.entries
        state += FLOAT * (piece.entries + piece.here * piece.m * _thin(kind, row)) / own
        held = max(held, _temporaries(kind, piece, row, under_way, own))
    scalars = model.scalars[0] / (mesh["fsdp"] * mesh["tp"]) + model.scalars[1] / mesh["fsdp"]
    tensors = model.parameters if row.rule == "adamw" else model.tensors
    state += 2 * FLOAT * scalars + FLOAT * tensors
    for name, a in mesh.items():  # the agreement on gradients: two numbers a parameter, and three
        sent.by_axis[name] += all_reduce(DOUBLE * (2 * model.parameters + 3), a)
    if row.replicas == "factors":
        sent.by_axis["dp"] += all_reduce(FLOAT * scalars, mesh["dp"])
    else:
        synced["dp"] = all_reduce(FLOAT * (here + scalars), mesh["dp"])
    return Amounts(
        products="polar" if row.rule == "muon" else "factors",
        flops=max(flops, single),
        touched=touched,
        passes=passes + FLOAT * PASSES["adamw"] * scalars,
        sent={name: size for name, size in sent.by_axis.items() if size},
        synced={name: size for name, size in synced.items() if size},
        state=state,
        temporaries=held,
    )


@dataclass(frozen=True)
class Piece:
    """What a rank has of a kind: ``here`` matrices, of each (m, n); ``rows``, ``columns``: the axes that cut them, in
    the order of cutting."""

    here: float
    m: float
    n: float
    rows: tuple[tuple[str, int], ...]
    columns: tuple[tuple[str, int], ...]

    @property
    def entries(self) -> float:
        return self.here * self.m * self.n

    @property
    def bucket(self) -> float:
        """How many of them are updated together."""
        return per_bucket(self.here, FLOAT * self.m * self.n)

    @property
    def whole(self) -> float:
        """Entries of these matrices, whole."""
        return self.entries * self.cutting

    @property
    def cutting(self) -> float:
        return math.prod(a for _, a in (*self.rows, *self.columns))

    @classmethod
    def of(cls, kind: Kind, mesh: Mapping[str, int]) -> Piece:
        axes = [(name, mesh[name], side) for name, side in (("tp", kind.tp), ("fsdp", kind.fsdp))]
        rows = tuple((name, size) for name, size, side in axes if side == "rows")
        columns = tuple((name, size) for name, size, side in axes if side == "columns")
        here = kind.count / (mesh["fsdp"] if kind.fsdp == "stack" else 1)
        m, n = kind.m / math.prod(a for _, a in rows), kind.n / math.prod(a for _, a in columns)
        return cls(here, m, n, rows, columns)


@dataclass(frozen=True)
class Flops:
    """Of one matrix: ``divisible`` among the ranks that cut it and done at every replica; ``shared`` among replicas
    too; of these ``whole``, done by one rank for the whole matrix; of ``divisible`` those that are ``applied`` to the
    weights."""

    divisible: float
    shared: float
    whole: float
    applied: float = 0.0


def _thin(kind: Kind, row: Row) -> int:
    """r, 0 where the rule has no factors."""
    return math.ceil(row.rank * min(kind.m, kind.n)) if row.rule in ("dion", "dion_tail") else 0


def _flops(kind: Kind, row: Row) -> Flops:
    m, n, r = kind.m, kind.n, _thin(kind, row)
    d, D = min(m, n), max(m, n)
    if row.rule == "muon":
        count = rounds(m, n, row.form)
        polar = count * 4.0 * D * d**2 + (8.0 * STEPS - 6.0 * count) * d**3
        return Flops(0.0, polar, polar)
    if row.rule == "dion":
        orthonormal = 2 * (4.0 * n * r**2 + 2 / 3 * r**3)
        return Flops(4.0 * m * n * r, 4.0 * m * n * r + orthonormal, orthonormal, 2.0 * m * n * r)
    orthonormal = 2 * (4.0 * (m + n) * r**2 + 4 / 3 * r**3)
    taller = 2 * (4.0 * max(m, n) * r**2 + 2 / 3 * r**3)  # of its two factors, which may have two owners
    return Flops(2.0 * m * n * r, 4.0 * m * n * r + orthonormal, taller)


def rounds(m: int, n: int, form: str = "") -> int:
    """In how many rounds Muon takes its steps: one each, as the redundant form does, or fewer on Gram matrices."""
    return GRAM_ROUNDS if 2 * max(m, n) > 3 * min(m, n) and form != "redundant" else STEPS


def touches(rule: str, m: int, n: int, form: str = "") -> int:
    """Accesses an entry that products make."""
    return TOUCHES.get(rule, 0) * (rounds(m, n, form) if rule == "muon" else 1)


def _accesses(kind: Kind, row: Row, own: int) -> tuple[float, float]:
    """Accesses an entry on this rank: of products, and of passes. Of ``own`` replicas one keeps the state."""
    rule, products = row.rule, touches(row.rule, kind.m, kind.n, row.form)
    if own == 1:
        return products, PASSES[rule]
    total = (PASSES[rule] + products - SURVEYED[rule]) / own + SURVEYED[rule]
    touched = (products - WRITES[rule]) / own + WRITES[rule]
    return touched, total - touched


def _work(
    kind: Kind, piece: Piece, mesh: Mapping[str, int], row: Row, one: Flops, replicas: str
) -> tuple[float, float]:
    """Flops of a rank where all have alike; and of the rank that has one whole matrix, whatever the others have."""
    if row.form == "redundant":
        return kind.count * one.shared, 0.0
    if row.form == "gram":
        d, D = min(kind.m, kind.n), max(kind.m, kind.n)
        polynomial = STEPS * 8.0 * d**3
        return piece.here * (GRAM_ROUNDS * 4.0 * D * d**2 + polynomial) / piece.cutting, polynomial
    sharing, own = (mesh["dp"] if replicas == way else 1 for way in ("split", "own"))
    even = (one.divisible - one.applied + one.shared / sharing) / own + one.applied
    return piece.here * even / piece.cutting, one.whole


def _replicas(kind: Kind, piece: Piece, mesh: Mapping[str, int], row: Row) -> str:
    """Share or repeat, where that is open: the cheaper, as the library finds it."""
    if row.replicas != "auto" or mesh["dp"] == 1:
        return "repeat" if row.replicas == "auto" else row.replicas

    def weight(way: str) -> float:
        sent = Sent(dict.fromkeys(mesh, 0.0))
        _send(sent, kind, piece, mesh, row, way)
        even, _ = _work(kind, piece, mesh, row, _flops(kind, row), way)
        return even + FLOPS_PER_BYTE * sum(sent.by_axis.values())

    return min(("split", "repeat"), key=weight)


def _send(sent: Sent, kind: Kind, piece: Piece, mesh: Mapping[str, int], row: Row, replicas: str) -> None:
    """What a rank sends for all matrices of a kind."""
    c, cut = piece.here, (*piece.rows, *piece.columns)
    size = FLOAT * piece.m * piece.n
    if row.form == "redundant":
        whole = c * size
        for name, a in ((("fsdp", mesh["fsdp"]),) if kind.fsdp == "stack" else ()) + tuple(reversed(cut)):
            whole *= a
            sent.by_axis[name] += whole * (a - 1) / a
        return
    if row.form == "gram":
        sent.deal(c, GRAM_ROUNDS * HALF * min(kind.m, kind.n) ** 2, cut, ())
        return
    dp = (("dp", mesh["dp"]),)
    c = c / mesh["dp"] if replicas == "own" else c
    mine = c / mesh["dp"] if replicas == "split" else c
    results = published = size
    if row.rule == "muon":
        sent.deal(mine, size, (), (*reversed(piece.rows), *reversed(piece.columns)))
    else:
        r = _thin(kind, row)
        results = _send_factors(sent, c, mine, piece, r, row.rule, dp if replicas == "factors" else ())
        published = FLOAT * (piece.m + piece.n) * r
    if replicas in ("split", "own"):
        sent.by_axis["dp"] += (mesh["dp"] - 1) * mine * (published if replicas == "own" else results)


def _send_factors(
    sent: Sent, c: float, mine: float, piece: Piece, r: int, rule: str, averaged: Sequence[tuple[str, int]]
) -> float:
    """What Dion and DionTail send; the bytes of one matrix's results."""
    rows, columns = piece.rows, piece.columns
    cut = (*rows, *columns)
    P, R = FLOAT * piece.n * r, FLOAT * piece.m * r
    sent.sum(c * DOUBLE, (*cut, *averaged))  # the largest entry
    if rule == "dion":
        sent.deal(mine, P, (*rows, *averaged), tuple(reversed(columns)))
        sent.sum(mine * R, (*columns, *averaged))
        sent.sum(mine * FLOAT * r, rows)
        return P + R + FLOAT * r
    sent.sum(c * FLOAT * piece.m, columns)  # lengths of rows
    sent.sum(c * FLOAT, rows)
    sent.deal(mine, P, rows, tuple(reversed(columns)))
    sent.sum(mine * R, columns)
    sent.deal(mine, R, (), tuple(reversed(rows)))
    sent.sum(mine * FLOAT * r, rows)
    return P + 2 * R + FLOAT * r


def _temporaries(kind: Kind, piece: Piece, row: Row, under_way: int, own: int) -> float:
    whole, part = (kind.m, kind.n), (piece.m, piece.n)
    return temporaries(row.rule, row.form, whole, part, _thin(kind, row), piece.bucket / own, under_way, piece.cutting)


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that a rank sends to sum ``size`` bytes over a ring (Patarasuk & Yuan, 2009, section 3)."""
    return 2 * (ranks - 1) / ranks * size
