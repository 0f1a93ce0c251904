"""The runs that are compared: on the device in some dtype, and in float64 on the CPU, with the same gradients.

    error = |W - W'| / |W' - W_0|       W the weights here, W' those in float64, W_0 those at the start

for each parameter, so 1 is an update in an unrelated direction. Weights and gradients are numbers of the dtype that is
checked, so that both runs get the same ones. A gradient of step `BAD` has a NaN: that step must change nothing.
`limit` derives how large an error may be. May import torch and ``orthoshard``.
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

# Two equal, a transposed pair, odd lengths, a row, a column, experts, and one whose rank exceeds a block of Cholesky.
SHAPES = ((96, 160), (96, 160), (160, 96), (65, 33), (1, 40), (40, 1), (3, 32, 48), (256, 512))
STEPS, BAD = 5, 2
TAKEN = STEPS - 1
# Powers of two, because torch's fused CUDA kernels read a learning rate that is a tensor in float32, which holds them
# exactly. Large, so that weights move by about their own length, and decay is not lost in the rounding of bfloat16.
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
    """Return tensors with normal entries, in float64 on the CPU. The entries are numbers of ``dtype``, or of float32
    if that is float64."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.float32 if dtype == torch.float64 else dtype
    return [(torch.randn(shape, generator=generator) * size).to(held).double() for shape in shapes]


