"""A plugin for axolotl: two entries of its configuration, and no code.

    plugins:
      - orthoshard.hosts.axolotl.OrthoshardPlugin
    orthoshard: {rule: dion, rank_fraction: 0.25}

axolotl (0.19) declares a hook `create_optimizer` for plugins that nothing calls. What it does call is the factory that
the trainer holds, and that is set here. Needs axolotl; may import the public names of the package.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports] it pins hundreds of packages
from pydantic import BaseModel

from orthoshard.hosts.huggingface import RuleFactory

# What axolotl's own optimizers read when they make their groups, and a factory does not.
OF_ITS_GROUPS = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")


class OrthoshardArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    orthoshard: dict[str, Any] | None = None
    """Options of `orthoshard.RuleOptimizer`: ``rule`` and the keys of that rule."""


class OrthoshardPlugin(BasePlugin):  # pyright: ignore[reportUntypedBaseClass]
    """Trains with an orthoshard optimizer: ``learning_rate`` and ``weight_decay`` as configured, unless
    ``orthoshard`` has an ``lr`` or ``weight_decay`` of its own."""

    def get_input_args(self) -> str:
        return f"{__name__}.{OrthoshardArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raises ValueError where the configuration names another optimizer, or has keys that nothing would read."""
        if trainer.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"optimizer: {cfg.optimizer} is an optimizer of axolotl's own, and OrthoshardPlugin sets another; "
                f"leave out one of them (optimizer: adamw_torch stands for none)"
            )
        unread = [key for key in OF_ITS_GROUPS if cfg.get(key) is not None]
        if unread:
            raise ValueError(
                f"{', '.join(unread)}: read by nothing with OrthoshardPlugin, whose groups come from "
                f"orthoshard.param_groups; leave them out, and give scalar_lr in orthoshard: {{...}} instead"
            )
        options = {"lr": float(cfg.learning_rate), **dict(cfg.orthoshard or {})}
        if cfg.weight_decay is not None:
            options.setdefault("weight_decay", float(cfg.weight_decay))
        trainer.optimizer_cls_and_kwargs = (RuleFactory, options)
