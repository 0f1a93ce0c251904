"""``orthoshard explain``: what an optimizer does to every parameter of a model, and why, and what a step costs.

`origins` and `ranks` are the other two forms of the command.

May import tyro, torch and ``orthoshard``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro
from torch import nn

from orthoshard import RuleOptimizer
from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.explained import explain_parameters, explain_updates
from orthoshard.grouping import claims
from orthoshard.lab.explain import origins, ranks
from orthoshard.lab.explain.mesh import check_sizes, described_mesh, place, read_mesh
from orthoshard.lab.models import Described, describe, known
from orthoshard.lab.train.config import OptimizerConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.optimizers import build_optimizer
from orthoshard.lab.verb import exit_code, read_flags


@dataclass(frozen=True)
class ExplainConfig:
    """Show what an optimizer would do to every parameter of a model, and what a step would cost on a mesh.

    Nothing is downloaded, and no memory is taken for weights: the model exists only on torch's meta device.

    examples:
      orthoshard explain --model llama3-8b --mesh fsdp=64,tp=8 --optimizer dion

    two other forms, each with its own --help:
      orthoshard explain --from-adamw lr=3e-4    translate AdamW's arguments to ours; also --from-muon, --from-dion
      orthoshard explain RUN                     show which rank fraction a recorded run needed
    """

    model: str = "tiny"
    """A size of `orthoshard train`, a published model (`--list` shows the names), or the path of a Hugging Face
    `config.json` or of a folder with one."""
    mesh: str = ""
    """Axes and their sizes, such as `fsdp=64,tp=8`: `dp` replicas, `fsdp` shards, `ep` expert parallelism, `tp` tensor
    parallelism by the model's own plan. If left out: one process."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    every: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Print a line for each parameter and each update, instead of one line for all that are alike."""
    buckets: bool = False
    """Also show the batched updates, and how their matrices are communicated."""
    list: bool = False
    """Show the names of models, and exit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: ``RUN ...``, ``--from-... ...``, or the flags of ``ExplainConfig``. Return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        if arguments and not arguments[0].startswith("-"):
            ranks.run(arguments)
        elif any(word.partition("=")[0] in origins.FLAGS for word in arguments):
            print(origins.run(arguments))
        else:
            print(run(read_flags(ExplainConfig, "orthoshard explain", arguments)))

    return exit_code("explain", work)


def run(config: ExplainConfig) -> str:
    """Return the text. Raises ValueError or ``UserError``."""
    if config.list:
        return "\n".join(_about(describe(name)) for name in known())
    described, sizes = describe(config.model), read_mesh(config.mesh)
    model = described.on_meta(getattr(torch, config.dtype))
    experts = [claim.parameter for claim in claims(model) if claim.role == "experts"]
    check_sizes(sizes, described.name, described.settings, experts)
    with described_mesh(sizes) as mesh:
        if mesh is not None:
            place(model, mesh, {id(parameter) for parameter in experts})
        try:
            optimizer = build_optimizer(model, config.optimizer)
        except TypeError as error:  # an option has a value of the wrong type
            raise UserError(str(error)) from error
        return explain(described, model, optimizer, sizes, config.every, config.buckets)


def explain(
    described: Described, model: nn.Module, optimizer: RuleOptimizer, sizes: dict[str, int], every: bool, buckets: bool
) -> str:
    plan, groups = optimizer.plan(), optimizer.param_groups
    order = {claim.name: number for number, claim in enumerate(claims(model))}
    cost, ranks = step_cost(plan, groups), 1
    for size in sizes.values():
        ranks *= size
    sent = float(cost.wire + agreement_bytes(plan))
    weights = sum(parameter.numel() for parameter in model.parameters())
    where = " × ".join(f"{name}={size}" for name, size in sizes.items()) or "one process"
    lines = [
        f"{described.name}: {weights:,} parameters ({described.source}); {where}",
        "",
        explain_parameters(plan, groups, every, order),
        "",
        *([explain_updates(plan, groups, every), ""] if buckets else []),
        f"A step on {'this process' if ranks == 1 else f'each of {ranks} ranks (rank 0 is counted)'}: "
        f"{_scaled(cost.flops, 'FLOP')}, {_scaled(cost.memory, 'B')} of memory traffic, {_scaled(sent, 'B')} sent; "
        f"state {_scaled(cost.state, 'B')}.",
    ]
    return "\n".join(lines)


def _about(described: Described) -> str:
    count = f"{described.parameters / 1e9:9.3f} B" if described.parameters else " " * 11
    return f"{described.name:20}{count}  {described.source}"


def _scaled(amount: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}"
