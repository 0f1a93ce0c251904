"""What every stage around a direction is: frozen options, the state it keeps, and what it does at four moments.

    prepare     before the direction: rescales what it sees
    normalize   after it: rescales the rows of U, or all of it
    move        before the write: sizes the step and the decay
    written     after the write

Each is a generator that may request sums and functions of whole matrices, as directions do, and knows nothing of
shards, replicas or rounding. State is written under `Batch.skip`. A stage whose option is off is left out of the rule.
May import torch, `linalg`, `directions`, `slots` and `checks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import Options, Scalar
from ..directions.proposal import Proposal
from ..directions.request import Asks
from ..directions.seen import Seen
from ..linalg.found_inf import FoundInf
from ..linalg.rounding import Rounding
from ..slots import Slot


@dataclass(slots=True)
class Batch:
    """Matrices that take one update together, local pieces.

    weights    (e, m, n) blocks, written in place
    own        those of ``weights`` whose gradients and state are here: all, unless replicas keep only the state of
               their own matrices
    gradients  of ``own``
    state      each slot as one tensor (b, ...), b the sum of all e of ``own``
    shape      (m, n) of the whole matrix, however it is sharded
    rounding   one for each of ``weights``, to write a float32 result to it; None: to nearest, or nothing to round
    gram       for factors: their partners' Gram matrices (b, r, r), before the step; ``gram_side``: the side along
               which r lies; ``product``: (m, n) of the product of the two factors
    skip       if given, only the device knows whether the step is taken; if it is not, no state may change. The
               learning rate is then a tensor, 0 in such a step, and gradients may have entries that are not finite
    """

    weights: list[Tensor]
    own: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]
    shape: tuple[int, ...]
    rounding: Sequence[Rounding] | None = None
    skip: FoundInf | None = None
    gram: Tensor | None = None
    gram_side: Literal["rows", "columns"] = "rows"
    product: tuple[int, ...] = ()


@dataclass(frozen=True)
class Move:
    """W = decay W - size U. The fields are numbers, 0-d tensors, or one number per matrix (b, 1, 1).
    ``rate``: the learning rate alone, without the factor of the shape that ``size`` has. ``cautious``: decay
    only if U and W have one sign."""

    size: Scalar
    decay: Scalar
    rate: Scalar
    cautious: bool = False


@dataclass(frozen=True)
class Stage(Options, ABC):
    """One stage. Its fields are its options, and their names are keys of every group of matrices; by default it is
    off. A subclass has ``order`` (stages run in this order: equilibrate 10, row_moment 20, frobenius 30,
    update_floor 40, decay 50), `on` and one or more of `prepare`, `normalize`, `move` and `written`, which make
    requests as `Direction.propose` does.

    ``linear``: False if it needs figures of N that only the mean gradient has, as `prepare` may. Replicas that exchange
    thin factors have momenta of their own.
    """

    order: ClassVar[int]
    linear: ClassVar[bool] = True

    @property
    @abstractmethod
    def on(self) -> bool:
        """Whether its options turn it on."""

    @property
    def unread(self) -> dict[str, str]:
        """Options of the rule that nothing reads while this stage is on, each with the reason."""
        return {}

    @property
    def not_from_zero(self) -> str:
        """Why no matrix may start at zero, and how to mend that; "" if one may."""
        return ""

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        """Return the state of an (m, n) matrix. ``kept``: the dtype of the momentum."""
        return {}

    def prepare(self, seen: Seen, batch: Batch) -> Asks | Seen:
        """Return what the direction is to see."""
        return seen

    def normalize(self, proposal: Proposal, batch: Batch) -> Asks | None:
        """Rescale the proposal, by `Proposal.scale_rows`; or give it other entries, by `Proposal.formed` and
        `Proposal.replace`, which costs a full-size matrix."""
        return None

    def move(self, move: Move, proposal: Proposal, batch: Batch) -> Asks | Move:
        """Return how far the weights of ``batch.own`` move: ``move``, or another (`dataclasses.replace`)."""
        return move

    def written(self, batch: Batch) -> Asks | None:
        """Record what is needed of the weights of ``batch.own`` as they are now."""
        return None


def keep_(state: Tensor, new: Tensor, skip: FoundInf | None) -> None:
    """Write state = new in place, unless ``skip`` is up."""
    state.copy_(new if skip is None else torch.where(skip.flag, state, new))
