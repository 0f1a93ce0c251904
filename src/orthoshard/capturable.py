"""Requirements of `capturable=True`, under which a step never reads the device.

The learning rate becomes a 0-d tensor on the parameters' device, which a scheduler fills in place, and so does the
count of steps that stochastic rounding mixes into its bits. Other options stay as given; numbers are constants of the
step. Options that need the host are refused here, before anything changes.
With several processes, `warmup_step` agrees on what ranks otherwise ask at each step. Only whether any gradient is
non-finite is still asked at each step, and the answer stays on the device. May import `engine`, `rules`, `groups` and
`prepared`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import non_negative
from .engine.agree import agree_on_plan
from .engine.step import Step
from .prepared import Groups, Prepared, State

# The keys of groups that change from step to step. A rate is of float64, because it multiplies tensors of every dtype.
CHANGING = {"lr": torch.float64, "rounding_steps": torch.int64}


def make_capturable(groups: Groups) -> None:
    """Move the numbers of the groups that change to the device. Raises ValueError if a step would need the host."""
    devices = {str(parameter.device) for each in groups for parameter in each["params"] if parameter.requires_grad}
    if len(devices) > 1:
        raise ValueError(
            f"capturable=True needs all parameters on one device, but these are on {', '.join(sorted(devices))}: build "
            f"an optimizer for each device, or leave capturable out"
        )
    for group in groups:
        _check_group(group)
    for group in groups:
        numbers_on_device(group)


def _check_group(group: dict[str, Any]) -> None:
    if group["state_offload"]:
        raise ValueError(
            "capturable=True does not go with state_offload=True, because the host starts its copies and waits for "
            "them; leave one of the two out"
        )
    device = group["params"][0].device
    for key in ("lr", "weight_decay"):
        if isinstance(group[key], Tensor):
            if group[key].device != device:
                raise ValueError(
                    f"{key} is a tensor on {group[key].device} and the parameters are on {device}: a captured step "
                    f"reads it on their device, so make it with device={str(device)!r}"
                )
            non_negative(key, group[key].item())


def numbers_on_device(group: dict[str, Any]) -> None:
    """Make numbers that change from step to step tensors."""
    for key, dtype in CHANGING.items():
        if not isinstance(group[key], Tensor):
            group[key] = torch.tensor(group[key], dtype=dtype, device=group["params"][0].device)


def as_ours(group: dict[str, Any], ours: dict[str, Any]) -> None:
    """Convert loaded numbers, in place, to the form that our group has: numbers, or tensors on its device."""
    for key in (*CHANGING, "weight_decay"):  # which may be a tensor that the user fills
        if isinstance(ours[key], Tensor):
            group[key] = torch.as_tensor(group[key], dtype=ours[key].dtype, device=ours[key].device).clone()
        elif isinstance(group[key], Tensor):
            group[key] = group[key].item()


def check_captured(prepared: Prepared | None, groups: Groups, state: State, process_group: Any) -> None:
    """Raise RuntimeError if a step captured now would also capture one-time work."""
    if prepared is None or prepared.bind(groups, state, process_group) is None:
        raise RuntimeError(
            "the optimizer has no state yet, or parameters, groups or state have been replaced since: call "
            "optimizer.warmup_step() before the step is captured"
        )
    for key in CHANGING:
        if not all(isinstance(group[key], Tensor) for group in groups):
            raise RuntimeError(
                f"{key!r} of a group was replaced by a number, which would be captured as it is now: call "
                f"optimizer.warmup_step() before the step is captured, and fill group[{key!r}] in place afterwards"
            )


def agree_before(step: Step, prepared: Prepared) -> None:
    """Agree with all ranks on what a step that never reads the device cannot ask: whether plans are equal, and which
    parameters have a gradient. Reads the device. Raises RuntimeError on every rank alike."""
    agree_on_plan(prepared.plan, step.comm)
    agreed = step.agree(replanned=False)
    names = [entry.name for entry, uneven in zip(prepared.plan.entries, agreed.uneven, strict=True) if uneven]
    if names:
        raise RuntimeError(
            f"capturable=True needs a gradient on every rank or on none, and {names[0]!r} has one on some ranks only: "
            f"give it zeros on the others, or leave capturable out"
        )
    if step.has_moved:
        raise RuntimeError(
            "capturable=True needs every gradient placed as its parameter, and on some rank one is not: redistribute "
            "that gradient before the step, or leave capturable out"
        )
    prepared.present = step.present


def check_agreed(step: Step, prepared: Prepared) -> None:
    """Raise RuntimeError if `agree_before` has not run, or if the gradients have changed since."""
    if prepared.present != step.present or step.misplaced:
        what = "has not been prepared" if prepared.present is None else "has other gradients than when it was prepared"
        what = "has a gradient that is not placed as its parameter" if step.misplaced else what
        raise RuntimeError(
            f"this step {what}, and with capturable=True ranks cannot agree on that during a step: call "
            f"optimizer.warmup_step() on every rank once gradients are there, and again after every change of "
            f"parameters, groups or state"
        )


def capturing() -> bool:
    """Return whether kernels launched now are captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
