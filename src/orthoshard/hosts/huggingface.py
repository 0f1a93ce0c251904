"""Optimizers for Hugging Face's Trainer, and for TRL and axolotl, which build on it.

    Trainer(model, args, optimizer_cls_and_kwargs=(DionFactory, {"lr": 0.02}), ...)

The Trainer calls ``DionFactory()(model, lr=0.02)``, axolotl ``DionFactory()(model, training_args, lr=0.02)``. An
optimizer class instead of a factory would get the Trainer's own two groups (with and without weight decay), which do
not tell matrices from other parameters. Needs no host; may import the public names of the package.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from orthoshard import Dion, DionTail, Muon, RuleOptimizer

# Options under which replicas may hold different state, so that `state_dict` is a collective call, and the values under
# which they do not.
SAME_STATE = {"shard_state": ("none",), "replica_sync": ("none", "gradients")}


class RuleFactory:
    """Makes a `RuleOptimizer` from a model, the name of a rule and its options."""

    optimizer: ClassVar[type[RuleOptimizer]] = RuleOptimizer

    def __call__(self, model: nn.Module, training_args: Any = None, **options: Any) -> RuleOptimizer:
        """Return the optimizer of a model. ``training_args``: passed by axolotl, and ignored.

        Raises ValueError for options under which replicas hold different state: the Trainer would save only one's.
        """
        for key, values in SAME_STATE.items():
            if options.get(key, "none") not in values:
                raise ValueError(
                    f"{key}={options[key]!r} does not work under the Trainer: replicas then hold different state, so "
                    f"state_dict() must be called on all ranks together, and the Trainer calls it on rank 0 alone; "
                    f"leave {key} out, or train with Accelerate, Lightning or a loop of your own"
                )
        return self.optimizer(model, **options)


class DionFactory(RuleFactory):
    """Makes a `Dion` from a model and the options of `Dion`."""

    optimizer = Dion


class DionTailFactory(RuleFactory):
    """Makes a `DionTail`."""

    optimizer = DionTail


class MuonFactory(RuleFactory):
    """Makes a `Muon`."""

    optimizer = Muon
