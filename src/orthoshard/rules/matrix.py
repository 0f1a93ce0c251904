"""A rule of matrices: a direction with momentum before it and stages around it, and the meaning of its learning rate.

May import torch, `directions`, `stages`, `rule`, `slots` and `checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import one_of
from ..directions.direction import Direction
from ..rule import Rule
from ..slots import EIGHT_BITS, STATE_DTYPES, Slot, in_eight_bits, state_dtype
from ..stages import STAGES, Momentum, Stage

# The factor of the orthonormal update of an (m, n) = (d_out, d_in) matrix.
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(m / n),  # Dion, arXiv 2504.05295 v3, Table 1
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # K. Jordan's Muon, 2024
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight, arXiv 2502.16982: the RMS of AdamW's updates
    "none": lambda m, n: 1.0,  # microsoft/dion's adjust_lr=None
}


@dataclass(frozen=True, kw_only=True)
class MatrixRule(Rule):
    """A direction, the momentum before it and the stages around it."""

    matrices: ClassVar[bool] = True

    scale: str = "spectral"
    state_dtype: str | None = None
    name: str
    direction: Direction
    momentum: Momentum
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scale", self.scale, list(SCALES))
        one_of("state_dtype", self.state_dtype, (None, *STATE_DTYPES, EIGHT_BITS))
        if not any(isinstance(x, Tensor) for x in (self.lr, self.weight_decay)):
            self.direction.split(self.lr, self.decay())  # raises before anything moves, if no step could be taken

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        kept = state_dtype(self.state_dtype, dtype)
        found = {**self.momentum.slots(kept), **self.direction.slots(shape, kept)}
        found = in_eight_bits(found, shape) if self.state_dtype == EIGHT_BITS else found
        for stage in self.stages:
            found |= stage.slots(shape, kept)
        return found

    @property
    def unread(self) -> dict[str, str]:
        return {key: why for stage in self.stages for key, why in stage.unread.items()}

    @property
    def factors(self) -> bool:
        # the mean of rounded momenta is not the rounded momentum of the mean gradient
        return self.direction.linear and all(s.linear for s in self.stages) and self.state_dtype != EIGHT_BITS

    def size(self, shape: tuple[int, ...]) -> float:
        """Return what the learning rate of an (m, n) matrix is multiplied by."""
        m, n = shape
        return SCALES[self.scale](m, n) * self.direction.size(shape)


@dataclass(frozen=True)
class MatrixRuleType:
    """A rule of matrices by name: its direction, and its own defaults of options.

    Called with the values of a group it returns the frozen, validated rule. Raises ValueError or TypeError.
    """

    name: str
    direction: type[Direction]
    defaults: Mapping[str, Any] = field(hash=False)
    matrices: ClassVar[bool] = True

    @property
    def paired(self) -> bool:
        """Whether it treats factors, two to a matrix."""
        return self.direction.paired

    @property
    def stages(self) -> tuple[type[Stage], ...]:
        """The stages that it takes: none for a pair."""
        return () if self.paired else tuple(STAGES)

    def __post_init__(self) -> None:
        unread = [key for key in self.defaults if key not in _options(self.direction, tuple(STAGES))]
        if unread:
            raise ValueError(
                f"{self.name!r} has a default of {unread[0]!r}, which neither its direction nor a stage reads"
            )

    def options(self) -> dict[str, Any]:
        """Return the group keys that this rule reads, with their defaults."""
        return {**_options(self.direction, self.stages), **self.defaults}

    def __call__(self, **values: Any) -> MatrixRule:
        values = {**self.options(), **values}
        momentum = Momentum(**_of(Momentum.options(), values))
        direction = self.direction(**_of(self.direction.options(), values))
        stages = tuple(stage for kind in self.stages if (stage := kind(**_of(kind.options(), values))).on)
        own = {field.name for field in fields(MatrixRule)} & set(values) - {"momentum"}
        chosen = {key: values[key] for key in own}
        return MatrixRule(**chosen, name=self.name, direction=direction, momentum=momentum, stages=stages)


@lru_cache(maxsize=256)
def _options(direction: type[Direction], stages: tuple[type[Stage], ...]) -> Mapping[str, Any]:
    """Return the options of a direction and its stages. They are looked up for every key of every group, hence the
    cache; stages may be registered in between, hence the argument."""
    found: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.01, "rounding": "nearest"}
    found |= {"scale": "spectral", "state_dtype": None, **Momentum.options(), **direction.options()}
    if not direction.withholds:  # it applies all of the momentum: there is nothing to take out
        del found["error_feedback"]
    for stage in stages:
        found |= stage.options()
    return found


def _of(options: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in options if key in values}
