"""torchtitan's optimizer container with an orthoshard optimizer for each model part. In a torchtitan configuration,

    optimizer=OrthoshardOptimizers.Config(lr=0.02, options={"rank_fraction": 0.25})

replaces `default_adamw(...)`. Groups come from `param_groups`, not from patterns of names. Needs torchtitan (0.3); may
import the public names of the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer

from orthoshard import RuleOptimizer, param_groups


class OrthoshardOptimizers(OptimizersContainer[RuleOptimizer]):
    """One `RuleOptimizer` for each model part; checkpoints, schedulers and hooks are torchtitan's own."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """``param_groups`` and ``implementation`` of the base class must stay as they are."""

        rule: str = "dion"
        """The rule of matrices."""

        lr: float = 0.02
        """Learning rate of the matrices; the scalar rule takes its fixed share of it (`orthoshard.param_groups`)."""

        scalar: str = "adamw"
        """The rule of everything else."""

        scalar_lr: float | None = None
        """Learning rate of everything else; None: its fixed share of ``lr``."""

        seed: int = 0
        """Seed of the initial bases."""

        options: dict[str, Any] = field(default_factory=dict)
        """Further keys of the matrix groups: ``{"rank_fraction": 0.25, "weight_decay": 0.1}``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups or config.implementation != "fused":
            raise ValueError(
                "OrthoshardOptimizers makes its groups from the model: leave param_groups and implementation out, and "
                "give lr, scalar_lr and options instead"
            )
        self.model_parts = model_parts
        self.optimizers = []
        everything: list[nn.Parameter] = []
        for number, part in enumerate(model_parts):
            groups = param_groups(
                part,
                matrix=config.rule,
                scalar=config.scalar,
                lr=config.lr,
                scalar_lr=config.scalar_lr,
                **config.options,
            )
            for group in groups:
                group["param_names"] = [canonical_fqn(name) for name in group["param_names"]]
                everything.extend(group["params"])
            optimizer = RuleOptimizer(groups, rule=config.rule, lr=config.lr, seed=config.seed)
            self.optimizers.append(optimizer)
            self._log_optimizer(optimizer, number, [group["role"] for group in groups])
        self._validate_params(everything)
        self._post_init(everything)