def start(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return draw(shapes, 0, 0.05, dtype)


def gradients(step: int, dtype: torch.dtype, size: float = 1.0, bad: bool = False) -> list[Tensor]:
    """Return the gradients of one step. Their sizes fall from parameter to parameter."""
    drawn = [gradient / 2.0**k for k, gradient in enumerate(draw(SHAPES, 1 + step, 1.0, dtype))]
    drawn = [(gradient * size).to(torch.float32).double() for gradient in drawn] if size != 1 else drawn
    if bad:
        drawn[3].view(-1)[7] = float("nan")
    return drawn


def built(weights: Sequence[nn.Parameter], options: Options, **more: Any) -> RuleOptimizer:
    """Return the optimizer of a run. With hyperball it has no weight decay, which hyperball refuses."""
    decay = {} if options.get("decay") == "hyperball" else {"weight_decay": WEIGHT_DECAY}
    chosen: dict[str, Any] = {"lr": LR, **decay, **options, **more}
    return RuleOptimizer([(f"w{i}", w) for i, w in enumerate(weights)], **chosen)


def settled(shapes: Sequence[tuple[int, ...]], options: Options, device: torch.device, **more: Any) -> RuleOptimizer:
    """Return an optimizer in bfloat16 after two steps, because first steps build a plan and tables."""
    weights = [nn.Parameter(weight.to(device, torch.bfloat16)) for weight in start(torch.bfloat16, shapes)]
    for weight, gradient in zip(weights, draw(shapes, 1, 1.0, torch.bfloat16), strict=True):
        weight.grad = gradient.to(device, torch.bfloat16)
    optimizer = built(weights, options, **more)
    for _ in range(2):
        optimizer.step()
    return optimizer


def kernel_choices(device: torch.device) -> list[str]:
    """Return the kernel choices that differ on this device, the default first."""
    return ["auto", "torch", "triton"] if device.type == "cuda" else ["auto"]


def trained(
    options: Options, dtype: torch.dtype, device: torch.device, *, kernel: str = "auto", size: float = 1.0
) -> tuple[RuleOptimizer, list[Tensor]]:
    """Return the optimizer after all steps, and its weights in float64 on the CPU."""
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
    """Take all steps, with gradients whose entries are numbers of ``dtype``, and which ``placed`` shards."""
    for step in range(STEPS):
        for weight, gradient in zip(weights, placed(gradients(step, dtype, size, step == BAD)), strict=True):
            weight.grad = gradient.to(weight.device, weight.dtype)
        optimizer.step()
    if optimizer.skipped_steps != 1:
        raise AssertionError(f"{optimizer.skipped_steps} steps were skipped, but 1 has a gradient that is not finite")


def exact(options: Options, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """Return the weights of the run in float64 on the CPU, from numbers of ``dtype``, without options in `LESS`."""
    plain = {key: value for key, value in options.items() if key not in LESS}
    return _exact(tuple(plain.items()), torch.float32 if dtype == torch.float64 else dtype, size)


# Options that change precision or place of a computation, but not what is computed.
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
    """Return the error of a run and its limit, of the parameter whose error is nearest to its limit."""
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
    """Return the error and the limit of the parameter whose error is nearest to its limit.

    ``errors`` are |W - W'|, ``true`` are W'.
    """
    first = start(dtype)
    moved = [float((after - before).norm()) for after, before in zip(true, first, strict=True)]
    limits = [limit(optimizer, w, y, m, dtype, device) for w, y, m in zip(first, true, moved, strict=True)]
    if (jump := jumps(optimizer, dtype)) is not None:  # some entries flip: compare all parameters together
        whole, allowed = math.hypot(*moved), math.hypot(*(a * m for a, m in zip(limits, moved, strict=True)))
        return math.hypot(*errors) / whole, allowed / whole + jump
    shares = [(e / m, a) for e, m, a in zip(errors, moved, limits, strict=True)]
    return nearest(shares)


def nearest(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the pair (figure, limit) that is nearest to its limit or furthest beyond it; NaN counts as beyond."""
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else math.inf)


def limit(
    optimizer: RuleOptimizer, first: Tensor, last: Tensor, moved: float, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the largest error allowed for a parameter: four times the noise of its rule, plus rounding of the weights.

    noise       the error of an update is about the rounding of its products times the condition of their factors. The
                gradients are Gaussian and not square, so the condition is 3 at low rank and 12 at full rank. On a CPU
                errors are 0.01 to 0.5 of the limit, and with products in bfloat16 0.15 to 0.7.
    rounding    each step rounds to nearest, by 0.41 u of an entry on average, with u half an ulp of 1; over T steps,
                independently, by sqrt(T) times as much. The limit has u in place of 0.41 u. If steps are smaller than
                u, all may be lost: T u.
    """
    group = optimizer.param_groups[0]
    rule = group_rule(group)
    largest, unit = max(float(first.norm()), float(last.norm())), torch.finfo(dtype).eps / 2
    rounding = (TAKEN if moved < TAKEN * unit * largest else math.sqrt(TAKEN)) * unit * largest / moved
    if not isinstance(rule, MatrixRule):
        return 4 * unit + rounding  # averages have the parameter's dtype
    return 4 * condition(group) * noise(rule, dtype, device, tuple(first.shape[-2:])) + rounding


def condition(group: Mapping[str, Any]) -> float:
    """Return the condition of X Q relative to that at low rank: 16 at full rank, else 1.

    At full rank with operands of 11 bits, the rule takes some columns of the first steps for noise and does not move
    them: one of 256 columns in one of four steps is an error of 0.016. (Measured on an H100: 0.028, with a limit of
    0.031; with bfloat16 products on a CPU: 0.04, with a limit of 0.25.)
    """
    return 16.0 if group.get("rank_fraction") == 1 else 1.0


def noise(rule: MatrixRule, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> float:
    """Return the share of an update that is rounding, from the precision in which the rule computes its products."""
    kept, direction = state_dtype(rule.state_dtype, dtype), rule.direction
    computing = torch.promote_types(kept, torch.float32)
    if isinstance(direction, LowRank):
        found = direction.noise(torch.empty(0, dtype=kept, device=device), shape)
    else:
        if isinstance(direction, Polar):
            m, n = shape
            computing = direction.iteration((m, n), device.type, kept).dtype
        # Five steps of a polynomial with slope 3 to 8 at zero do not amplify this beyond sqrt(q) roundings of a
        # product. Measured in 16 bits, where sums are in float32: 0.1 to 0.5 of the limit.
        found = 4 * torch.finfo(computing).eps * (math.sqrt(max(shape)) if computing.itemsize > 2 else 1)
    return max(found, torch.finfo(kept).eps if kept == torch.bfloat16 else 0.0)  # momentum is stored rounded


def jumps(optimizer: RuleOptimizer, dtype: torch.dtype) -> float | None:
    """Return what to add to the limit if steps depend on signs, which rounding can flip for numbers near 0, else None.

    Over N entries and T steps about N T u signs flip, with u the rounding of those numbers; ten more for chance. Each
    moves an entry by at most two steps of T, so the error of all is sqrt(flips / N) 2 / T.
    """
    group = optimizer.param_groups[0]
    if group["rule"] != "lion" and group.get("decay") != "cautious":
        return None
    held = dtype if group["rule"] == "lion" else torch.promote_types(dtype, torch.float32)
    entries = sum(math.prod(shape) for shape in SHAPES)
    return 2 / TAKEN * math.sqrt((held != torch.float64) * 10 / entries + TAKEN * torch.finfo(held).eps / 2)
