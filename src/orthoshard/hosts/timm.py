"""Optimizers for timm's factory, and so for the ``--opt`` of its train script:

    orthoshard.hosts.timm.register()
    timm.optim.create_optimizer_v2(model, opt="dion", lr=0.02, weight_decay=0.05, rank_fraction=0.25)

timm (1.0) calls ``Dion(groups, lr=0.02, weight_decay=0.0, rank_fraction=0.25)``. Its groups have no names and say
nothing of matrices, but the call that made them still has the model. Needs timm; may import the public names of the
package.
"""

from __future__ import annotations

import sys
from functools import partial
from types import FrameType
from typing import Any

from timm.optim import OptimInfo, OptimizerRegistry  # pyright: ignore[reportMissingImports] it needs torchvision
from timm.optim._optim_factory import default_registry  # pyright: ignore[reportMissingImports] as above
from torch import Tensor, nn

from orthoshard import Dion, Dion3, DionTail, LoRAMuon, Muon, NorMuon, RowNorm, RuleOptimizer

# No underscores: of "lookahead_dion" timm reads what is after the last one. It has a "muon" of its own.
NAMES: dict[str, type[RuleOptimizer]] = {
    "dion": Dion,
    "dion3": Dion3,
    "diontail": DionTail,
    "loramuon": LoRAMuon,
    "normuon": NorMuon,
    "orthoshard-muon": Muon,
    "rownorm": RowNorm,
}


def register(**options: Any) -> None:
    """Make the optimizers known to timm under `NAMES`.

    Args:
        options: Options that they have where the call of timm's factory gives none; the only way to set ``momentum``,
            since timm always passes one, and 0.9 where nobody said so.
    """
    for name, optimizer in NAMES.items():
        made: Any = partial(build, optimizer)  # timm asks for a class, and does no more with it than call it
        described = f"orthoshard.{optimizer.__name__}"
        default_registry.register(OptimInfo(name, made, described, has_betas=True, defaults=options))


def build(optimizer: type[RuleOptimizer], params: Any, **options: Any) -> RuleOptimizer:
    """An optimizer of the model that timm made these groups of, with their weight decay and their layers' rates; or of
    ``params`` themselves where timm made none. Raises ValueError where timm's groups ask for what nothing would do."""
    call = _timms_call()
    model = call.get("model_or_params")
    if not isinstance(model, nn.Module) or call["param_group_fn"]:
        return optimizer(params, **options)
    if any(group.get("use_fallback") for group in params):
        raise ValueError(
            "fallback_list and fallback_no_weight_decay say which parameters timm's own Muon leaves to AdamW, and here "
            "roles do; leave them out, or override roles: "
            "param_group_fn=partial(orthoshard.param_groups, overrides={'*.name': {'rule': 'adamw'}})"
        )
    options["weight_decay"] = max((group["weight_decay"] for group in params), default=0.0)
    made = optimizer(model, **options)
    scales = {p: group["lr_scale"] for group in params for p in group["params"] if "lr_scale" in group}
    if scales:
        _scale_layers(made, scales)
    return made


def _timms_call() -> dict[str, Any]:
    """The arguments of the call of timm's factory that this is in; empty where it is in none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not OptimizerRegistry.create_optimizer.__code__:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _scale_layers(optimizer: RuleOptimizer, scales: dict[Tensor, float]) -> None:
    """Part each group by layers, with rates of their own: timm's schedules multiply ``lr_scale`` in, and only they do.
    A parameter without scale is one that timm leaves out, since it is frozen."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        members = list(zip(group["param_names"], group["params"], strict=True))
        for scale in dict.fromkeys(scales[p] for _, p in members if p in scales):
            part = [(name, p) for name, p in members if scales.get(p) == scale]
            names, params = map(list, zip(*part, strict=True))
            optimizer.add_param_group({**group, "params": params, "param_names": names, "lr": group["lr"] * scale})
