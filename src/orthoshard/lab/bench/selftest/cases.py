"""The runs that are compared: the same gradients on the device in some dtype, and in float64 on the CPU.

    error = |W - W'| / |W' - W_0|       W the weights here, W' those in float64, W_0 those at the start

of each parameter, so that 1 is an update of another direction. Weights and gradients are numbers of the dtype that is
checked, so that both runs get the same ones. A gradient of step `BAD` has a NaN: that step must change nothing.
What an error may be is derived in `limit`. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from orthoshard.directions import Polar
from orthoshard.directions.low_rank import LowRank
from orthoshard.groups import group_rule
from orthoshard.optimizer import RuleOptimizer
from orthoshard.rules import MatrixRule
from orthoshard.slots import state_dtype

Options = Mapping[str, Any]

# Two alike, a transposed pair, odd lengths, a row, a column, experts, and one whose rank is above a block of Cholesky.
SHAPES = ((96, 160), (96, 160), (160, 96), (65, 33), (1, 40), (40, 1), (3, 32, 48), (256, 512))
STEPS, BAD = 5, 2
TAKEN = STEPS - 1
# Powers of two: on CUDA torch's fused kernels read a rate that is a tensor in float32, which has them to the bit. And
# large, so that weights go as far as they are long, and no decay is lost in the rounding of bfloat16.
LR, WEIGHT_DECAY = 2.0**-2, 2.0**-3

RULES: dict[str, Options] = {
    "dion": {"rule": "dion"},
    "dion, rank 1": {"rule": "dion", "rank_fraction": 1.0},
    "dion, q_side columns": {"rule": "dion", "q_side": "columns"},
    "dion, heavy ball": {"rule": "dion", "error_feedback": False},
    "dion, Nesterov": {"rule": "dion", "error_feedback": False, "nesterov": True},
    "dion_tail": {"rule": "dion_tail"},
    "dion_tail, heavy ball": {"rule": "dion_tail", "nesterov": False},
    "muon": {"rule": "muon"},
    "muon, polar float32": {"rule": "muon", "polar_dtype": "float32"},
    "muon, Polar Express": {"rule": "muon", "polar": "polar_express"},
    "normuon": {"rule": "normuon"},
    "dion3": {"rule": "dion3"},
    "row_norm": {"rule": "row_norm"},
    "row_norm, tangent": {"rule": "row_norm", "tangent": True},
    "adamw": {"rule": "adamw"},
    "lion": {"rule": "lion"},
}
STAGES: dict[str, Options] = {
    "equilibrate rows": {"equilibrate": "rows"},
    "equilibrate columns": {"equilibrate": "columns"},
    "equilibrate both": {"equilibrate": "both"},
    "row_moment": {"row_moment": 0.95},
    "frobenius": {"frobenius": True},
    "cautious": {"decay": "cautious"},
    "hyperball": {"decay": "hyperball"},
    "update_floor": {"update_floor": 0.35},
    "nanochat's": {"equilibrate": "rows", "row_moment": 0.95, "frobenius": True, "decay": "cautious"},
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw(shapes: Sequence[tuple[int, ...]], seed: int, size: float, dtype: torch.dtype) -> list[Tensor]:
    """Normal entries that are numbers of ``dtype``, the same for float32 and float64; on the CPU, in float64."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.float32 if dtype == torch.float64 else dtype
    return [(torch.randn(shape, generator=generator) * size).to(held).double() for shape in shapes]


