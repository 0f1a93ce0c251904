"""Optimizers for timm's factory, and thereby for ``--opt`` of its train script:

    orthoshard.hosts.timm.register()
    timm.optim.create_optimizer_v2(model, opt="dion", lr=0.02, weight_decay=0.05, rank_fraction=0.25)

timm (1.0) calls ``Dion(groups, lr=0.02, weight_decay=0.0, rank_fraction=0.25)``. Its groups have no names and do not
tell matrices from other parameters, but the call that made them still holds the model. Needs timm; may import the
public names of the package.
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

# No underscores: timm reads only what follows the last one, as in "lookahead_dion". It has a "muon" of its own.
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
        options: Defaults of options that the call of timm's factory does not set. The only way to set ``momentum``,
            because timm always passes one, 0.9 if the user gave none.
    """
    for name, optimizer in NAMES.items():
        made: Any = partial(build, optimizer)  # timm wants a class, but does nothing with it except call it
        described = f"orthoshard.{optimizer.__name__}"
        default_registry.register(OptimInfo(name, made, described, has_betas=True, defaults=options))


def build(optimizer: type[RuleOptimizer], params: Any, **options: Any) -> RuleOptimizer:
    """Return an optimizer of the model from which timm made these groups, with their weight decay and learning rates by
    layer; or of ``params`` themselves if timm did not make them. Raises ValueError if the groups have settings that
    nothing would read."""
    call = _timms_call()
    model = call.get("model_or_params")
    if not isinstance(model, nn.Module) or call["param_group_fn"]:
        return optimizer(params, **options)
    if any(group.get("use_fallback") for group in params):
        raise ValueError(
            "fallback_list and fallback_no_weight_decay say which parameters timm's own Muon leaves to AdamW, but here "
            "roles decide that; leave them out, or override roles: "
            "param_group_fn=partial(orthoshard.param_groups, overrides={'*.name': {'rule': 'adamw'}})"
        )
    options["weight_decay"] = max((group["weight_decay"] for group in params), default=0.0)
    made = optimizer(model, **options)
    scales = {p: group["lr_scale"] for group in params for p in group["params"] if "lr_scale" in group}
    if scales:
        _scale_layers(made, scales)
    return made


def _timms_call() -> dict[str, Any]:
    """Return the local variables of the running call of timm's factory; empty if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not OptimizerRegistry.create_optimizer.__code__:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _scale_layers(optimizer: RuleOptimizer, scales: dict[Tensor, float]) -> None:
    """Split each group by layer, and multiply ``lr_scale`` into the rates, which otherwise only timm's schedules do.
    Parameters without a scale are dropped: timm leaves them out because they are frozen."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        members = list(zip(group["param_names"], group["params"], strict=True))
        for scale in dict.fromkeys(scales[p] for _, p in members if p in scales):
            part = [(name, p) for name, p in members if scales.get(p) == scale]
            names, params = map(list, zip(*part, strict=True))
            optimizer.add_param_group({**group, "params": params, "param_names": names, "lr": group["lr"] * scale})
