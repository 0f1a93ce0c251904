"""Optimizers under the names and arguments of others, so that a script can switch by changing one import.

    from orthoshard.compat.dion import Dion, Dion2, Muon, NorMuon      microsoft/dion
    from orthoshard.compat.torch_muon import Muon                      torch.optim.Muon

Each is an ordinary `RuleOptimizer`: its groups have our keys, its state our names. `load_state_dict` also takes state
that the other optimizer saved. See `docs/choose.md`. May import the library.
"""

from . import dion, torch_muon

__all__ = ["dion", "torch_muon"]