def start(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return draw(shapes, 0, 0.05, dtype)


def gradients(step: int, dtype: torch.dtype, size: float = 1.0, bad: bool = False) -> list[Tensor]:
    """Those of one step, of sizes that fall from parameter to parameter."""
    drawn = [gradient / 2.0**k for k, gradient in enumerate(draw(SHAPES, 1 + step, 1.0, dtype))]
    drawn = [(gradient * size).to(torch.float32).double() for gradient in drawn] if size != 1 else drawn
    if bad:
        drawn[3].view(-1)[7] = float("nan")
    return drawn


def built(weights: Sequence[nn.Parameter], options: Options, **more: Any) -> RuleOptimizer:
    """The optimizer of a run; hyperball keeps the norm of weights, and refuses a decay."""
    decay = {} if options.get("decay") == "hyperball" else {"weight_decay": WEIGHT_DECAY}
    chosen: dict[str, Any] = {"lr": LR, **decay, **options, **more}
    return RuleOptimizer([(f"w{i}", w) for i, w in enumerate(weights)], **chosen)


def settled(shapes: Sequence[tuple[int, ...]], options: Options, device: torch.device, **more: Any) -> RuleOptimizer:
    """An optimizer in bfloat16 after two steps, since first steps build their plan and their tables."""
    weights = [nn.Parameter(weight.to(device, torch.bfloat16)) for weight in start(torch.bfloat16, shapes)]
    for weight, gradient in zip(weights, draw(shapes, 1, 1.0, torch.bfloat16), strict=True):
        weight.grad = gradient.to(device, torch.bfloat16)
    optimizer = built(weights, options, **more)
    for _ in range(2):
        optimizer.step()
    return optimizer


def kernel_choices(device: torch.device) -> list[str]:
    """Those that differ on this device, the default first."""
    return ["auto", "torch", "triton"] if device.type == "cuda" else ["auto"]


def trained(
    options: Options, dtype: torch.dtype, device: torch.device, *, kernel: str = "auto", size: float = 1.0
) -> tuple[RuleOptimizer, list[Tensor]]:
    """The optimizer after all steps, and its weights in float64 on the CPU."""
    weights = [nn.Parameter(weight.to(device, dtype)) for weight in start(dtype)]
    optimizer = built(weights, options, kernels=kernel)
    train(optimizer, weights, dtype, size)
    return optimizer, [weight.detach().to("cpu", torch.float64) for weight in weights]


def train(
    optimizer: RuleOptimizer,
    weights: Sequence[nn.Parameter],
    dtype: torch.dtype,
    size: float = 1.0,
    placed: Callable[[list[Tensor]], list[Tensor]] = list,
) -> None:
    """All steps, with gradients whose entries are numbers of ``dtype``, placed as the weights are."""
    for step in range(STEPS):
        for weight, gradient in zip(weights, placed(gradients(step, dtype, size, step == BAD)), strict=True):
            weight.grad = gradient.to(weight.device, weight.dtype)
        optimizer.step()
    if optimizer.skipped_steps != 1:
        raise AssertionError(f"{optimizer.skipped_steps} steps were skipped, and one has a gradient that is not finite")


def exact(options: Options, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """The weights of the run in float64 on the CPU, from numbers of ``dtype``. Precisions of its own are left out."""
    plain = {key: value for key, value in options.items() if key not in LESS}
    return _exact(tuple(plain.items()), torch.float32 if dtype == torch.float64 else dtype, size)


# Options that say how exactly to compute, or where, and not what.
LESS = (
    *("matmul_precision", "state_dtype", "polar_dtype", "rounding", "fused", "foreach"),
    *("shard_state", "shard_compute", "replica_compute"),
)


@cache
def _exact(options: tuple[tuple[str, Any], ...], dtype: torch.dtype, size: float) -> list[Tensor]:
    weights = [nn.Parameter(weight.clone()) for weight in start(dtype)]
    train(built(weights, dict(options)), weights, dtype, size)
    return [weight.detach() for weight in weights]


def error(
    options: Options, dtype: torch.dtype, device: torch.device, *, kernel: str = "auto", size: float = 1.0
) -> tuple[float, float]:
    """The error of a run and its limit, of the parameter where they are nearest."""
    optimizer, found = trained(options, dtype, device, kernel=kernel, size=size)
    return compared(optimizer, found, exact(options, dtype, size), dtype, device)


def compared(
    optimizer: RuleOptimizer, found: Sequence[Tensor], true: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    errors = [float((x - y).norm()) for x, y in zip(found, true, strict=True)]
    return worst(optimizer, errors, true, dtype, device)


def worst(
    optimizer: RuleOptimizer, errors: Sequence[float], true: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """The error and the limit of the parameter where they are nearest. ``errors``: |W - W'|; ``true``: W'."""
    first = start(dtype)
    moved = [float((after - before).norm()) for after, before in zip(true, first, strict=True)]
    limits = [limit(optimizer, w, y, m, dtype, device) for w, y, m in zip(first, true, moved, strict=True)]
    if (jump := jumps(optimizer, dtype)) is not None:  # some entries go elsewhere: of all parameters together
        whole, allowed = math.hypot(*moved), math.hypot(*(a * m for a, m in zip(limits, moved, strict=True)))
        return math.hypot(*errors) / whole, allowed / whole + jump
    shares = [(e / m, a) for e, m, a in zip(errors, moved, limits, strict=True)]
    return nearest(shares)


def nearest(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """That of several (figure, limit) which is nearest to its limit, or beyond; NaN is."""
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else math.inf)


def limit(
    optimizer: RuleOptimizer, first: Tensor, last: Tensor, moved: float, dtype: torch.dtype, device: torch.device
) -> float:
    """What the error of one parameter may be: what its rule calls noise, four times, and its weights' own rounding.

    noise       an update is off by about the rounding of its products times the condition of what they are made of.
                The gradients are Gaussian and no square matrices, so that this is 3 at low rank and 12 at full rank. On
                a CPU the errors are 0.01 to 0.5 of the limit, and with products in bfloat16 0.15 to 0.7.
    rounding    each step rounds to nearest, by 0.41 u of an entry on average, u half an ulp of 1; over T steps,
                independently, by sqrt(T) as much. The limit has u in place of 0.41 u. Steps below u itself may all be
                lost: T u.
    """
    group = optimizer.param_groups[0]
    rule = group_rule(group)
    largest, unit = max(float(first.norm()), float(last.norm())), torch.finfo(dtype).eps / 2
    rounding = (TAKEN if moved < TAKEN * unit * largest else math.sqrt(TAKEN)) * unit * largest / moved
    if not isinstance(rule, MatrixRule):
        return 4 * unit + rounding  # averages are in the parameter's dtype
    return 4 * condition(group) * noise(rule, dtype, device, tuple(first.shape[-2:])) + rounding


def condition(group: Mapping[str, Any]) -> float:
    """Of X Q, at full rank over that at low rank. There some columns of the first steps are noise by the rule's own
    account and do not move, with operands of 11 bits: one of 256 for a step of four is 0.016. (On an H100 0.028 of a
    limit of 0.031, with bfloat16 products on a CPU 0.04 of 0.25.)"""
    return 16.0 if group.get("rank_fraction") == 1 else 1.0


def noise(rule: MatrixRule, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> float:
    """The share of an update that is rounding, by the rule's own account of what its products are computed in."""
    kept, direction = state_dtype(rule.state_dtype, dtype), rule.direction
    computing = torch.promote_types(kept, torch.float32)
    if isinstance(direction, LowRank):
        found = direction.noise(torch.empty(0, dtype=kept, device=device), shape)
    else:
        if isinstance(direction, Polar):
            m, n = shape
            computing = direction.iteration((m, n), device.type, kept).dtype
        # Five steps of a polynomial of slope 3 to 8 at zero make no more of it than sqrt(q) roundings of a product do;
        # measured in 16 bits, where sums are in float32: 0.1 to 0.5 of the limit.
        found = 4 * torch.finfo(computing).eps * (math.sqrt(max(shape)) if computing.itemsize > 2 else 1)
    return max(found, torch.finfo(kept).eps if kept == torch.bfloat16 else 0.0)  # a step stores what it sees


def jumps(optimizer: RuleOptimizer, dtype: torch.dtype) -> float | None:
    """What comes on top where entries go by a sign, which is another one where the number is within rounding of zero.

    About as many of N entries and T steps as N T u, u the rounding of what the sign is taken of; ten more for chance.
    Each is then off by at most two steps of T: sqrt(flips / N) 2 / T in all.
    """
    group = optimizer.param_groups[0]
    if group["rule"] != "lion" and group.get("decay") != "cautious":
        return None
    held = dtype if group["rule"] == "lion" else torch.promote_types(dtype, torch.float32)
    entries = sum(math.prod(shape) for shape in SHAPES)
    return 2 / TAKEN * math.sqrt((held != torch.float64) * 10 / entries + TAKEN * torch.finfo(held).eps / 2)
