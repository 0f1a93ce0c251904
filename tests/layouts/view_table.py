"""The table of views: each row says by hand which matrices a parameter is; layouts and rules are those of `table`.

The oracle treats every block as a parameter of its own, in one process, from the same initial basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from first_step import comparison_bytes
from table import RULES, TOLERANCE, Case, cut, local, place, tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from orthoshard import RuleOptimizer
from orthoshard.budget import agreement_bytes, step_cost

COUNT = 2  # parameters of each rule
STEPS = 2  # the second from a basis and a momentum that the first has left
RULES = {**RULES, "normuon": {"rule": "normuon"}}  # Muon, and a number a row
CHOSEN = ("dion 1/2", "dion columns", "dion_tail 1/4", "normuon")


@dataclass(frozen=True, eq=False)
class Row:
    """A view of a parameter.

    matrices  the parameter as (..., m, n), as if it were one matrix
    side      along which the blocks lie, "" where there is one
    blocks    the entries of each
    """

    text: str
    shape: tuple[int, ...]
    matrices: Callable[[Tensor], Tensor] = lambda t: t
    side: str = ""
    blocks: tuple = ()

    def split(self, whole: Tensor) -> list[Tensor]:
        """The matrices of a weight, gradient or momentum."""
        matrix = self.matrices(whole)
        if not self.side:
            return [matrix]
        return [matrix[..., list(b), :] if self.side == "rows" else matrix[..., list(b)] for b in self.blocks]

    def split_basis(self, Q: Tensor, side: str) -> list[Tensor]:
        """The basis of each: its entries of the side along which blocks lie; else one after the other."""
        joined = {"conv": "columns", "conv rows:2*4": "columns", "conv transposed": "rows"}.get(self.text)
        inner = len(self.shape) - 1 if side == joined else 1
        Q = stacked(Q) if self.text.startswith("stack") else Q
        Q = Q.flatten(Q.ndim - 1 - inner, Q.ndim - 2)
        if not self.side:
            return [Q]
        return [Q[..., list(b), :] if self.side == side else Q[..., k, :, :] for k, b in enumerate(self.blocks)]


def every(height, count):
    return tuple(range(height * i, height * (i + 1)) for i in range(count))


def transpose(t):
    return t.mT


def kernel(t):
    return t.flatten(1)


def stacked(t):
    return t.flatten(0, 1)


R = range
VIEWS = {
    "transposed": Row("transposed", (7, 12), transpose),
    "uneven rows": Row("rows:3,6,4", (13, 7), side="rows", blocks=(R(3), R(3, 9), R(9, 13))),
    "heads": Row("rows:6*4", (24, 5), side="rows", blocks=every(4, 6)),
    "fewer heads than shards": Row("rows:3*2", (6, 5), side="rows", blocks=every(2, 3)),
    "heads and less": Row("rows:4*4,2,6", (24, 5), side="rows", blocks=(*every(4, 4), R(16, 18), R(18, 24))),
    "interleaved": Row(
        "rows:4*(2,4)",
        (24, 5),
        side="rows",
        blocks=([i for i in R(24) if i % 6 < 2], [i for i in R(24) if i % 6 >= 2]),
    ),
    "every other row": Row("rows:7*(1,1)", (14, 6), side="rows", blocks=(R(0, 14, 2), R(1, 14, 2))),
    "fewer rows than shards": Row("rows:1,2", (3, 10), side="rows", blocks=(R(1), R(1, 3))),
    "output heads": Row("columns:4*6", (5, 24), side="columns", blocks=every(6, 4)),
    "uneven columns": Row("columns:2,5,4", (9, 11), side="columns", blocks=(R(2), R(2, 7), R(7, 11))),
    "fused Conv1D": Row("transposed rows:5,2,5", (6, 12), transpose, "rows", (R(5), R(5, 7), R(7, 12))),
    "output heads of Conv1D": Row("transposed columns:4*6", (24, 5), transpose, "columns", every(6, 4)),
    "interleaved Conv1D": Row(
        "transposed rows:3*(2,2)",
        (5, 12),
        transpose,
        "rows",
        ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]),
    ),
    "conv 2-D": Row("conv", (8, 5, 3, 2), kernel),
    "conv 1-D": Row("conv", (3, 7, 2), kernel),
    "groups of a conv": Row("conv rows:2*4", (8, 3, 2, 2), kernel, "rows", every(4, 2)),
    "transposed conv": Row("conv transposed", (5, 4, 2, 2), lambda t: t.flatten(1).mT),
}
EXPERT_VIEWS = {
    "gate and up": Row("rows:3,3", (3, 6, 4), side="rows", blocks=(R(3), R(3, 6))),
    "interleaved gate and up": Row("transposed rows:4*(1,1)", (4, 3, 8), transpose, "rows", (R(0, 8, 2), R(1, 8, 2))),
    "uneven": Row("rows:1,3,2", (2, 6, 5), side="rows", blocks=(R(1), R(1, 4), R(4, 6))),
    "columns": Row("columns:2,3", (2, 3, 5), side="columns", blocks=(R(2), R(2, 5))),
    "stack of stacks": Row("stack rows:3,3", (3, 2, 6, 4), stacked, "rows", (R(3), R(3, 6))),
    "stack of transposed stacks": Row(
        "stack transposed rows:5,3", (2, 3, 4, 8), lambda t: stacked(t).mT, "rows", (R(5), R(5, 8))
    ),
}


def drawn(row: Row, dtype, rules):
    """(rule, number, weight, its gradient at each step) of every parameter of a run."""
    for rule in rules:
        weights, steps = tensors(row.shape, COUNT, dtype, CHOSEN.index(rule))
        steps = steps[:STEPS]
        for i, weight in enumerate(weights):
            yield rule, i, weight, [gradients[i] for gradients in steps]


def build(row: Row, dtype, rules, placed=torch.clone, group=None, owners=()):
    """One optimizer over these rules, those of ``owners`` in owner mode; its parameters, and the gradients of each."""
    groups = {rule: {"params": [], "view": row.text, "replica_compute": "split", **RULES[rule]} for rule in rules}
    for rule in owners:
        groups[rule]["shard_state"] = "zero1"
    parameters, gradients = [], []
    for rule, i, weight, steps in drawn(row, dtype, rules):
        parameters.append(nn.Parameter(placed(weight)))
        gradients.append([placed(gradient) for gradient in steps])
        groups[rule]["params"].append((f"{rule} {i}", parameters[-1]))
    return RuleOptimizer(list(groups.values()), process_group=group), parameters, gradients


@cache
def expected(row: Row, dtype, rules):
    """Weight and state of every parameter after the run, its blocks having been parameters of their own."""
    viewed, originals, _ = build(row, dtype, rules)
    viewed.initialize_state()
    results = []
    for (rule, _, weight, steps), original in zip(drawn(row, dtype, rules), originals, strict=True):
        state = viewed.state[original]
        ids = {"momentum": row.split(numbered(weight))}
        if "Q" in state:
            ids["Q"] = row.split_basis(numbered(state["Q"]), RULES[rule].get("q_side", "rows"))
        if "row_moment" in state:
            ids["row_moment"] = row.split_basis(numbered(state["row_moment"]).unsqueeze(-1), "rows")
            ids["row_moment"] = [rows.squeeze(-1) for rows in ids["row_moment"]]
        blocks = [nn.Parameter(block.clone()) for block in row.split(weight)]
        optimizer = RuleOptimizer([(f"block {k}", block) for k, block in enumerate(blocks)], **RULES[rule])
        optimizer.initialize_state()
        if "Q" in state:
            for k, block in enumerate(blocks):
                rank = optimizer.state[block]["Q"].shape[-1]
                ids["Q"][k] = ids["Q"][k][..., :rank]
                optimizer.state[block]["Q"] = state["Q"].flatten()[ids["Q"][k]]
        for gradient in steps:
            for block, part in zip(blocks, row.split(gradient), strict=True):
                block.grad = part
            optimizer.step()
        whole = {"weight": torch.zeros_like(weight), **{name: torch.zeros_like(state[name]) for name in state}}
        for k, block in enumerate(blocks):
            whole["weight"].view(-1)[ids["momentum"][k]] = block.detach()
            for name in state:
                whole[name].view(-1)[ids[name][k]] = optimizer.state[block][name]
        results.append(whole)
    return results


def numbered(tensor):
    return torch.arange(tensor.numel()).view(tensor.shape)


def view_errors(rank, case: Case | None, row: Row, dtype, owners=(), rules=CHOSEN):
    """Runs these rules cut as ``case`` says (None: one process); returns what is wrong with this rank, in words. Bytes
    sent and held are compared with `cost`."""
    wrong, mesh, group = [], None, None
    if case is not None:
        mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
        group = None if case.places else mesh.get_group()
    placed = torch.clone if case is None else lambda w: place(w, mesh, case)
    optimizer, parameters, gradients = build(row, dtype, rules, placed, group, owners)
    optimizer.initialize_state()
    before = optimizer.bytes_sent
    for step in range(STEPS):
        for parameter, steps in zip(parameters, gradients, strict=True):
            parameter.grad = steps[step]
        optimizer.step()
    plan = optimizer.plan()
    cost = step_cost(plan, optimizer.param_groups)
    sent = optimizer.bytes_sent - before
    predicted = STEPS * (cost.wire + agreement_bytes(plan)) + comparison_bytes(plan)
    if sent != predicted:
        wrong.append(f"rank {rank} sent {sent} bytes, predicted {predicted}")
    held = sum(local(v).numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    if held != cost.state:
        wrong.append(f"rank {rank} holds {held} bytes of state, predicted {cost.state}")
    for number, (parameter, whole) in enumerate(zip(parameters, expected(row, dtype, rules), strict=True)):
        for name, got in {"weight": parameter, **optimizer.state[parameter]}.items():
            want = piece(whole[name], got, case, mesh)
            label = f"rank {rank}, {rules[number // COUNT]}, {name}"
            if local(got).shape != want.shape:
                wrong.append(f"{label} has shape {tuple(local(got).shape)}, not {tuple(want.shape)}")
            elif want.numel() and not (local(got) - want).norm() <= TOLERANCE[dtype] * whole[name].norm():
                wrong.append(f"{label} is off by {(local(got) - want).norm() / whole[name].norm():.1e}")
        momentum = optimizer.state[parameter].get("momentum", parameter)  # another replica may keep it
        if momentum.shape != parameter.shape or getattr(momentum, "placements", 0) != getattr(
            parameter, "placements", 0
        ):
            wrong.append(f"rank {rank}: momentum is not placed as its parameter")
    return wrong


def piece(whole, like, case: Case | None, mesh):
    """This rank's piece of a whole tensor, as the placements that ``like`` claims to have say."""
    if not isinstance(like, DTensor):
        return whole
    kept = [axis for axis, p in enumerate(like.placements) if isinstance(p, (Shard, _StridedShard))]
    order = tuple((axis, like.placements[axis].dim) for axis, _ in case.order if axis in kept)
    return cut(whole, Case(case.mesh, case.places, order), mesh.get_coordinate())
