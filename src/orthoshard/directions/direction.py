"""What every direction is: frozen options, the state it keeps beside the momentum, and one proposal.

A direction knows matrices as batches (b, m, n) and never how they are cut; it writes nothing, and knows nothing of
skipped steps, rounding, replicas, owners and diagnostics. May import torch and this room.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Options, Scalar
from ..linalg.products import Precision
from ..slots import Slot
from .proposal import Proposal
from .request import Asks
from .seen import Seen


@dataclass(frozen=True)
class Direction(Options, ABC):
    """From what a direction sees, X (`Seen`), to U (`Proposal`). Its fields are its options, by their names the group's
    keys; a subclass needs `propose` alone, and says more where the defaults of these are not true of it:

    linear     whether U depends on X by tall products alone, for which `Sum` and `OnWholeMatrices` say
               ``linear_in_gradient``: so that replicas may exchange thin factors in place of gradients
    withholds  whether it tells what it applied (`Proposal.captured` or `Proposal.selected`), so that error feedback is
               possible
    full       whether U is a full matrix that takes products of whole matrices, as Muon's: for the cost model
    dealable   whether it may also run on whole matrices at their owners: not where it asks for whole matrices itself
    paired     whether it is of factors, each of which needs its partner's Gram matrix: it then runs on whole matrices,
               and takes no stages, which mean the matrix and not a factor of it
    """

    linear: ClassVar[bool] = False
    withholds: ClassVar[bool] = False
    full: ClassVar[bool] = False
    dealable: ClassVar[bool] = True
    paired: ClassVar[bool] = False

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        """State beside the momentum of an (m, n) matrix; ``kept``: the dtype of the momentum."""
        return {}

    @property
    def precision(self) -> Precision | None:
        """The precision of products of full-size matrices with thin ones."""
        return None

    def size(self, shape: tuple[int, ...]) -> float:
        """A factor of the learning rate that belongs to the direction, for an (m, n) matrix."""
        return 1.0

    def split(self, rate: Scalar, decay: Scalar) -> tuple[Scalar, Scalar]:
        """The rate and the decay of this matrix, of those of the matrix that counts."""
        return rate, decay

    @abstractmethod
    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks | Proposal:
        """Return a `Proposal` for a batch, as a generator that yields `Sum` and `OnWholeMatrices` where it needs more
        than this rank's piece. It writes nothing. ``state``: local pieces of its slots. ``shape``: (m, n) of the whole
        matrices."""
