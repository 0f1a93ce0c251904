"""orthoshard: orthonormal-update optimizers for PyTorch. Each rule is implemented once and runs on any sharding.

The names below are imported on first use, so the command line starts without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.clip import clip_grad_norm_
    from .engine.local import local_gradients
    from .graphs import graphed
    from .named import Dion, Dion3, DionTail, LoRAMuon, Muon, NorMuon, RowNorm
    from .optimizer import RuleOptimizer
    from .params import param_groups

__version__ = "0.1.0"
__all__ = [
    "Dion",
    "Dion3",
    "DionTail",
    "LoRAMuon",
    "Muon",
    "NorMuon",
    "RowNorm",
    "RuleOptimizer",
    "__version__",
    "clip_grad_norm_",
    "graphed",
    "local_gradients",
    "param_groups",
]

_HOMES = {
    "Dion": "named",
    "DionTail": "named",
    "Dion3": "named",
    "LoRAMuon": "named",
    "Muon": "named",
    "NorMuon": "named",
    "RowNorm": "named",
    "clip_grad_norm_": "engine.clip",
    "local_gradients": "engine.local",
    "RuleOptimizer": "optimizer",
    "graphed": "graphs",
    "param_groups": "params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orthoshard' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
