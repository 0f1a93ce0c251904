"""`torch.optim.Muon` under its own name and arguments (those of torch 2.10 to 2.13), on any sharding.

    M~ = mu M~ + (1 - mu) G;   N~ = (1 - mu) G + mu M~ (Nesterov) or M~;   W -= lr wd W + lr s polar(N~)

M~ is (1 - mu) times our momentum, and a polar factor does not depend on the scale of its matrix. So the steps are those
of our rule "muon", and ``momentum_buffer`` of a checkpoint is divided by 1 - mu. torch iterates in bfloat16; we iterate
in the dtype of the state on a CPU and in 16 bits elsewhere (``polar_dtype=``). ``eps``, torch's guard against division
by zero, has no effect: matrices are scaled by powers of two. May import the library.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orthoshard.compat.adapted import Adapted, Group, declared, listed

JORDAN = (3.4445, -4.7750, 2.0315)
SCALES = {None: "original", "original": "original", "match_rms_adamw": "rms"}


class Muon(Adapted):
    """`torch.optim.Muon`. ``options``: further options of `orthoshard.Muon` (``process_group``, ``state_dtype``, ...).

    Raises ValueError, TypeError: A value out of range, or a parameter that is not a matrix.
    """

    @declared
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Any,
    ) -> None: ...

    def begin(self, params: Any, theirs: Group, options: Group) -> None:
        super().__init__(listed(params), theirs, **{**self.ours(theirs), **options})

    def add_param_group(self, param_group: Any) -> None:
        """Add a group. As in torch, raises ValueError for a parameter that is not a matrix."""
        (group,) = listed([param_group])
        members = group.get("params", ()) if isinstance(group, dict) else ()
        for member in [members] if isinstance(members, Tensor) else members:
            parameter = member[1] if isinstance(member, tuple) else member
            if isinstance(parameter, Tensor) and parameter.ndim != 2:
                raise ValueError(
                    f"Muon takes matrices, but a parameter has the shape {tuple(parameter.shape)}: give it to another "
                    f"optimizer, or use orthoshard.Muon, which takes batches of matrices too"
                )
        super().add_param_group(group)

    def ours(self, theirs: Group) -> Group:
        if theirs["adjust_lr_fn"] not in SCALES:
            raise ValueError(f"adjust_lr_fn={theirs['adjust_lr_fn']!r} is unknown; choose one of {list(SCALES)}")
        same = {key: theirs[key] for key in ("lr", "weight_decay", "momentum", "nesterov")}
        polar = polynomials(theirs["ns_coefficients"], theirs["ns_steps"])
        return {"rule": "muon", **same, "scale": SCALES[theirs["adjust_lr_fn"]], "polar": polar}

    def our_state(self, held: dict[str, Any], theirs: Group) -> dict[str, Any]:
        held = dict(held)
        return {"momentum": held.pop("momentum_buffer") / (1 - theirs["momentum"]), **held}

    def is_theirs(self, group: Group) -> bool:
        return "ns_steps" in group and "rule" not in group


def polynomials(coefficients: tuple[float, float, float], steps: int) -> str:
    """Return our ``polar`` for the same polynomial in every step. Raises ValueError for less than one step."""
    if tuple(coefficients) == JORDAN and steps == 5:
        return "jordan"
    if steps < 1:
        raise ValueError(f"ns_steps={steps!r} must be 1 or more")
    return "; ".join([",".join(map(repr, map(float, coefficients)))] * steps)
