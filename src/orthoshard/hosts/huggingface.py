"""Optimizers for Hugging Face's Trainer, and for TRL and axolotl, which build on it.

    Trainer(model, args, optimizer_cls_and_kwargs=(DionFactory, {"lr": 0.02}), ...)

The Trainer calls ``DionFactory()(model, lr=0.02)``, axolotl ``DionFactory()(model, training_args, lr=0.02)``. An
optimizer class in this place would get the Trainer's own two groups (with and without weight decay), which say nothing
of matrices. Needs no host; may import the public names of the package.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from orthoshard import Dion, DionTail, Muon, RuleOptimizer


class DionFactory:
    """Makes a `Dion` of a model and the options of `Dion`."""

    optimizer: ClassVar[type[RuleOptimizer]] = Dion

    def __call__(self, model: nn.Module, training_args: Any = None, **options: Any) -> RuleOptimizer:
        """``training_args`` is what axolotl adds; nothing is read from it: what is set is what ``options`` say."""
        return self.optimizer(model, **options)


class DionTailFactory(DionFactory):
    """Makes a `DionTail`."""

    optimizer = DionTail


class MuonFactory(DionFactory):
    """Makes a `Muon`."""

    optimizer = Muon
