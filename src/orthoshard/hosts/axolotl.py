"""A plugin for axolotl, enabled by two entries of its configuration:

    plugins:
      - orthoshard.hosts.axolotl.OrthoshardPlugin
    orthoshard: {rule: dion, rank_fraction: 0.25}

axolotl (0.19) declares a plugin hook `create_optimizer`, but never calls it. It does call the factory that the trainer
holds, so the plugin sets that. Needs axolotl; may import the public names of the package.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports] it pins hundreds of packages
from pydantic import BaseModel

from orthoshard.hosts.huggingface import RuleFactory

# Keys that axolotl reads when it makes groups for its own optimizers, but not with a factory.
OF_ITS_GROUPS = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")


class OrthoshardArgs(BaseModel):
    """The keys that the plugin adds to axolotl's configuration."""

    orthoshard: dict[str, Any] | None = None
    """Options of `orthoshard.RuleOptimizer`: ``rule`` and the keys of that rule."""


class OrthoshardPlugin(BasePlugin):  # pyright: ignore[reportUntypedBaseClass]
    """Makes axolotl train with an orthoshard optimizer: with the configured ``learning_rate`` and ``weight_decay``,
    unless ``orthoshard`` sets ``lr`` or ``weight_decay`` itself."""

    def get_input_args(self) -> str:
        return f"{__name__}.{OrthoshardArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the trainer's factory. Raises ValueError if another optimizer, or a key that nothing reads, is set."""
        if trainer.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"optimizer: {cfg.optimizer} is one of axolotl's own optimizers, and OrthoshardPlugin sets another; "
                f"leave out one of them (optimizer: adamw_torch stands for none)"
            )
        unread = [key for key in OF_ITS_GROUPS if cfg.get(key) is not None]
        if unread:
            raise ValueError(
                f"{', '.join(unread)}: not read with OrthoshardPlugin, whose groups come from "
                f"orthoshard.param_groups; leave them out, and give scalar_lr in orthoshard: {{...}} instead"
            )
        options = {"lr": float(cfg.learning_rate), **dict(cfg.orthoshard or {})}
        if cfg.weight_decay is not None:
            options.setdefault("weight_decay", float(cfg.weight_decay))
        trainer.optimizer_cls_and_kwargs = (RuleFactory, options)
