"""orthoshard: orthonormal-update optimizers for PyTorch whose rules are written once, whatever the sharding."""

from .optimizer import Dion, Muon, RuleOptimizer
from .params import param_groups

__version__ = "0.1.0"
__all__ = ["Dion", "Muon", "RuleOptimizer", "__version__", "param_groups"]
