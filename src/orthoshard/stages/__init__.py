"""Stages around a direction, by option. A new one is one file and one entry of `STAGES`, or `register_stage`."""

from .decay import Decay, UpdateFloor
from .equilibrate import Equilibrate
from .momentum import Momentum
from .normalize import Frobenius, RowMoment
from .stage import Batch, Move, Stage
from .write import Applied, write

STAGES: list[type[Stage]] = [Equilibrate, RowMoment, Frobenius, UpdateFloor, Decay]


def register_stage(stage: type[Stage]) -> type[Stage]:
    """Register a stage of your own, as a decorator, before an optimizer that uses it is built. Raises TypeError for a
    class that is no stage, ValueError if another stage has an option of that name."""
    if not ("__dataclass_fields__" in vars(stage) and issubclass(stage, Stage) and hasattr(stage, "order")):
        raise TypeError(f"{stage.__name__} is no stage: make it a @dataclass(frozen=True) over Stage, with an order")
    taken = {key for each in STAGES for key in each.options()} & set(stage.options())
    if taken:
        raise ValueError(f"there is a stage with the option {sorted(taken)[0]!r} already; give yours another name")
    STAGES.append(stage)
    STAGES.sort(key=lambda each: each.order)
    return stage


__all__ = [
    "STAGES",
    "Applied",
    "Batch",
    "Decay",
    "Equilibrate",
    "Frobenius",
    "Momentum",
    "Move",
    "RowMoment",
    "Stage",
    "UpdateFloor",
    "register_stage",
    "write",
]
