"""Optimizers under the names and arguments of others, so that a script moves over by one import.

    from orthoshard.compat.dion import Dion, Dion2, Muon, NorMuon      microsoft/dion
    from orthoshard.compat.torch_muon import Muon                      torch.optim.Muon

What is built is an ordinary `RuleOptimizer`: its groups have our keys, its state our names; `load_state_dict` takes
what the other optimizer saved. See `docs/choose.md`. May import the library.
"""

from . import dion, torch_muon

__all__ = ["dion", "torch_muon"]
